"""Bounds on what a peer may have under way: libzmq shows a message only when all of it is there.

Looks at every connection some times a second and compares the kernel's count of received bytes
with what has come out of libzmq.  Owns the bounds and the timer, not the connections; what it
cuts, the owner of the socket hears of as a disconnection.

A message begun and never ended is seen as bytes that keep coming while nothing is delivered.
Whenever a whole message has been delivered and the socket was found empty afterwards, what had
come by then counts as delivered: so nothing that is merely waiting its turn is ever held against a
peer, and what is forgotten is at most what comes between two looks.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from zmq_autograd.transport.base import UNADMITTED_BYTES, UNADMITTED_SECONDS
from zmq_autograd.transport.connection import Connection
from zmq_autograd.wire.limits import MIB, Limits

STRANGER_LOOK_SECONDS: Final = 0.02
"""Seconds between two looks while a peer is not admitted yet."""

LOOK_SECONDS: Final = 0.1
"""Seconds between two looks at admitted peers."""

SLACK_BYTES: Final = 8 * MIB
"""Bytes beyond one message that an admitted peer may have under way: framing and what the kernel
holds unread."""


class Guarded(Protocol):
    """A connection's owner, seen from the guard."""

    def take_arrived(self) -> bool:
        """Deliver the messages that have arrived; True if none is left."""

    def cut(self, connection: Connection, reason: str) -> None:
        """End the connection and tell whom it concerns."""


class Guard:
    """Watches connections while there are any."""

    def __init__(self, limits: Limits) -> None:
        self._limit_bytes = limits.header_bytes + limits.message_bytes + SLACK_BYTES
        self._watched: dict[Connection, Guarded] = {}
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, connection: Connection, owner: Guarded) -> None:
        """Look at `connection` from now on."""
        self._watched[connection] = owner
        self._set_timer(STRANGER_LOOK_SECONDS)

    def forget(self, connection: Connection) -> None:
        """Look at `connection` no more.  Idempotent."""
        self._watched.pop(connection, None)
        if not self._watched and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        strangers = any(not each.admitted for each in self._watched)
        try:
            self._look_at_all(time.monotonic())
        finally:
            if self._watched:
                self._set_timer(STRANGER_LOOK_SECONDS if strangers else LOOK_SECONDS)

    def _look_at_all(self, now: float) -> None:
        # Whether all that had arrived was delivered, by owner.
        settled: dict[Guarded, bool] = {}
        for connection, owner in list(self._watched.items()):
            if connection.admitted:
                if owner not in settled:
                    settled[owner] = owner.take_arrived()
                reason = self._look_at_admitted(connection) if settled[owner] else None
            else:
                reason = self._look_at_stranger(connection, now)
            if reason is not None and connection in self._watched:
                self.forget(connection)
                owner.cut(connection, reason)

    def _look_at_stranger(self, connection: Connection, now: float) -> str | None:
        received = connection.received_bytes()
        if received is None:
            received = connection.delivered_bytes
        if received > UNADMITTED_BYTES:
            return f"sent {received} bytes before it was admitted, at most {UNADMITTED_BYTES}"
        if now - connection.opened > UNADMITTED_SECONDS:
            return f"was not admitted within {UNADMITTED_SECONDS:g} s"
        return None

    def _look_at_admitted(self, connection: Connection) -> str | None:
        received = connection.received_bytes()
        if received is None:
            return None
        if connection.delivered_messages != connection.settled_messages:
            connection.settled_messages = connection.delivered_messages
            connection.settled_bytes = received
        under_way = received - connection.settled_bytes
        if under_way > self._limit_bytes:
            return f"has a message of over {under_way} bytes under way, at most {self._limit_bytes}"
        return None
