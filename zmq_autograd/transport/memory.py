"""The transport inside one process, for ``memory://name``: the same contract without a network.

For tests of everything above, and for workers that share a process and a loop.  Every message is
copied once, so that a receiver's frames are its own as they are over a network.  `MemoryLink.cut`
and `MemoryLink.stall` do on purpose what networks do by accident.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from zmq_autograd.errors import ConfigurationError, WorkerLost
from zmq_autograd.transport.base import (
    HIGH_WATER_BYTES,
    UNADMITTED_BYTES,
    UNADMITTED_SECONDS,
    Accept,
    Buffer,
    LinkClosed,
    LinkHandler,
    Silence,
)
from zmq_autograd.transport.endpoints import Endpoint, parse_dialled, parse_endpoint
from zmq_autograd.transport.incoming import Incoming
from zmq_autograd.transport.outgoing import frame_sizes
from zmq_autograd.transport.retry import pauses
from zmq_autograd.wire.limits import DEFAULT_LIMITS, Limits

_MESSAGES_PER_TURN: Final = 32

_CLOSED_BY_PEER: Final = "the connection was closed by the peer or broke"

# Open doors of this process by name.
_listeners: dict[str, MemoryListener] = {}


class MemoryLink:
    """One end of a link in memory; see `zmq_autograd.transport.base.Link`."""

    def __init__(self, address: str, limits: Limits) -> None:
        """Make an end that is not joined to another yet.

        Args:
            address: the other end for people to read.
            limits: on what one incoming message may hold.
        """
        self.handler: LinkHandler | None = None
        self._loop = asyncio.get_running_loop()
        self._address = address
        self._incoming = Incoming(limits)
        self._peer: MemoryLink | None = None
        # Messages on their way to this end, in order, with their bytes.
        self._inbox: deque[tuple[list[memoryview], int]] = deque()
        self._inbox_bytes = 0
        self._scheduled = False
        self._stalled = False
        # Why the peer is gone: heard once the inbox is empty.
        self._end_reason: str | None = None
        self._open = True
        self._received_bytes = 0
        self._last_received = time.monotonic()
        self._waiters: list[asyncio.Future[None]] = []
        self._stranger_timer: asyncio.TimerHandle | None = self._loop.call_later(
            UNADMITTED_SECONDS,
            self._refuse_stranger,
            f"was not admitted within {UNADMITTED_SECONDS:g} s",
        )

    def __repr__(self) -> str:
        return f"<MemoryLink {self._address} {'open' if self._open else 'gone'}>"

    def join(self, peer: MemoryLink) -> None:
        """Make this and `peer` the two ends of one link."""
        self._peer, peer._peer = peer, self

    @property
    def address(self) -> str:
        """The other end for people to read."""
        return self._address

    @property
    def pending_bytes(self) -> int:
        """Bytes accepted by `send` that have not been delivered yet."""
        return 0 if self._peer is None else self._peer._inbox_bytes

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue one message.

        Raises:
            LinkClosed: the link is closed or broken.
            TypeError, ValueError: a frame is no contiguous buffer, or there is none.
        """
        peer = self._peer
        if not self._open or peer is None:
            raise LinkClosed(f"link to {self._address}: expected open, is gone")
        size = sum(frame_sizes(frames))
        copies = [memoryview(bytearray(frame)) for frame in frames]
        peer._inbox.append((copies, size))
        peer._inbox_bytes += size
        peer._deliver_soon()

    async def drained(self) -> None:
        """Wait until less than `HIGH_WATER_BYTES` wait to be delivered, or the link is gone."""
        while self._open and self.pending_bytes >= HIGH_WATER_BYTES:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def admit(self) -> None:
        """Lift the bounds for strangers: the peer has said who it is."""
        if self._stranger_timer is not None:
            self._stranger_timer.cancel()
            self._stranger_timer = None

    def silence(self) -> Silence:
        """Say for how long nothing has come from the peer."""
        return Silence(received=time.monotonic() - self._last_received, acknowledged=None)

    def close(self) -> None:
        """Close the link; what was sent still arrives.  Idempotent."""
        self._go(_CLOSED_BY_PEER)

    def cut(self, reason: str = _CLOSED_BY_PEER) -> None:
        """Break the link as a network would: both ends lose it, what was under way is lost."""
        peer = self._peer
        for end in (self, peer):
            if end is not None:
                end._clear_inbox()
                end._end(reason)
                end._stalled = False

    def stall(self) -> None:
        """Deliver nothing at this end until `resume`."""
        self._stalled = True

    def resume(self) -> None:
        """Deliver again, beginning with what has come in between."""
        self._stalled = False
        self._deliver_soon()

    def _deliver_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        try:
            for _ in range(_MESSAGES_PER_TURN):
                if not self._inbox or self._stalled or not self._open:
                    break
                self._deliver_one()
        finally:
            if self._peer is not None:
                self._peer._wake()
            if self._inbox and self._open and not self._stalled:
                self._deliver_soon()
        if self._open and not self._inbox and self._end_reason is not None:
            self._lose(self._end_reason)

    def _deliver_one(self) -> None:
        frames, size = self._inbox.popleft()
        self._inbox_bytes -= size
        self._received_bytes += size
        self._last_received = time.monotonic()
        for frame in frames:
            if self._incoming.accepts(len(frame)):
                self._incoming.keep(frame)
        message = self._incoming.finish()
        if self.handler is None:
            return
        if message.refusal is None:
            self.handler.frames_received(self, message.frames)
        else:
            self.handler.message_refused(self, message.refusal)
        if self._stranger_timer is not None and self._received_bytes > UNADMITTED_BYTES:
            self._refuse_stranger(
                f"sent {self._received_bytes} bytes before it was admitted, "
                f"at most {UNADMITTED_BYTES}"
            )

    def _refuse_stranger(self, reason: str) -> None:
        if self._open:
            self._lose(f"cut: it {reason}")

    def _lose(self, reason: str) -> None:
        self._go(_CLOSED_BY_PEER)
        if self.handler is not None:
            self.handler.link_lost(self, reason)

    def _go(self, reason_for_peer: str) -> None:
        if not self._open:
            return
        self._open = False
        self.admit()  # its timer is not needed any more
        self._clear_inbox()
        self._wake()
        if self._peer is not None:
            self._peer._end(reason_for_peer)

    def _end(self, reason: str) -> None:
        """Hear that nothing more will come."""
        if self._end_reason is None:
            self._end_reason = reason
        self._deliver_soon()

    def _clear_inbox(self) -> None:
        self._inbox.clear()
        self._inbox_bytes = 0
        if self._peer is not None:
            self._peer._wake()

    def _wake(self) -> None:
        if self._open and self.pending_bytes >= HIGH_WATER_BYTES:
            return
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


