"""libzmq's own reports about one socket's connections, read in the event loop.

Owns the monitor's PAIR socket.  Knows event numbers and descriptors, not what they mean to links:
that is for `zmq_autograd.transport.zmq_listener` and `zmq_autograd.transport.zmq_dialler`.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable
from typing import Final

import zmq

EVENTS: Final = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_MONITOR_STOPPED
)

_EVENT: Final = struct.Struct("=Hi")
_EVENTS_PER_TURN: Final = 64
_names = itertools.count()


class Monitor:
    """Reads the events of one socket until libzmq has taken that socket down."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        heard: Callable[[int, int], None],
    ) -> None:
        """Start to read.

        Args:
            context: where `socket` belongs.
            socket: to be watched; not bound or connected yet, so that nothing is missed.
            heard: called in the loop with an event's number and its value, a descriptor mostly.
        """
        self._loop = asyncio.get_running_loop()
        self._heard = heard
        self._closed = False
        name = f"inproc://monitor-{next(_names)}"
        socket.monitor(name, EVENTS)
        self._pair = context.socket(zmq.PAIR)
        # libzmq's I/O thread writes the events and would stand still at a high-water mark.
        self._pair.rcvhwm = 0
        self._pair.linger = 0
        self._pair.connect(name)
        self._fd = int(self._pair.fd)
        self._loop.add_reader(self._fd, self._drain_some)
        self._loop.call_soon(self._drain_some)

    def drain(self) -> None:
        """Hear everything that has been reported by now."""
        while self._hear_one():
            pass

    def _drain_some(self) -> None:
        for _ in range(_EVENTS_PER_TURN):
            if not self._hear_one():
                return
        # The descriptor shows an edge only: nothing else would bring us back here.
        self._loop.call_soon(self._drain_some)

    def _hear_one(self) -> bool:
        if self._closed:
            return False
        try:
            event, _endpoint = self._pair.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return False
        self._heard(*_EVENT.unpack(event))
        return True

    def close(self) -> None:
        """Stop to read.  Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._pair.close(0)
