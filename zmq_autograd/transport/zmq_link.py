"""A link over ZeroMQ: one connection's queue towards its peer, and what its handler hears.

The same class serves both sides: on a listener many links share one ROUTER and each has a route,
a dialled link has a DEALER of its own.  Knows messages, not how connections begin or end: that is
for `zmq_autograd.transport.zmq_listener` and `zmq_autograd.transport.zmq_dialler`.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from zmq_autograd.transport.base import (
    HIGH_WATER_BYTES,
    Buffer,
    LinkClosed,
    LinkHandler,
    Silence,
)
from zmq_autograd.transport.connection import Connection
from zmq_autograd.transport.incoming import Received
from zmq_autograd.transport.outgoing import frame_sizes, hold
from zmq_autograd.transport.zmq_socket import LoopSocket

_MESSAGES_PER_FLUSH: Final = 256


class LinkState(enum.Enum):
    """OPEN, then CLOSED by this side or LOST by the other; never back."""

    OPEN = enum.auto()
    CLOSED = enum.auto()
    LOST = enum.auto()


class ZmqLink:
    """One connection to one peer; see `zmq_autograd.transport.base.Link`."""

    def __init__(
        self,
        socket: LoopSocket,
        route: bytes | None,
        connection: Connection,
        address: str,
        closing: Callable[[ZmqLink], None],
    ) -> None:
        """Begin in state OPEN, not admitted.

        Args:
            socket: what carries the frames.
            route: the peer's routing id on a ROUTER.
            connection: the network connection under it.
            address: the other end for people to read.
            closing: called once when this side closes the link: takes the connection down.
        """
        self.handler: LinkHandler | None = None
        self.connection = connection
        self._socket = socket
        self._route = route
        self._address = address
        self._closing = closing
        self._state = LinkState.OPEN
        # Messages that libzmq had no room for, in order, each with the sizes of its frames.
        self._queue: deque[tuple[list[Buffer], list[int]]] = deque()
        self._pending_bytes = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._last_received = time.monotonic()
        # Bytes handed to libzmq, in its framing, and those that it had written before any of them.
        self._wire_bytes = 0
        self._written_before = connection.written_bytes() or 0

    def __repr__(self) -> str:
        return f"<ZmqLink {self._address} {self._state.name.lower()}>"

    @property
    def address(self) -> str:
        """The other end for people to read."""
        return self._address

    @property
    def pending_bytes(self) -> int:
        """Bytes accepted by `send` that libzmq has not taken yet."""
        return self._pending_bytes

    @property
    def closed_here(self) -> bool:
        """Whether this side closed the link."""
        return self._state is LinkState.CLOSED

    @property
    def written(self) -> bool | None:
        """Whether all that was sent has reached the kernel; None where that cannot be seen."""
        if self._queue:
            return False
        if not self._wire_bytes:
            return True
        written = self.connection.written_bytes()
        return None if written is None else written - self._written_before >= self._wire_bytes

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue one message.

        Raises:
            LinkClosed: the link is closed or broken.
            TypeError, ValueError: a frame is no contiguous buffer, or there is none; nothing
                was sent.
        """
        if self._state is not LinkState.OPEN:
            raise LinkClosed(f"link to {self._address}: expected open, is {self._state.name}")
        sizes = frame_sizes(frames)
        if not self._queue:
            wire_bytes = self._socket.send(self._route, frames, sizes)
            if wire_bytes:
                self._wire_bytes += wire_bytes
                return
        self._queue.append((hold(frames), sizes))
        self._pending_bytes += sum(sizes)
        self._socket.flush_later(self)

    def flush(self) -> bool:
        """Send what was queued while libzmq takes it; True if nothing waits any more."""
        for _ in range(_MESSAGES_PER_FLUSH):
            if not self._queue:
                break
            frames, sizes = self._queue[0]
            try:
                wire_bytes = self._socket.send(self._route, frames, sizes)
            except LinkClosed:
                self._discard()  # that the connection is gone is reported to the owner next
                break
            if not wire_bytes:
                break
            self._wire_bytes += wire_bytes
            self._queue.popleft()
            self._pending_bytes -= sum(sizes)
        self._wake()
        return not self._queue

    async def drained(self) -> None:
        """Wait until less than `HIGH_WATER_BYTES` wait to be sent, or the link is gone."""
        while self._state is LinkState.OPEN and self._pending_bytes >= HIGH_WATER_BYTES:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def admit(self) -> None:
        """Lift the bounds for strangers: the peer has said who it is."""
        self.connection.admitted = True

    def silence(self) -> Silence:
        """Say for how long nothing has come; without TCP only whole messages are seen."""
        seen = self.connection.silence()
        if seen is not None:
            return seen
        return Silence(received=time.monotonic() - self._last_received, acknowledged=None)

    def close(self) -> None:
        """Close the link; what was queued has `LINGER_SECONDS` to leave.  Idempotent."""
        if self._state is LinkState.OPEN:
            self._state = LinkState.CLOSED
            self._wake()
            self._closing(self)

    def received(self, message: Received) -> None:
        """Pass on what came from the peer."""
        if self._state is not LinkState.OPEN or self.handler is None:
            return
        self._last_received = time.monotonic()
        if message.refusal is None:
            self.handler.frames_received(self, message.frames)
        else:
            self.handler.message_refused(self, message.refusal)

    def lost(self, reason: str) -> None:
        """The connection is gone: tell the handler, once, unless this side closed the link."""
        was_open = self._state is LinkState.OPEN
        if was_open:
            self._state = LinkState.LOST
        self._discard()
        self._wake()
        if was_open and self.handler is not None:
            self.handler.link_lost(self, reason)

    def _discard(self) -> None:
        self._queue.clear()
        self._pending_bytes = 0

    def _wake(self) -> None:
        if self._state is LinkState.OPEN and self._pending_bytes >= HIGH_WATER_BYTES:
            return
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
