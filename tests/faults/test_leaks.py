"""What starts and stops, with calls under way, leaves nothing behind.

Each test prints what it measured.  Descriptors, tasks, threads and processes are also counted after
every test here, as in all tests that start workers.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import psutil
import pytest
import torch

import zmq_autograd as za
from tests.faults.proxy import proxied
from tests.faults.victims import Outcome, Victim, outcome
from tests.faults.vitals import descriptors, say
from zmq_autograd.wire.limits import KIB

STARTS: Final = 1000

WARM_UP: Final = 200

MOST_BYTES_EACH: Final = 4 * KIB
"""By which memory may grow with each start and stop: allocators do not give back every page."""


@dataclass
class Workers:
    """Bob, alice, and what alice waits for on bob."""

    bob: za.Worker
    alice: za.Worker
    remote: za.RemoteWorker
    calls: list[asyncio.Task[Outcome]]


def offer(bob: za.Worker, begun: asyncio.Event) -> None:
    @bob.register
    async def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @bob.register
    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    @bob.register
    def square(x: torch.Tensor) -> torch.Tensor:
        return x @ x


async def start_and_stop(number: int) -> None:
    """Run two workers that part, in one of four ways, while calls of all kinds are under way."""
    begun = asyncio.Event()
    bob = za.Worker("bob", "tcp://127.0.0.1:0", drain=0.01)
    offer(bob, begun)
    alice = za.Worker("alice", drain=0.01)
    x = torch.ones(4, 4)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(bob)
        await stack.enter_async_context(alice)
        line = await stack.enter_async_context(proxied(bob.endpoints[0]))
        over_the_line = number % 4 == 3
        remote = await alice.connect(line.endpoint if over_the_line else bob.endpoints[0])
        assert torch.equal(await remote.call("double", x), 2 * x)
        assert torch.equal(await remote.call("square", x), x @ x)
        arguments: list[tuple[str, list[torch.Tensor]]] = [
            ("wait", []),
            ("wait", []),
            ("square", [x]),
            ("double", [x]),
        ]
        calls = [asyncio.create_task(outcome(remote, name, *args)) for name, args in arguments]
        await begun.wait()
        calls[0].cancel()
        knocking = asyncio.create_task(alice.connect("tcp://127.0.0.1:1"))
        match number % 4:
            case 0:
                await bob.close()
            case 1:
                await alice.close()
            case 2:
                await asyncio.gather(alice.close(), bob.close())
            case 3:
                await line.reset()
    await asyncio.wait([knocking, *calls])
    assert isinstance(knocking.exception(), za.ZmqAutogradError)
    assert isinstance(calls[1].result().error, za.WorkerLost)


async def start_and_stop_all(numbers: range) -> None:
    """Do it in each of the four ways at once, so that they need not wait for one another."""
    for first in numbers[::4]:
        await asyncio.gather(*(start_and_stop(number) for number in range(first, first + 4)))


def held() -> tuple[int, int, int, int]:
    """Return the descriptors, threads, tasks and children of this process."""
    children = psutil.Process().children(recursive=True)
    return descriptors(), threading.active_count(), len(asyncio.all_tasks()), len(children)


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.timeout(240)
async def test_a_thousand_starts_and_stops_leave_nothing() -> None:
    await start_and_stop_all(range(WARM_UP))
    held_before, bytes_before = held(), resident_bytes()
    started = time.monotonic()
    await start_and_stop_all(range(WARM_UP, STARTS))
    seconds = time.monotonic() - started
    each = (resident_bytes() - bytes_before) / (STARTS - WARM_UP)
    say(
        f"{STARTS} starts and stops, {seconds / (STARTS - WARM_UP) * 1000:.1f} ms each: "
        f"{each:.0f} bytes more with each; descriptors, threads, tasks, children: {held()}"
    )
    assert held() == held_before
    assert each < MOST_BYTES_EACH


LEAVERS: Final = 8


async def test_workers_that_are_told_to_leave_finish_what_is_under_way() -> None:
    """SIGTERM while each computes something for us, and something that never ends."""
    leavers = [Victim(f"leaver-{number}", "--drain", "2.0") for number in range(LEAVERS)]
    try:
        for leaver in leavers:
            await asyncio.to_thread(leaver.started)
        async with za.Worker("alice") as alice:
            remotes = [await alice.connect(leaver.endpoint) for leaver in leavers]
            finishing = [asyncio.create_task(outcome(each, "finish", 1.0)) for each in remotes]
            endless = [asyncio.create_task(outcome(each, "wait")) for each in remotes]
            await asyncio.gather(*(each.call("waiting", 1) for each in remotes))
            told = time.monotonic()
            for leaver in leavers:
                leaver.terminate()
            codes = [await asyncio.to_thread(leaver.wait, 15.0) for leaver in leavers]
            seconds = time.monotonic() - told
            finished, cancelled = await asyncio.gather(*finishing), await asyncio.gather(*endless)
        say(f"{LEAVERS} workers left within {seconds:.2f} s")
        assert codes == [0] * LEAVERS
        assert [each.error for each in finished] == [None] * LEAVERS
        for remote, each in zip(remotes, cancelled, strict=True):
            assert isinstance(each.error, za.WorkerLost)
            assert each.error.name == remote.name
        assert 1.9 < seconds < 10
    finally:
        for leaver in leavers:
            leaver.close()
