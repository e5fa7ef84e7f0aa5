"""The accepting side over ZeroMQ: one ROUTER, and a link for each peer that says something.

Owns the bookkeeping between the three names of a peer: its connection's descriptor (in libzmq's
reports), its routing id (in messages) and its link.  A connection has no link before its first
message, so one that never speaks ZMTP costs a descriptor for a bounded time and nothing else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import zmq

from zmq_autograd.transport.base import LINGER_SECONDS, Accept
from zmq_autograd.transport.connection import Connection
from zmq_autograd.transport.guard import Guard
from zmq_autograd.transport.incoming import Received
from zmq_autograd.transport.zmq_closing import Closings, end_link, take_down
from zmq_autograd.transport.zmq_link import ZmqLink
from zmq_autograd.transport.zmq_socket import LoopSocket

MAX_UNADMITTED: Final = 128
"""Connections of one listener that may be unadmitted for long; beyond, the oldest are cut."""

PATIENCE_SECONDS: Final = 1.0
"""Seconds that each of them has in any case."""

_IPC: Final = "ipc://"

_ENDED: Final = "the connection was closed by the peer or broke"

END_SECONDS: Final = 0.5
"""Seconds after which the end of a connection is reported even on a listener that is never idle."""


class ZmqListener:
    """An open door; see `zmq_autograd.transport.base.Listener`."""

    def __init__(
        self,
        make_socket: Callable[[ZmqListener], LoopSocket],
        accept: Accept,
        guard: Guard,
        closings: Closings,
        gone: Callable[[ZmqListener], object],
    ) -> None:
        """Make the socket; `open` binds it.

        Args:
            make_socket: makes the ROUTER.
            accept: called with each new link.
            guard: is to watch the connections.
            closings: runs what takes links down.
            gone: called when nothing is left to close.
        """
        self._accept = accept
        self._guard = guard
        self._closings = closings
        self._gone = gone
        self._endpoint = ""
        # The file of an ``ipc://`` endpoint: its device and inode.
        self._file: tuple[int, int] | None = None
        self._closed = False
        # Connections that libzmq holds, by descriptor, and those of them not admitted, by age.
        self._connections: dict[int, Connection] = {}
        self._strangers: dict[Connection, None] = {}
        # When those who are too many are looked at again.
        self._bounding: asyncio.TimerHandle | None = None
        # Links by routing id, until their connection has ended, closed ones included: what still
        # comes from those is thrown away.
        self._links: dict[bytes, ZmqLink] = {}
        self._routes: dict[Connection, bytes] = {}
        # Connections that have ended but may have messages waiting in libzmq, and when they did.
        self._ending: dict[Connection, float] = {}
        # Connections whose link was made by a message that may have been another's: of an ended
        # one that had the same descriptor before.  Until all that had arrived is delivered.
        self._doubted: dict[Connection, Connection] = {}
        self._socket = make_socket(self)

    def open(self, address: str) -> None:
        """Bind to `address`."""
        self._endpoint = self._socket.bind(address)
        self._file = _identity(self._endpoint)

    @property
    def endpoint(self) -> str:
        """The endpoint with its real port, as a peer would dial it."""
        return self._endpoint

    def take_arrived(self) -> bool:
        """Deliver the messages that have arrived; True if none is left."""
        return self._socket.take_arrived()

    def close(self) -> None:
        """Accept no more and close all its links.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._bounding is not None:
            self._bounding.cancel()
        if self._file is not None and _identity(self._endpoint) == self._file:
            with suppress(OSError):  # somebody else was faster
                os.unlink(self._endpoint.removeprefix(_IPC))  # libzmq leaves it behind
        links = list(self._links.values())
        for link in links:
            link.close()
        deadline = time.monotonic() + LINGER_SECONDS
        self._closings.start(self._take_down(links, deadline), self._endpoint)

    def abandon(self) -> None:
        """Drop a socket that could not be bound."""
        self._closed = True
        self._socket.abandon()

    async def _take_down(self, links: list[ZmqLink], deadline: float) -> None:
        await take_down(
            self._socket,
            links=links,
            connections=self._connections.values,
            deadline=deadline,
        )
        for connection in self._connections.values():
            self._guard.forget(connection)
        self._connections.clear()
        self._links.clear()
        self._gone(self)

    # What the socket reports.

    def message_received(self, source: zmq.Frame | None, message: Received) -> None:
        """Pass a message on to its link, which is made with the first one."""
        if source is None:
            raise TypeError("source: expected the routing id of a ROUTER's message, got None")
        route = source.bytes
        link = self._links.get(route)
        if link is None:
            link = self._make_link(route, source)
            if link is None:
                return
        connection = link.connection
        connection.delivered_messages += 1
        connection.delivered_bytes += message.size
        link.received(message)
        if self._ending:
            self._report_overdue()

    def network_event(self, event: int, value: int) -> None:
        """Keep the table of connections; `value` is a descriptor."""
        if event == zmq.EVENT_ACCEPTED:
            if value in self._connections:
                self._ended(value)
            connection = Connection(value, self._is_ours)
            self._connections[value] = connection
            self._strangers[connection] = None
            self._guard.watch(connection, self)
            if self._bounding is None:
                self._bound_strangers()
        elif event == zmq.EVENT_DISCONNECTED:
            self._ended(value)

    def socket_idle(self) -> None:
        """Report the connections that have ended as lost: their last messages are delivered."""
        self._doubted.clear()
        while self._ending:
            self._report_end(next(iter(self._ending)))

    def cut(self, connection: Connection, reason: str) -> None:
        """End a connection that passes its bounds."""
        route = self._routes.get(connection)
        connection.abort()
        if route is not None:
            # The link stays in the table until libzmq has let go: what it still delivers from
            # this peer must not make a new one.
            self._links[route].lost(f"cut: it {reason}")

    def _make_link(self, route: bytes, source: zmq.Frame) -> ZmqLink | None:
        if self._closed:
            return None
        try:
            fd = int(source.get(zmq.SRCFD))
        except zmq.ZMQError:
            # A protocol older than ZMTP 3, for which libzmq takes whatever does not begin like
            # ZeroMQ. There is no telling whose it is; the guard soon cuts its connection.
            return None
        connection = self._find_connection(fd)
        if connection is None:
            return None
        address = connection.address or self._endpoint
        link = ZmqLink(self._socket, route, connection, address, self._close_link)
        self._links[route] = link
        self._routes[connection] = route
        try:
            link.handler = self._accept(link)
        finally:
            if link.handler is None:
                link.close()
        return link

    def _find_connection(self, fd: int) -> Connection | None:
        """Return the connection without a link whose first message has come by way of `fd`.

        The system may have given `fd` to the next connection since: that one is taken, in doubt.
        """
        self._socket.hear()  # of the connection, if it has only just been accepted
        live = self._connections.get(fd)
        # It may have ended before its first message was taken.
        unclaimed = (each for each in self._ending if each.fd == fd and each not in self._routes)
        ended = next(unclaimed, None)
        if live is not None and live not in self._routes:
            if ended is not None:
                self._doubted[live] = ended
            return live
        if ended is not None:
            return ended
        if live is not None:
            # The system gave the same descriptor to the next connection: the link that was taken
            # for this one's is its predecessor's.
            self._report_end(live)
        return live

    def _close_link(self, link: ZmqLink) -> None:
        if self._closed:
            return  # the socket's linger sees to all of them
        ended = self._doubted.pop(link.connection, None)
        if ended is not None:
            # What was no good was the ended connection's, or the guard will see to this one.
            link.connection.admitted = False
            self._routes[ended] = self._routes.pop(link.connection)
            return
        deadline = time.monotonic() + LINGER_SECONDS
        self._closings.start(end_link(link, deadline), link.address)

    def _ended(self, fd: int) -> None:
        connection = self._connections.pop(fd, None)
        if connection is None:
            return
        self._strangers.pop(connection, None)
        self._guard.forget(connection)
        self._ending[connection] = time.monotonic()
        self._socket.drain_soon()
        connection.release()

    def _report_end(self, connection: Connection) -> None:
        self._ending.pop(connection, None)
        route = self._routes.pop(connection, None)
        link = None if route is None else self._links.pop(route, None)
        if link is not None:
            link.lost(_ENDED)

    def _report_overdue(self) -> None:
        """Report ends though messages keep coming: from others, by now, since all have a turn."""
        overdue = time.monotonic() - END_SECONDS
        for connection, ended in self._ending.items():
            if ended < overdue and connection in self._routes:
                self._links[self._routes[connection]].lost(_ENDED)

    def _bound_strangers(self) -> None:
        self._bounding = None
        if self._closed or len(self._strangers) <= MAX_UNADMITTED:
            return
        for connection in [each for each in self._strangers if each.admitted]:
            del self._strangers[connection]
        long_ago = time.monotonic() - PATIENCE_SECONDS
        while len(self._strangers) > MAX_UNADMITTED:
            oldest = next(iter(self._strangers))
            if oldest.opened > long_ago:  # many at once, who have had no time to say who they are
                loop = asyncio.get_running_loop()
                self._bounding = loop.call_later(PATIENCE_SECONDS, self._bound_strangers)
                break
            del self._strangers[oldest]
            self._guard.forget(oldest)
            self.cut(oldest, f"was the oldest of over {MAX_UNADMITTED} that were not admitted")

    def _is_ours(self, accepted: socket.socket) -> bool:
        accepted.getpeername()  # fails unless connected
        name = accepted.getsockname()
        if isinstance(name, tuple):
            return self._endpoint.endswith(f":{name[1]}")
        return self._endpoint.startswith(_IPC)


def _identity(endpoint: str) -> tuple[int, int] | None:
    """Return which file an ``ipc://`` endpoint is, None if it is none."""
    path = endpoint.removeprefix(_IPC)
    if path == endpoint or path.startswith("@"):
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None  # somebody else has removed it
    return status.st_dev, status.st_ino
