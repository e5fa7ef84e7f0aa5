"""What the engine needs of the worker it runs on, and of the workers it exchanges messages with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Final, Protocol, TypeVar

from zmq_autograd.wire.messages import Reply, Request

T = TypeVar("T")

Span = Callable[[str], AbstractContextManager[object]]

current_span: Final[ContextVar[Span]] = ContextVar("zmq_autograd_span", default=nullcontext)
"""What makes a block an event of that name in a profile, where one is recorded."""


class Peer(Protocol):
    """Another worker, for as long as the session with it lasts."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def incarnation(self) -> str:
        """Which life of it."""

    @property
    def is_connected(self) -> bool:
        """Whether the session lasts."""

    async def request(self, message: Request, *, timeout: float | None) -> Reply:
        """Send a request and return its reply; raises `ZmqAutogradError`."""


class Host(Protocol):
    """The worker that contexts are on."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def tracebacks(self) -> bool:
        """Whether others are told where in this worker's code something raised."""

    async def compute(self, function: Callable[[], T]) -> T:
        """Run `function` off the event loop, under torch's default modes."""

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in a task of its own, in none of the calls being served.

        It need not be awaited: its error is no loss.
        """


async def tell(host: Host, peers: Iterable[Peer], message: Request, seconds: float) -> list[Reply]:
    """Send `message` to all `peers`; return the replies that come within `seconds`.

    Nobody is told to stop after that: who was busy takes the message in when it gets to it.
    """
    tasks = [host.spawn(peer.request(message, timeout=None)) for peer in peers]
    done, _ = await asyncio.wait(tasks, timeout=seconds) if tasks else (set(), None)
    heard = (task for task in done if not task.cancelled() and task.exception() is None)
    return [task.result() for task in heard]
