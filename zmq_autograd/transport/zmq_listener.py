"""The accepting side over ZeroMQ: one ROUTER, and a link for each peer that says something.

Owns the bookkeeping between the three names of a peer: its connection's descriptor (in libzmq's
reports), its routing id (in messages) and its link.  A connection has no link before its first
message, so one that never speaks ZMTP costs a descriptor for a bounded time and nothing else.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

import zmq

from zmq_autograd.transport.base import LINGER_SECONDS, Accept
from zmq_autograd.transport.connection import Connection
from zmq_autograd.transport.guard import Guard
from zmq_autograd.transport.incoming import Received
from zmq_autograd.transport.zmq_closing import (
    Closings,
    end_when_written,
    release_when_read,
    take_down,
)
from zmq_autograd.transport.zmq_link import ZmqLink
from zmq_autograd.transport.zmq_socket import LoopSocket

MAX_UNADMITTED: Final = 128
"""Connections of one listener that may be unadmitted at once; beyond, the oldest are cut."""


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
        self._closed = False
        # Connections that libzmq holds, by descriptor, and those of them not admitted, by age.
        self._connections: dict[int, Connection] = {}
        self._strangers: dict[Connection, None] = {}
        # Links by routing id, until their connection has ended, closed ones included: what still
        # comes from those is thrown away.
        self._links: dict[bytes, ZmqLink] = {}
        self._routes: dict[Connection, bytes] = {}
        # Connections that have ended but may have messages waiting in libzmq.
        self._ending: list[Connection] = []
        self._socket = make_socket(self)

    def open(self, address: str) -> None:
        """Bind to `address`."""
        self._endpoint = self._socket.bind(address)

    @property
    def endpoint(self) -> str:
        """The endpoint with its real port, as a peer would dial it."""
        return self._endpoint

    @property
    def idle_count(self) -> int:
        """How often everything that had arrived was taken."""
        return self._socket.idle_count

    def close(self) -> None:
        """Accept no more and close all its links.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        links = list(self._links.values())
        for link in links:
            link.close()
        deadline = time.monotonic() + LINGER_SECONDS
        self._closings.start(self._take_down(links, deadline), self._endpoint)

    def abandon(self) -> None:
        """Drop a socket that could not be bound."""
        self._closed = True
        self._socket.close(0)
        self._socket.close_monitor()

    async def _take_down(self, links: list[ZmqLink], deadline: float) -> None:
        await take_down(
            self._socket,
            waiting=lambda: any(link.pending_bytes for link in links),
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
            link = self._make_link(route, int(source.get(zmq.SRCFD)))
            if link is None:
                return
        connection = link.connection
        connection.delivered_messages += 1
        connection.delivered_bytes += message.size
        link.received(message)

    def network_event(self, event: int, value: int) -> None:
        """Keep the table of connections; `value` is a descriptor."""
        if event == zmq.EVENT_ACCEPTED:
            if value in self._connections:
                self._ended(value)
            connection = Connection(value, self._is_ours)
            self._connections[value] = connection
            self._strangers[connection] = None
            self._guard.watch(connection, self)
            self._bound_strangers()
        elif event == zmq.EVENT_DISCONNECTED:
            self._ended(value)

    def socket_idle(self) -> None:
        """Report the connections that have ended as lost: their last messages are delivered."""
        ending, self._ending = self._ending, []
        for connection in ending:
            self._forget_link(connection, "the connection was closed by the peer or broke")

    def cut(self, connection: Connection, reason: str) -> None:
        """End a connection that passes its bounds."""
        route = self._routes.get(connection)
        connection.end()
        if route is not None:
            # The link stays in the table until libzmq has let go: what it still delivers from
            # this peer must not make a new one.
            self._links[route].lost(f"cut: it {reason}")

    def _make_link(self, route: bytes, fd: int) -> ZmqLink | None:
        if self._closed:
            return None
        self._socket.hear()  # of the connection, if that has only just been accepted
        connection = self._connections.get(fd)
        if connection is None:
            # It ended before its first message was taken.
            unclaimed = (each for each in self._ending if each not in self._routes)
            connection = next((each for each in unclaimed if each.fd == fd), None)
            if connection is None:
                return None
        elif connection in self._routes:
            # The descriptor was used again: whose route this was is gone.
            self._forget_link(connection, "the connection was closed by the peer or broke")
        address = connection.address or self._endpoint
        link = ZmqLink(self._socket, route, connection, address, self._close_link)
        self._links[route] = link
        self._routes[connection] = route
        link.handler = self._accept(link)
        return link

    def _close_link(self, link: ZmqLink) -> None:
        if self._closed:
            return  # the socket's linger sees to all of them
        if link.written:
            link.connection.end()
        else:
            deadline = time.monotonic() + LINGER_SECONDS
            self._closings.start(end_when_written(link, deadline), link.address)

    def _ended(self, fd: int) -> None:
        connection = self._connections.pop(fd, None)
        if connection is None:
            return
        self._strangers.pop(connection, None)
        self._guard.forget(connection)
        self._ending.append(connection)
        self._socket.drain_soon()
        route = self._routes.get(connection)
        if route is not None and self._links[route].closed_here and connection.unread_bytes():
            deadline = time.monotonic() + LINGER_SECONDS
            self._closings.start(release_when_read(connection, deadline), connection.address)
        else:
            connection.release()

    def _forget_link(self, connection: Connection, reason: str) -> None:
        route = self._routes.pop(connection, None)
        link = None if route is None else self._links.pop(route, None)
        if link is not None:
            link.lost(reason)

    def _bound_strangers(self) -> None:
        if len(self._strangers) <= MAX_UNADMITTED:
            return
        for connection in [each for each in self._strangers if each.admitted]:
            del self._strangers[connection]
        while len(self._strangers) > MAX_UNADMITTED:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self._guard.forget(oldest)
            self.cut(oldest, f"was the oldest of over {MAX_UNADMITTED} that were not admitted")

    def _is_ours(self, accepted: socket.socket) -> bool:
        accepted.getpeername()  # fails unless connected
        name = accepted.getsockname()
        if isinstance(name, tuple):
            return self._endpoint.endswith(f":{name[1]}")
        return self._endpoint.startswith("ipc://")
