"""The dialling side over ZeroMQ: one DEALER for each connection, made anew for each attempt.

A DEALER that reconnects would hand what was meant for one life of a peer to the next; these never
do.  Owns one attempt; the next one is made by `zmq_autograd.transport.zmq`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import zmq

from zmq_autograd.transport.base import LINGER_SECONDS, LinkHandler
from zmq_autograd.transport.connection import Connection
from zmq_autograd.transport.guard import Guard
from zmq_autograd.transport.incoming import Received
from zmq_autograd.transport.zmq_closing import Closings, take_down
from zmq_autograd.transport.zmq_link import ZmqLink
from zmq_autograd.transport.zmq_socket import LoopSocket

_FAILURES = {
    zmq.EVENT_CLOSED: "connection refused",
    zmq.EVENT_DISCONNECTED: "connection closed before the handshake was over",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "connection closed during the ZeroMQ handshake",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "what answers there does not speak ZeroMQ's protocol",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the key was refused",
}


class ZmqDialler:
    """One DEALER and, once connected, its link."""

    def __init__(
        self,
        make_socket: Callable[[ZmqDialler], LoopSocket],
        handler: LinkHandler,
        guard: Guard,
        closings: Closings,
        gone: Callable[[ZmqDialler], object],
    ) -> None:
        """Make the socket; `connect` does the rest.

        Args:
            make_socket: makes the DEALER.
            handler: will own the link.
            guard: is to watch the connection.
            closings: runs what takes the link down.
            gone: called when nothing is left to close.
        """
        self._handler = handler
        self._guard = guard
        self._closings = closings
        self._gone = gone
        self._endpoint = ""
        self._connection: Connection | None = None
        self._link: ZmqLink | None = None
        self._ended = False
        # Done when the attempt is over: why there is no link, empty if there is one.
        self._outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._socket = make_socket(self)

    async def connect(self, endpoint: str, address: str) -> ZmqLink | str:
        """Connect to `address`.

        Returns:
            The link, or why there is none; in that case, and when cancelled, nothing is left.
        """
        self._endpoint = endpoint
        link = None
        try:
            self._socket.connect(address)
            failure = await self._outcome
            link = self._link
        except zmq.ZMQError as error:
            failure = f"cannot connect: {error}"
        finally:
            if link is None:
                self._abandon()
        return failure if link is None else link

    def take_arrived(self) -> bool:
        """Deliver the messages that have arrived; True if none is left."""
        return self._socket.take_arrived()

    def close(self) -> None:
        """Close the link, or give up the attempt to make one.  Idempotent."""
        if self._link is not None:
            self._link.close()
        else:
            self._fail("the transport was closed")
            self._abandon()

    # What the socket reports.

    def message_received(self, source: zmq.Frame | None, message: Received) -> None:
        """Pass a message on."""
        if self._link is not None and self._connection is not None:
            self._connection.delivered_messages += 1
            self._connection.delivered_bytes += message.size
            self._link.received(message)

    def network_event(self, event: int, value: int) -> None:
        """Follow the one connection from its beginning to its end."""
        if event == zmq.EVENT_CONNECTED:
            self._connection = Connection(value, _is_connected)
            if self._connection.is_to_itself:  # nobody listens; TCP joined the two ends of this
                self._fail(_FAILURES[zmq.EVENT_CLOSED])
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._handshake_succeeded()
        elif event in _FAILURES:
            if self._link is None:
                self._fail(_FAILURES[zmq.Event(event)])
            else:
                self._ended = True
                self._socket.drain_soon()

    def socket_idle(self) -> None:
        """Report the link as lost if its connection has ended: its last message is delivered."""
        if self._ended and self._link is not None and not self._link.closed_here:
            self._lose("the connection was closed by the peer or broke")

    def cut(self, connection: Connection, reason: str) -> None:
        """End a connection that passes its bounds."""
        connection.abort()
        self._lose(f"cut: it {reason}")

    def _handshake_succeeded(self) -> None:
        if self._connection is None or self._outcome.done():
            return
        self._link = ZmqLink(self._socket, None, self._connection, self._endpoint, self._close_link)
        self._link.handler = self._handler
        self._guard.watch(self._connection, self)
        self._outcome.set_result("")
        self._socket.drain_soon()

    def _fail(self, reason: str) -> None:
        if not self._outcome.done():
            self._outcome.set_result(reason)

    def _close_link(self, link: ZmqLink) -> None:
        deadline = time.monotonic() + LINGER_SECONDS
        self._closings.start(self._take_down(link, deadline), link.address)

    async def _take_down(self, link: ZmqLink, deadline: float) -> None:
        await take_down(
            self._socket,
            links=[link],
            connections=lambda: [link.connection],
            deadline=deadline,
        )
        self._guard.forget(link.connection)
        self._gone(self)

    def _lose(self, reason: str) -> None:
        link, self._link = self._link, None
        self._abandon()
        if link is not None:
            link.lost(reason)

    def _abandon(self) -> None:
        """Drop everything at once.  Idempotent."""
        if self._link is not None:
            # Made, but nobody waited for it any more: nobody is to hear of it either.
            self._link.handler = None
            self._link = None
        self._socket.abandon()
        if self._connection is not None:
            self._guard.forget(self._connection)
            self._connection.release()
        self._gone(self)


def _is_connected(dialled: socket.socket) -> bool:
    dialled.getpeername()  # fails unless connected
    return True
