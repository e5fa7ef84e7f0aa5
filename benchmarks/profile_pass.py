"""Where the time of one training step goes, in the trainer's and in the worker's process.

The step is that of `split_mlp.py`: measured with timers around the parts of the package, and before
and after as it is, so that what the timers cost shows.  Rows are CPU time of all threads: what the
two processes do, not what they wait for.  They do some of it at once, so the step may take less.

    python benchmarks/profile_pass.py [--quick] [--batch 1] [--width 64] [--layers 2]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from harness import Process, write_report
from machine import describe
from peers.model import Model, make_input
from peers.split_profiled import (
    ENGINE,
    HOPS,
    MODEL,
    PROCESS,
    REST,
    SECTIONS,
    Profile,
    ProfiledMember,
)
from peers.split_this_package import ThisPackage
from rich.console import Console
from rich.table import Table
from teams import OURS, Task, start_teams

import zmq_autograd as za

WARM_UP_STEPS = 20
PLACES = ("trainer", "worker")
ROWS = (MODEL, *SECTIONS, REST)
OTHER = "libzmq's threads"


async def profile(model: Model, endpoint: str, seconds: float) -> dict[str, Any]:
    """Take steps with the profiled worker at `endpoint`, and return what each of them took."""
    x = make_input(model)
    async with za.Worker("trainer") as worker:
        member = ProfiledMember(worker)
        await member.link([endpoint])
        ours = ThisPackage(member)
        await ours.prepare(model, 1)
        differences = await ours.differences(x, 1)
        await member.watch()
        for _ in range(WARM_UP_STEPS):
            await ours.step(x, 1, use_gradients=False)
        before = [Profile(*fields) for fields in await member.read()]
        times: list[float] = []
        end = perf_counter() + seconds
        while perf_counter() < end:
            step = await ours.step(x, 1, use_gradients=False)
            times.append(step.end - step.start)
        after = [Profile(*fields) for fields in await member.read()]
    spent = [b.per_step(a, len(times)) for a, b in zip(before, after, strict=True)]
    return {
        "differences": differences,
        "profiled_step": statistics.median(times),
        "steps": len(times),
        "seconds": {place: p.seconds for place, p in zip(PLACES, spent, strict=True)},
        "messages": {place: p.messages for place, p in zip(PLACES, spent, strict=True)},
    }


def measure(model: Model, seconds: float) -> dict[str, Any]:
    task = Task("a step", model)
    with ExitStack() as stack:
        (team,) = start_teams([OURS], 1, stack)
        team.check(task)
        profiled = Process(stack, "split_profiled", "worker", "", "1", "1")
        before = team.measure(task, seconds)["step"]
        result = asyncio.run(profile(model, profiled.endpoint(), 2 * seconds))
        after = team.measure(task, seconds)["step"]
    return result | {"plain_step": (before + after) / 2}


def show(result: dict[str, Any], model: Model) -> None:
    table = Table(title=f"CPU time of a step, batch {model.batch}, width {model.width}, in us")
    for column in ("", *PLACES, "both", "share"):
        table.add_column(column, justify="right" if column else "left")
    seconds = [result["seconds"][place] for place in PLACES]
    total = sum(spent[PROCESS] for spent in seconds)

    def add(row: str, each: list[float]) -> None:
        cells = (f"{1e6 * value:,.0f}" for value in (*each, sum(each)))
        table.add_row(row, *cells, f"{sum(each) / total:.0%}")

    timed = [sum(spent.get(row, 0.0) for row in ROWS) for spent in seconds]
    for row in ROWS:
        add(row, [spent.get(row, 0.0) for spent in seconds])
    add(OTHER, [spent[PROCESS] - own for spent, own in zip(seconds, timed, strict=True)])
    table.add_section()
    add(PROCESS, [spent[PROCESS] for spent in seconds])
    add("the engine's own of it", [sum(spent.get(row, 0.0) for row in ENGINE) for spent in seconds])
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for place, kinds in result["messages"].items():
        sent = ", ".join(f"{n:.1f} {kind}" for kind, n in kinds.items() if n >= 0.05)
        print(f"{place} sends: {sent}")
    plain, profiled = 1e6 * result["plain_step"], 1e6 * result["profiled_step"]
    hops = 1e6 * sum(spent[HOPS] for spent in seconds)
    print(
        f"a step takes {plain:,.0f} us, with the timers {profiled:,.0f} us, {HOPS} {hops:,.0f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2, help="of each half; 0: elementwise")
    parser.add_argument("--output", type=Path, default=Path("output/profile_pass.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    model = Model(arguments.batch, arguments.width, arguments.layers)
    result = measure(model, 0.1 if arguments.quick else 2.0)
    show(result, model)
    print(machine)
    write_report(arguments.output, {"machine": machine, **result})
    print(arguments.output)


if __name__ == "__main__":
    main()
