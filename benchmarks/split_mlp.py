"""Step time of a model split between two processes: this package and torch.distributed.autograd.

The trainer holds the first half and the loss, the worker the second half.  A step is a context, a
call, `backward` and leaving the context.  Beside the two are one process that has the whole model,
and this package's calls with the gradients sent back by hand, which shows what the engine costs.
All are alive for the whole run and take turns; ratios are taken within a round.

    python benchmarks/split_mlp.py [--quick] [--output output/split_mlp.json]
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
from teams import (
    BY_HAND,
    LOCAL,
    OURS,
    TORCH,
    Measurements,
    Task,
    check_all,
    measure_all,
    start_teams,
)

IMPLEMENTATIONS = (OURS, TORCH, BY_HAND, LOCAL)
RIVALS = tuple(implementation.name for implementation in IMPLEMENTATIONS[1:])
SMALL = Model(batch=1, width=64, layers=2)
TASKS = [
    Task("batch 1, width 64", SMALL),
    Task("same, gradients used", SMALL, use_gradients=True),
    Task("1 MiB, elementwise", Model(batch=256, width=1024, layers=0)),
    Task("batch 32, width 1024", Model(batch=32, width=1024, layers=2)),
    Task("batch 512, width 1024", Model(batch=512, width=1024, layers=2)),
    Task("16 MiB, elementwise", Model(batch=4096, width=1024, layers=0)),
]
QUICK_TASKS = TASKS[:3]
PARTS = ("forward", "backward", "leave")


def show(results: Measurements, rounds: int, console: Console) -> None:
    table = Table(title=f"A step: median of {rounds} rounds, and the time of {OURS.name} over that")
    table.add_column("step of")
    for implementation in IMPLEMENTATIONS:
        table.add_column(implementation.name, justify="right")
    for rival in RIVALS:
        table.add_column(f"/ {rival}", justify="right")
    for task, teams in results.items():
        steps = {name: parts["step"] for name, parts in teams.items()}
        cells = [f"{1e3 * statistics.median(steps[i.name]):,.2f} ms" for i in IMPLEMENTATIONS]
        cells += [f"{ratio(steps[OURS.name], steps[rival]):.2f}" for rival in RIVALS]
        table.add_row(task, *cells)
    console.print(table)


def show_parts(results: Measurements, console: Console) -> None:
    table = Table(title="Its parts, in ms: " + " / ".join(PARTS))
    table.add_column("step of")
    for implementation in IMPLEMENTATIONS:
        table.add_column(implementation.name, justify="right")
    for task, teams in results.items():
        cells = (
            " / ".join(f"{1e3 * statistics.median(teams[i.name][part]):,.2f}" for part in PARTS)
            for i in IMPLEMENTATIONS
        )
        table.add_row(task, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("output/split_mlp.json"))
    arguments = parser.parse_args()
    rounds, seconds = (2, 0.05) if arguments.quick else (7, 0.4)
    tasks = QUICK_TASKS if arguments.quick else TASKS
    machine, start = describe(), monotonic()
    with ExitStack() as stack:
        teams = start_teams(IMPLEMENTATIONS, 1, stack)
        differences = check_all(teams, tasks)
        results = measure_all(teams, tasks, rounds, seconds)
    console = Console(width=None if sys.stdout.isatty() else 150)
    show(results, rounds, console)
    show_parts(results, console)
    worst = max(max(task.values()) for task in differences.values())
    print(f"gradients equal those of one process, up to {worst:.1e} of the largest\n{machine}")
    ratios = {
        task: {rival: ratio(teams[OURS.name]["step"], teams[rival]["step"]) for rival in RIVALS}
        for task, teams in results.items()
    }
    report = {
        "machine": machine,
        "rounds": rounds,
        "seconds_each": seconds,
        "differences": differences,
        "seconds": results,
        "ratio": ratios,
    }
    write_report(arguments.output, report)
    print(f"{arguments.output}, {monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
