"""Worlds whose members all live in this process, and the store that they meet at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager

from tests.helpers import DEADLINE
from zmq_autograd.launch.environment import rank_variables, read_environment
from zmq_autograd.launch.store import host_store
from zmq_autograd.launch.world import WorldWorker

# With a process's first store libuv opens a pipe that lasts as long as the process.
host_store("127.0.0.1", 0)


@contextmanager
def hosted_store() -> Iterator[int]:
    """Host a store, as a launcher does, and return its port."""
    store = host_store("127.0.0.1", 0)
    yield store.port
    del store


def member(rank: int, world_size: int, port: int, **options: object) -> WorldWorker:
    """Return a member whose launcher hosts the store at `port`; all live in this process."""
    variables = rank_variables(rank, world_size, master_port=port, run_id="test")
    return WorldWorker(read_environment(variables), **options)  # type: ignore[arg-type]


def members(world_size: int, port: int, **options: object) -> list[WorldWorker]:
    return [member(rank, world_size, port, **options) for rank in range(world_size)]


@asynccontextmanager
async def running(workers: list[WorldWorker]) -> AsyncIterator[list[WorldWorker]]:
    """Start all at once, and have all leave at once."""
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(worker.__aenter__() for worker in workers))
        try:
            yield workers
        finally:
            await asyncio.gather(*(leave(worker) for worker in workers))


async def leave(worker: WorldWorker) -> None:
    await worker.__aexit__(None, None, None)


async def fail(worker: WorldWorker) -> None:
    error = RuntimeError("its block raised")
    await worker.__aexit__(RuntimeError, error, None)


async def outcomes(*waiting: Awaitable[object]) -> list[object]:
    return list(await asyncio.gather(*waiting, return_exceptions=True))
