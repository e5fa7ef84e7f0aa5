"""How links and sockets of ZeroMQ end: what was queued leaves first, within a bound of time.

Owns the order of closing.  libzmq closes its descriptor with what the peer sent still unread,
which makes the kernel throw away what was written and not acknowledged; the duplicate of the
descriptor in `Connection` is therefore held until the peer has everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from zmq_autograd.transport.connection import Connection
from zmq_autograd.transport.zmq_link import ZmqLink
from zmq_autograd.transport.zmq_socket import LoopSocket

_POLL_SECONDS: Final = 0.005

_QUIET_POLLS: Final = 4
"""Looks in a row at an empty kernel queue after which libzmq's own counts as empty, too."""


class Closings:
    """The tasks that take links and sockets down: each named, kept and awaited."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, closing: Coroutine[Any, Any, None], name: str) -> None:
        """Run `closing` beside everything else."""
        task = asyncio.get_running_loop().create_task(closing, name=f"close {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def join(self) -> None:
        """Wait for all; each is bounded itself."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))


async def end_when_written(link: ZmqLink, deadline: float) -> None:
    """End the connection of an accepted link when libzmq has written all that was sent.

    Args:
        link: the link, which takes no new messages any more.
        deadline: when to end it at the latest, on the monotonic clock.
    """
    quiet = 0
    while time.monotonic() < deadline and link.connection.held:
        written = link.written
        # A Unix socket counts nothing, but what its peer has not read yet can be seen.
        empty = written is None and link.connection.unread_bytes() == 0
        quiet = quiet + 1 if empty else 0
        if written or quiet >= _QUIET_POLLS:
            break
        await asyncio.sleep(_POLL_SECONDS)
    link.connection.end()


async def release_when_read(connection: Connection, deadline: float) -> None:
    """Let go of an ended connection when the peer's kernel has all of it."""
    connection.end()
    await _until(lambda: not connection.unread_bytes(), deadline)
    connection.release()


async def take_down(
    socket: LoopSocket,
    waiting: Callable[[], bool],
    connections: Callable[[], Iterable[Connection]],
    deadline: float,
) -> None:
    """Close a socket with all its connections.

    Args:
        socket: to be closed.
        waiting: whether a link of it has messages that libzmq has not taken yet.
        connections: those that are left.
        deadline: when to be done with what was queued at the latest, on the monotonic clock.
    """
    await _until(lambda: not waiting(), deadline)
    left = max(0.0, deadline - time.monotonic())
    socket.close(left)
    try:
        async with asyncio.timeout(left + _POLL_SECONDS):
            await socket.gone.wait()
    except TimeoutError:
        pass  # libzmq's own linger ends at the same moment; what is left is ended below
    await asyncio.gather(*(release_when_read(each, deadline) for each in list(connections())))
    socket.close_monitor()


async def _until(reached: Callable[[], bool], deadline: float) -> None:
    """Look until `reached`; the kernel sends no word when its queue is empty."""
    while True:
        if reached() or time.monotonic() >= deadline:
            return
        await asyncio.sleep(_POLL_SECONDS)
