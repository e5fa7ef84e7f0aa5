"""The workers that random programs run on: each knows every other, and itself."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from torch import Tensor

import zmq_autograd as za
from tests.programs.distributed import DistributedRun
from tests.programs.program import WORKERS, Program
from tests.programs.record import Record

DRAIN_SECONDS: Final = 0.5
"""How long a worker waits for what a program has left, where it went wrong."""

_numbers = itertools.count()


class Fleet:
    """Running workers; programs run on them one after the other.

    Attributes:
        workers: in the order of `WORKERS`.
        peers: ``peers[a][b]`` is what worker `a` has of worker `b`.
    """

    def __init__(self, workers: list[za.Worker]) -> None:
        """Offer on `workers` what programs call."""
        self.workers = workers
        self.peers: list[list[za.RemoteWorker]] = []
        self._run: DistributedRun | None = None
        for index, worker in enumerate(workers):
            self._register(index, worker)

    def _register(self, index: int, worker: za.Worker) -> None:
        @worker.register
        async def serve(
            trainer: int, tag: str, number: int, fails: bool, args: list[Tensor]
        ) -> Any:
            return await self._running.serve(index, trainer, tag, number, fails, args)

        @worker.register
        def serve_in_thread(
            trainer: int, tag: str, number: int, fails: bool, args: list[Tensor]
        ) -> Any:
            return self._running.serve_in_thread(index, trainer, tag, number, fails, args)

        @worker.register
        def gradients() -> list[Tensor | None]:
            return self._running.gradients_on(index)

    @property
    def _running(self) -> DistributedRun:
        assert self._run is not None, "nothing runs"
        return self._run

    async def connect(self) -> None:
        """Connect each pair over one session, which the first of them dials."""
        found: dict[tuple[int, int], za.RemoteWorker] = {}
        for index, worker in enumerate(self.workers):
            worker.register(_return_peer_to(found, index), name="meet")
        for a, b in itertools.combinations_with_replacement(range(len(self.workers)), 2):
            remote = await self.workers[a].connect(self.workers[b].endpoints[0])
            await remote.call("meet", a)
            found[a, b] = remote
        everyone = range(len(self.workers))
        self.peers = [[found[a, b] for b in everyone] for a in everyone]

    async def run(self, program: Program) -> Record:
        """Run `program` and return what was seen, once nothing of it is left.

        Raises:
            TimeoutError: it hangs.
        """
        self._run = DistributedRun(program, self.workers, self.peers)
        try:
            await self._run.run()
            await self._check_nothing_left()
            return self._run.record
        finally:
            self._run = None

    async def _check_nothing_left(self) -> None:
        for worker in self.workers:
            contexts = worker.status()["contexts"]
            assert not contexts, f"contexts left on {worker.name}: {contexts}"


def _return_peer_to(found: dict[tuple[int, int], za.RemoteWorker], here: int) -> Any:
    async def meet(caller: int) -> None:
        peer = za.current_peer()
        assert peer is not None
        found[here, caller] = peer

    return meet


@asynccontextmanager
async def open_fleet(scheme: str) -> AsyncIterator[Fleet]:
    """Start the workers, over endpoints of `scheme`: "memory" or "tcp"."""
    async with AsyncExitStack() as stack:
        workers = []
        for name in WORKERS:
            endpoint = {
                "tcp": "tcp://127.0.0.1:0",
                "memory": f"memory://programs-{next(_numbers)}-{name}",
            }[scheme]
            worker = za.Worker(name, listen=endpoint, drain=DRAIN_SECONDS)
            workers.append(await stack.enter_async_context(worker))
        fleet = Fleet(workers)
        await fleet.connect()
        yield fleet
