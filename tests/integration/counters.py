"""A class whose instances RRefs refer to, and functions that keep RRefs, for tests."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import zmq_autograd as za
from tests.integration.fleets import Fleet, until

NOTHING = {"owned": 0, "forks": 0, "held": 0, "pending": 0}


class Counter:
    """State that lives elsewhere."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def add(self, more: int) -> int:
        self.count += more
        return self.count

    def reset(self) -> None:
        self.count = 0

    def fail(self) -> None:
        raise ValueError("on purpose")

    async def slowly(self, started: str) -> int:
        """Let others run in the midst."""
        before = self.count
        await asyncio.sleep(0)
        self.count = before + 1
        return self.count


def offer_counter(worker: za.Worker) -> None:
    worker.register(Counter, expose=("add", "fail", "slowly"))


class Keeper:
    """Functions by which a worker keeps, uses, passes on and drops RRefs."""

    def __init__(self) -> None:
        self.kept: list[za.RRef] = []

    def keep(self, *rrefs: za.RRef) -> None:
        self.kept += rrefs

    def give(self) -> list[za.RRef]:
        return self.kept

    def drop(self) -> None:
        self.kept.clear()

    async def add(self, rref: za.RRef, more: int) -> Any:
        return await rref.call("add", more)


def offer_keeper(worker: za.Worker) -> Keeper:
    keeper = Keeper()
    worker.register(keeper, "keeper", expose=("keep", "give", "drop", "add"))
    return keeper


async def gone(fleet: Fleet) -> None:
    """Wait until no worker has anything to do with any RRef."""
    gc.collect()
    await until(lambda: all(w.status()["rrefs"] == NOTHING for w in fleet.workers.values()))
