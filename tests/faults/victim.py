"""A worker in a process of its own, for tests to kill, freeze, cut off and flood.

    victim.py bob --listen tcp://127.0.0.1:0 [--dial ENDPOINT] [--next ENDPOINT]

Prints ``listening on ENDPOINT INCARNATION`` once it runs, and leaves when its standard input ends,
so that it never outlives the test that started it.  The tests' side is `victims`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import threading
import time
from typing import Any

import psutil
import torch
from torch import Tensor

import zmq_autograd as za
from tests.faults.vitals import Stalls, descriptors
from zmq_autograd.wire.limits import MIB

HOLD_SECONDS = 60.0
"""Seconds for which a thread is kept at most."""


class Victim:
    """What a victim offers, and what it has seen."""

    def __init__(self, following: str | None) -> None:
        self.stalls: Stalls | None = None
        self._following = following
        self._zeros = torch.zeros(MIB, dtype=torch.uint8)
        self._may_go = threading.Event()
        self._waiting = 0
        self._noted = 0
        self._cancelled = 0
        self._changed = asyncio.Condition()

    def offer_on(self, worker: za.Worker) -> None:
        """Register all of it."""
        for function in (
            self.wait,
            self.waiting,
            self.cancelled,
            self.ask_next,
            self.ask_back,
            self.note,
            self.noted,
            self.block,
            self.double,
            self.zeros,
            self.finish,
            self.hold,
            self.let_go,
            self.vitals,
            self.restart_measuring,
        ):
            worker.register(function)

        @worker.handler(za.messages.PropagateGradientsRequest)
        async def take_gradients(
            request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
        ) -> za.messages.PropagateGradientsResponse:
            return za.messages.PropagateGradientsResponse()

    async def wait(self) -> None:
        """Wait until cancelled."""
        await self._count(waiting=1)
        try:
            await asyncio.Event().wait()
        finally:
            await self._count(waiting=-1, cancelled=1)

    async def waiting(self, count: int) -> None:
        """Return once `count` calls of `wait` are under way."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting == count)

    async def cancelled(self, count: int) -> None:
        """Return once `count` calls of `wait` have been cancelled."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._cancelled >= count)

    async def ask_next(self, function: str, *args: Any) -> Any:
        """Call `function` on the next worker."""
        worker = za.current_worker()
        if worker is None or self._following is None:
            raise RuntimeError("expected a worker that has a next one")
        following = await worker.connect(self._following)
        return await following.call(function, *args)

    async def ask_back(self) -> Any:
        """Call `double` on the caller."""
        caller = za.current_peer()
        if caller is None:
            raise RuntimeError("expected a caller")
        return await caller.call("double", torch.ones(2), timeout=5)

    async def note(self) -> int:
        """Count this call."""
        self._noted += 1
        return self._noted

    async def noted(self) -> int:
        """Return how often `note` was called."""
        return self._noted

    async def block(self, seconds: float) -> None:
        """Hold the event loop up, as a handler should not."""
        time.sleep(seconds)  # noqa: ASYNC251

    async def double(self, x: Tensor) -> Tensor:
        """Return twice `x`."""
        return 2 * x

    async def zeros(self, count: int) -> Tensor:
        """Return `count` bytes, which takes no time."""
        return self._zeros[:count]

    def hold(self) -> None:
        """Keep a thread until it is let go."""
        if not self._may_go.wait(HOLD_SECONDS):
            raise TimeoutError

    async def let_go(self) -> None:
        """Let all go that are kept by now."""
        self._may_go.set()
        self._may_go = threading.Event()

    def finish(self, seconds: float) -> float:
        """Return after some seconds in a compute thread."""
        time.sleep(seconds)
        return seconds

    async def vitals(self) -> dict[str, Any]:
        """Say how this process does."""
        process = psutil.Process()
        return {
            "stall": self.stalls.longest if self.stalls else 0.0,
            "stall on the clock": self.stalls.longest_on_the_clock if self.stalls else 0.0,
            "bytes": process.memory_info().rss,
            "descriptors": descriptors(),
            "threads": process.num_threads(),
            "tasks": len(asyncio.all_tasks()),
            "waiting": self._waiting,
        }

    async def restart_measuring(self) -> None:
        """Forget the longest stall."""
        if self.stalls:
            self.stalls.longest = self.stalls.longest_on_the_clock = 0.0

    async def _count(self, waiting: int, cancelled: int = 0) -> None:
        self._waiting += waiting
        self._cancelled += cancelled
        async with self._changed:
            self._changed.notify_all()


async def main() -> None:
    torch.set_num_threads(1)  # there are enough processes for the processors
    # To collect what torch alone brings takes longer than the stalls that are measured here.
    gc.collect()
    gc.freeze()
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--dial", help="call `here` on the worker that listens there")
    parser.add_argument("--next", help="whom `ask_next` calls")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--drain", type=float, default=10.0)
    arguments = parser.parse_args()
    victim = Victim(arguments.next)
    worker = za.Worker(
        arguments.name, arguments.listen, insecure=arguments.insecure, drain=arguments.drain
    )
    victim.offer_on(worker)
    async with worker:
        victim.stalls = Stalls()
        loop = asyncio.get_running_loop()
        serving = loop.create_task(worker.serve_forever())
        loop.add_reader(sys.stdin, serving.cancel)
        sys.stdout.write(f"listening on {worker.endpoints[0]} {worker.incarnation}\n")
        sys.stdout.flush()
        if arguments.dial:
            remote = await worker.connect(arguments.dial)
            await remote.call("here")
        try:
            await serving
        except asyncio.CancelledError:
            pass  # the test has closed our standard input
        finally:
            loop.remove_reader(sys.stdin)
            await victim.stalls.stop()


if __name__ == "__main__":
    asyncio.run(main())
