"""A ZeroMQ socket driven straight from the event loop by its file descriptor.

Owns one socket and its monitor: receives in bounded slices of time, sends without waiting, and
remembers who waits to send.  Knows neither links nor handlers, which are its `SocketOwner`'s.  Two
rules of libzmq shape it:

1. The descriptor shows edges: after one, everything has to be taken until libzmq says EAGAIN.
2. A send may take the edge with it: after every send, receiving is tried again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import zmq

from zmq_autograd.transport.base import Buffer, LinkClosed
from zmq_autograd.transport.incoming import Incoming, Received
from zmq_autograd.transport.monitor import Monitor
from zmq_autograd.wire.limits import KIB, Limits

COPY_THRESHOLD: Final = 128 * KIB
"""Bytes of a frame from which its memory is handed to libzmq instead of a copy."""

SLICE_SECONDS: Final = 0.005
"""Seconds that one socket may keep the event loop before others have a turn."""

# Plain numbers: combining pyzmq's enums costs a microsecond each time.
_DONTWAIT: Final = int(zmq.DONTWAIT)
_SNDMORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)


class SocketOwner(Protocol):
    """Who owns a socket hears of it."""

    def message_received(self, source: zmq.Frame | None, message: Received) -> None:
        """Take a message, whole or refused; source: the routing id's frame, None on a DEALER."""

    def network_event(self, event: int, value: int) -> None:
        """Hear what libzmq reports about connections."""

    def socket_idle(self) -> None:
        """Hear that everything which had arrived has been taken."""


class Sender(Protocol):
    """Who has something queued for a socket that was full."""

    def flush(self) -> bool:
        """Send what can be sent; True if nothing waits any more."""


class LoopSocket:
    """One ROUTER or DEALER in the event loop."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        options: Mapping[zmq.SocketOption, int],
        limits: Limits,
        owner: SocketOwner,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(kind)
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._owner = owner
        self._routed = kind == zmq.ROUTER
        self._incoming = Incoming(limits)
        # The routing id's frame of the message that is being received, None between messages.
        self._source: zmq.Frame | None = None
        # Senders that found their queue full, in order; they are tried again with each drain.
        self._senders: dict[Sender, None] = {}
        self._draining = False
        self._scheduled = False
        self._closed = False
        self._monitor = Monitor(context, self._socket, self._heard)
        # Set when libzmq has taken the closed socket down and with it all its connections.
        self.gone = asyncio.Event()
        self._fd = int(self._socket.fd)
        self._loop.add_reader(self._fd, self._drain)

    def bind(self, address: str) -> str:
        """Bind to `address` and return it with its real port."""
        self._socket.bind(address)
        self.drain_soon()
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def connect(self, address: str) -> None:
        """Start to connect to `address`."""
        self._socket.connect(address)
        self.drain_soon()

    def send(self, route: bytes | None, frames: Sequence[Buffer], sizes: Sequence[int]) -> int:
        """Hand a message to libzmq.

        Args:
            route: routing id of the peer on a ROUTER.
            frames: contiguous buffers, at least one.
            sizes: their bytes.

        Returns:
            Its bytes in the network's framing, 0 if the queue of that peer is full.

        Raises:
            LinkClosed: libzmq knows no such peer any more.
        """
        if self._closed:
            raise LinkClosed("the socket is closed")
        send = self._socket.send
        wire_bytes = 0
        left = len(sizes)
        try:
            if route is not None:
                send(route, _SNDMORE)
            for frame, size in zip(frames, sizes, strict=True):
                left -= 1
                wire_bytes += size + (2 if size < 256 else 9)
                flags = _SNDMORE if left else _DONTWAIT
                if size < COPY_THRESHOLD:
                    send(frame, flags)
                else:
                    send(frame, flags, copy=not memoryview(frame).readonly)
        except zmq.Again:
            return 0
        except zmq.ZMQError as error:
            raise LinkClosed(f"cannot send: {error}") from error
        finally:
            self.drain_soon()
        return wire_bytes

    def flush_later(self, sender: Sender) -> None:
        """Call `sender` to flush when libzmq may have room again."""
        self._senders[sender] = None

    def drain_soon(self) -> None:
        """Look for messages at the loop's next turn."""
        if not (self._draining or self._scheduled or self._closed):
            self._scheduled = True
            self._loop.call_soon(self._drain_as_scheduled)

    def take_arrived(self) -> bool:
        """Deliver the messages that have arrived, for one slice of time; True if none is left."""
        return not self._draining and self._drain()

    def hear(self) -> None:
        """Hear at once what libzmq has reported by now."""
        self._monitor.drain()

    def close(self, linger: float) -> None:
        """Close the socket; its monitor goes on until libzmq is done, which sets `gone`.

        Idempotent.

        Args:
            linger: seconds that libzmq may take to hand what it has queued to the network.
        """
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._senders.clear()
            self._socket.close(int(linger * 1000))

    def abandon(self) -> None:
        """Close the socket and its monitor with all that is queued, unless it is closed already."""
        if not self._closed:
            # First of all: libzmq's I/O thread, and all connections with it, would stand still
            # over the next event if the monitor's other end were closed before this one.
            self._socket.disable_monitor()
            self.close(0)
            self.stop_hearing()

    def stop_hearing(self) -> None:
        """Close the monitor; only for when libzmq reports nothing more or is about to be ended."""
        self._monitor.close()
        self.gone.set()

    def _heard(self, event: int, value: int) -> None:
        if event == zmq.EVENT_MONITOR_STOPPED:
            self.stop_hearing()
        else:
            self._owner.network_event(event, value)

    def _drain_as_scheduled(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> bool:
        """Receive and send for one slice of time; True if nothing is left to be received."""
        if self._closed:
            return True
        self._draining = True
        idle = False
        try:
            idle = self._receive(time.monotonic() + SLICE_SECONDS)
        finally:
            self._draining = False
            if not idle:
                self.drain_soon()
        if self._senders:
            self._flush()
        if idle and not self._closed:
            self._owner.socket_idle()
        return idle

    def _receive(self, deadline: float) -> bool:
        """Take frames until none is left, which returns True, or time is up."""
        receive, now = self._socket.recv, time.monotonic
        while not self._closed:
            try:
                frame = receive(_DONTWAIT, False)
            except zmq.Again:
                return True
            self._take(frame)
            if now() > deadline:
                return False
        return False

    def _take(self, frame: zmq.Frame) -> None:
        if self._routed and self._source is None:
            self._source = frame
            return
        if self._incoming.accepts(len(frame)):
            self._incoming.keep(frame.buffer)
        if not frame.more:
            source, self._source = self._source, None
            self._owner.message_received(source, self._incoming.finish())

    def _flush(self) -> None:
        for sender in list(self._senders):
            if sender.flush():
                self._senders.pop(sender, None)
