"""Backward through a chain of 1 to 8 workers, each a process that calls the next from its handler.

The loss is at the trainer, so gradients go to the last worker along the replies and come back along
the calls: two messages for each worker.  Compared are this package, torch.distributed.autograd, and
this package's calls with the gradients sent back by hand, which shows what the engine costs.  All
are alive for the whole run and take turns; ratios are taken within a round.

    python benchmarks/chain.py [--quick] [--output output/chain.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from harness import ratio, write_report
from machine import describe
from peers.model import Model
from rich.console import Console
from rich.table import Table
from teams import BY_HAND, OURS, TORCH, Measurements, Task, check_all, measure_all, start_teams

IMPLEMENTATIONS = (OURS, TORCH, BY_HAND)
RIVALS = tuple(implementation.name for implementation in IMPLEMENTATIONS[1:])
STAGE = Model(batch=1, width=64, layers=1)
LENGTHS = (1, 2, 3, 4, 6, 8)
QUICK_LENGTHS = (1, 2)


def tasks_of(lengths: tuple[int, ...]) -> list[Task]:
    return [Task(str(length), STAGE, workers=length) for length in lengths]


def backward(results: Measurements, task: str, name: str) -> list[float]:
    """Return the seconds of each round."""
    return results[task][name]["backward"]


def growth(results: Measurements, name: str) -> float:
    """Return the seconds that each further worker adds: the slope of the line nearest to all."""
    lengths = [float(task) for task in results]
    medians = [statistics.median(backward(results, task, name)) for task in results]
    return statistics.linear_regression(lengths, medians).slope


def show(results: Measurements, rounds: int, console: Console) -> None:
    table = Table(
        title=f"`backward`: median of {rounds} rounds, and the time of {OURS.name} over it"
    )
    table.add_column("workers", justify="right")
    for implementation in IMPLEMENTATIONS:
        table.add_column(implementation.name, justify="right")
    for rival in RIVALS:
        table.add_column(f"/ {rival}", justify="right")
    for task in results:
        times = {i.name: backward(results, task, i.name) for i in IMPLEMENTATIONS}
        cells = [f"{1e3 * statistics.median(times[i.name]):,.2f} ms" for i in IMPLEMENTATIONS]
        cells += [f"{ratio(times[OURS.name], times[rival]):.2f}" for rival in RIVALS]
        table.add_row(task, *cells)
    slopes = [growth(results, i.name) for i in IMPLEMENTATIONS]
    table.add_section()
    table.add_row("each further worker", *(f"{1e3 * slope:,.2f} ms" for slope in slopes))
    table.add_row("each hop", *(f"{1e3 * slope / 2:,.2f} ms" for slope in slopes))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("output/chain.json"))
    arguments = parser.parse_args()
    rounds, seconds = (2, 0.05) if arguments.quick else (7, 0.3)
    tasks = tasks_of(QUICK_LENGTHS if arguments.quick else LENGTHS)
    machine, start = describe(), monotonic()
    with ExitStack() as stack:
        longest = max(task.workers for task in tasks)
        teams = start_teams(IMPLEMENTATIONS, longest, stack)
        differences = check_all(teams, tasks)
        results = measure_all(teams, tasks, rounds, seconds)
    show(results, rounds, Console(width=None if sys.stdout.isatty() else 150))
    worst = max(max(task.values()) for task in differences.values())
    print(f"gradients equal those of one process, up to {worst:.1e} of the largest\n{machine}")
    report = {
        "machine": machine,
        "rounds": rounds,
        "seconds_each": seconds,
        "differences": differences,
        "seconds": results,
        "per_worker": {i.name: growth(results, i.name) for i in IMPLEMENTATIONS},
    }
    write_report(arguments.output, report)
    print(f"{arguments.output}, {monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
