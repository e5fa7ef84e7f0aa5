"""How links and sockets of ZeroMQ end: what was queued leaves first, within a bound of time.

Owns the order of closing.  libzmq closes its descriptor without caring for what the peer is still
sending: the kernel then resets the connection, throws away what was written and not acknowledged,
and the peer's libzmq what it has not read.  The duplicate of the descriptor in `Connection` is
therefore held until the peer has everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final

from zmq_autograd.transport.connection import Connection
from zmq_autograd.transport.zmq_link import ZmqLink
from zmq_autograd.transport.zmq_socket import LoopSocket

_POLL_SECONDS: Final = 0.005

_ABORT_SECONDS: Final = 0.25
"""Seconds for libzmq to see that its connections were ended under it."""

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


async def end_link(link: ZmqLink, deadline: float) -> None:
    """End the connection of an accepted link when libzmq has written all that was sent.

    The peer hears the end behind the last message and ends its side, whereupon libzmq here lets go
    and the owner releases the connection.

    Args:
        link: the link, which takes no new messages any more.
        deadline: when to end it at the latest, on the monotonic clock.
    """
    connection = link.connection
    quiet = 0
    while time.monotonic() < deadline and connection.held:
        written = link.written
        # A Unix socket counts nothing, but what its peer has not read yet can be seen.
        empty = written is None and connection.unread_bytes() == 0
        quiet = quiet + 1 if empty else 0
        if written or quiet >= _QUIET_POLLS:
            break
        await asyncio.sleep(_POLL_SECONDS)
    connection.finish()
    await _until(lambda: not connection.held, deadline)
    connection.abort()


async def _release(connection: Connection, deadline: float) -> None:
    """Let go of a connection that libzmq has let go of, when the peer has all of it."""
    connection.finish()
    await _until(connection.read_to_end, deadline)
    connection.release()


async def take_down(
    socket: LoopSocket,
    links: Sequence[ZmqLink],
    connections: Callable[[], Iterable[Connection]],
    deadline: float,
) -> None:
    """Close a socket with all its connections.

    Args:
        socket: to be closed.
        links: its links, which take no new messages any more.
        connections: those that are left.
        deadline: when to be done with what was queued at the latest, on the monotonic clock.
    """
    await _until(lambda: not any(link.pending_bytes for link in links), deadline)
    left = max(0.0, deadline - time.monotonic())
    # Where nothing is left to be written, libzmq need not wait: now and then it would, in vain.
    socket.close(0 if all(link.written for link in links) else left)
    if not await _is_gone(socket, left + _POLL_SECONDS):
        # libzmq is still at it though its linger is over.
        for connection in list(connections()):
            connection.abort()
        await _is_gone(socket, _ABORT_SECONDS)
    await asyncio.gather(*(_release(each, deadline) for each in list(connections())))


async def _is_gone(socket: LoopSocket, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await socket.gone.wait()
    except TimeoutError:
        return False
    return True


async def _until(reached: Callable[[], bool], deadline: float) -> None:
    """Look until `reached`; the kernel sends no word when its queue is empty."""
    while True:
        if reached() or time.monotonic() >= deadline:
            return
        await asyncio.sleep(_POLL_SECONDS)
