"""Several workers in one process, each of which can call on any other by its name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint


class Fleet:
    """Running workers by name; each offers `ask`, which leads a call on to others.

    Attributes:
        workers: by name.
    """

    def __init__(self, workers: list[za.Worker]) -> None:
        """Offer on `workers` what all of them offer."""
        self.workers = {worker.name: worker for worker in workers}
        for worker in workers:
            worker.register(self._ask_of(worker), "ask")
            worker.register(gradients, "gradients")

    def __getitem__(self, name: str) -> za.Worker:
        return self.workers[name]

    async def way(self, source: str, target: str) -> za.RemoteWorker:
        """Return what worker `source` has of worker `target`, over a session that it dials."""
        return await self[source].connect(self[target].endpoints[0], timeout=DEADLINE)

    def _ask_of(self, worker: za.Worker) -> Callable[..., Any]:
        async def ask(path: list[str], function: str, *args: Any) -> Any:
            """Call `function` on the last worker of `path`, by way of those before."""
            way = await self.way(worker.name, path[0])
            if len(path) == 1:
                return await way.call(function, *args, timeout=DEADLINE)
            return await way.call("ask", path[1:], function, *args, timeout=DEADLINE)

        return ask

    def contexts(self) -> dict[str, list[int]]:
        """Return the ids of the contexts that there are, by the names of the workers with some."""
        found = {}
        for name, worker in self.workers.items():
            contexts = worker.status()["contexts"]
            if contexts:
                found[name] = [context["context_id"] for context in contexts]
        return found


def gradients() -> list[Tensor]:
    """Return the gradients of this worker's leaves in the current context."""
    context = za.current_context()
    assert context is not None
    return list(context.gradients().values())


@asynccontextmanager
async def running(*names: str, **options: Any) -> AsyncIterator[Fleet]:
    """Run workers of these names, all with `options`."""
    async with AsyncExitStack() as stack:
        workers = [za.Worker(name, listen=memory_endpoint(), **options) for name in names]
        for worker in workers:
            await stack.enter_async_context(worker)
        yield Fleet(workers)


async def until(reached: Callable[[], object], seconds: float = DEADLINE) -> None:
    """Wait until `reached` says so, where nothing tells of it."""
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.001)
