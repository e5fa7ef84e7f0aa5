"""What tests of workers share: two workers that know each other, and how long to wait."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq_autograd as za

DEADLINE: Final = 20.0
"""Seconds after which a test gives up waiting for what should take milliseconds."""

SCHEMES: Final = ("tcp", "ipc", "memory")

_numbers = itertools.count()


@dataclass(frozen=True)
class Pair:
    """Two running workers: `bob` listens, `alice` dialled it."""

    alice: za.Worker
    bob: za.Worker
    remote_bob: za.RemoteWorker


def endpoint_of(scheme: str, folder: Path) -> str:
    """Return an endpoint of `scheme` that nobody listens on."""
    number = next(_numbers)
    return {
        "tcp": "tcp://127.0.0.1:0",
        "tcp6": "tcp://[::1]:0",
        "ipc": f"ipc://{folder}/{number}",
        "memory": f"memory://test-{number}",
    }[scheme]


def memory_endpoint() -> str:
    """Return an endpoint in memory that nobody listens on."""
    return f"memory://test-{next(_numbers)}"


@asynccontextmanager
async def connected(endpoint: str | None = None, **options: Any) -> AsyncIterator[Pair]:
    """Run two workers, the second with `options`, the first connected to it."""
    async with (
        za.Worker("bob", listen=endpoint or memory_endpoint(), **options) as bob,
        za.Worker("alice") as alice,
    ):
        yield Pair(alice, bob, await alice.connect(bob.endpoints[0], timeout=DEADLINE))
