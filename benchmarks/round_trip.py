"""Round trips and calls per second of this package, torch.distributed.rpc and plain pyzmq.

Each peer is a client and a server process of its own, over loopback, one torch thread each, all
alive for the whole run.  Every round measures each peer in turn, starting from another one each
time; ratios are taken within a round, and medians over the rounds: absolute times on a machine that
others use, too, compare only inside one run.

    python benchmarks/round_trip.py [--quick] [--output output/round_trip.json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from harness import Process, ratio, turn, write_report
from machine import describe
from rich.console import Console
from rich.progress import track
from rich.table import Table

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True)
class Case:
    """One thing to measure: echoes of a tensor of `bytes`, `in_flight` at once."""

    name: str
    bytes: int
    in_flight: int


@dataclass(frozen=True)
class Peer:
    """One implementation: a module of `peers`, and what its client is told beyond the endpoint."""

    name: str
    module: str
    client_arguments: tuple[str, ...] = ()


CASES = (
    Case("64 B", 64, 1),
    Case("64 KiB", 64 * KIB, 1),
    Case("1 MiB", MIB, 1),
    Case("16 MiB", 16 * MIB, 1),
    Case("64 B, 64 at once", 64, 64),
)
PEERS = (
    Peer("zmq_autograd", "this_package", ("echo",)),
    Peer("same, in thread", "this_package", ("echo_in_thread",)),
    Peer("torch rpc", "torch_rpc"),
    Peer("plain pyzmq", "plain_pyzmq"),
    Peer("zmq.asyncio", "pyzmq_asyncio"),
)
OURS, RIVALS = PEERS[0].name, [peer.name for peer in PEERS[2:]]

# Seconds by case and peer, one for each round.
Measurements = dict[str, dict[str, list[float]]]


class Pair:
    """A peer's two processes, ended with the `ExitStack` that they are given."""

    def __init__(self, peer: Peer, stack: ExitStack) -> None:
        self.peer = peer
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        endpoint = Process(stack, peer.module, "server", directory).endpoint()
        arguments = (directory, endpoint, *peer.client_arguments)
        self._client = Process(stack, peer.module, "client", *arguments)

    def measure(self, case: Case, seconds: float) -> float:
        command = {"bytes": case.bytes, "in_flight": case.in_flight, "seconds": seconds}
        return float(self._client.ask(command, seconds)["seconds"])


def measure_all(pairs: list[Pair], rounds: int, seconds: float) -> Measurements:
    results: Measurements = {case.name: {p.peer.name: [] for p in pairs} for case in CASES}
    steps = [(case, index) for case in CASES for index in range(rounds)]
    for case, index in track(steps, "measuring", console=Console(stderr=True)):
        for pair in turn(pairs, index):
            results[case.name][pair.peer.name].append(pair.measure(case, seconds))
    return results


def show(results: Measurements, machine: str, rounds: int) -> None:
    table = Table(title=f"Median of {rounds} rounds, and the time of {OURS} over that of others")
    table.add_column("echo of")
    for peer in PEERS:
        table.add_column(peer.name, justify="right")
    for rival in RIVALS:
        table.add_column(f"/ {rival}", justify="right")
    for case in CASES:
        times = results[case.name]
        medians = (statistics.median(times[peer.name]) for peer in PEERS)
        cells = [
            f"{1e6 * m:,.0f} us" if case.in_flight == 1 else f"{1 / m:,.0f} /s" for m in medians
        ]
        cells += [f"{ratio(times[OURS], times[rival]):.2f}" for rival in RIVALS]
        table.add_row(case.name, *cells)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(machine, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("output/round_trip.json"))
    arguments = parser.parse_args()
    rounds, seconds = (3, 0.1) if arguments.quick else (7, 0.3)
    machine, start = describe(), monotonic()
    with ExitStack() as stack:
        pairs = [Pair(peer, stack) for peer in PEERS]
        results = measure_all(pairs, rounds, seconds)
    show(results, machine, rounds)
    report = {
        "machine": machine,
        "rounds": rounds,
        "seconds_each": seconds,
        "cases": {
            name: {
                "seconds": times,
                "ratio": {rival: ratio(times[OURS], times[rival]) for rival in RIVALS},
            }
            for name, times in results.items()
        },
    }
    write_report(arguments.output, report)
    print(f"{arguments.output}, {monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