class MemoryListener:
    """An open door; see `zmq_autograd.transport.base.Listener`."""

    def __init__(self, endpoint: Endpoint, accept: Accept, limits: Limits) -> None:
        """Open it under its name."""
        self._endpoint = endpoint
        self._accept = accept
        self._limits = limits
        self._links: list[MemoryLink] = []
        _listeners[endpoint.host] = self

    @property
    def endpoint(self) -> str:
        """The endpoint, as a peer would dial it."""
        return self._endpoint.text

    def connect(self, dialled: MemoryLink) -> None:
        """Make the other end of `dialled`."""
        link = MemoryLink(f"{self._endpoint.text}#{id(dialled):x}", self._limits)
        link.join(dialled)
        self._links = [each for each in self._links if each._open]
        self._links.append(link)
        link.handler = self._accept(link)

    def close(self) -> None:
        """Accept no more and close all its links.  Idempotent."""
        if _listeners.get(self._endpoint.host) is self:
            del _listeners[self._endpoint.host]
        for link in self._links:
            link.close()
        self._links.clear()


class MemoryTransport:
    """Links in memory; see `zmq_autograd.transport.base.Transport`."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        """Open nothing yet.

        Args:
            limits: on what one incoming message may hold.
        """
        self._limits = limits
        self._listeners: list[MemoryListener] = []
        self._links: list[MemoryLink] = []
        self._closed = False

    async def listen(self, endpoint: str, accept: Accept) -> MemoryListener:
        """Open `endpoint`.

        Raises:
            ConfigurationError: the endpoint is malformed, or its name is taken in this process.
        """
        self._check_open()
        parsed = _parse_memory(parse_endpoint(endpoint))
        if parsed.host in _listeners:
            raise ConfigurationError(f"cannot listen at {endpoint!r}: address already in use")
        listener = MemoryListener(parsed, accept, self._limits)
        self._listeners.append(listener)
        return listener

    async def dial(self, endpoint: str, handler: LinkHandler, timeout: float | None) -> MemoryLink:
        """Connect to `endpoint`, trying again until `timeout` seconds are over.

        Raises:
            ConfigurationError: the endpoint is malformed.
            WorkerLost: nobody listened there in time.

        Cancelling it leaves nothing behind.
        """
        self._check_open()
        parsed = _parse_memory(parse_dialled(endpoint))
        try:
            async with asyncio.timeout(timeout):
                for pause in pauses():
                    if parsed.host in _listeners or self._closed:
                        break
                    await asyncio.sleep(pause)
        except TimeoutError as error:
            reason = f"connection refused, tried for {timeout:g} s"
            raise WorkerLost(endpoint, reason=reason) from error
        if self._closed:
            raise WorkerLost(endpoint, reason="the transport was closed")
        link = MemoryLink(endpoint, self._limits)
        link.handler = handler
        self._links = [each for each in self._links if each._open]
        self._links.append(link)
        _listeners[parsed.host].connect(link)
        return link

    async def close(self) -> None:
        """Close every link and listener."""
        self._closed = True
        for listener in self._listeners:
            listener.close()
        for link in self._links:
            link.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigurationError("transport: expected open, is closed")


def _parse_memory(endpoint: Endpoint) -> Endpoint:
    if endpoint.scheme != "memory":
        raise ConfigurationError(f"endpoint {endpoint.text!r}: expected memory://name")
    return endpoint
