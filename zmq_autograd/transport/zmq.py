"""The transport over ZeroMQ, for ``tcp://`` and ``ipc://``.

Owns the ZeroMQ context, the sockets' options and the repeated attempts of `ZmqTransport.dial`.
Everything runs in the event loop's thread; libzmq's own thread moves the bytes.  Read on in
`zmq_autograd.transport.zmq_socket`, `zmq_autograd.transport.zmq_listener` and
`zmq_autograd.transport.zmq_dialler`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import stat
import threading
from typing import Final

import zmq

from zmq_autograd.errors import ConfigurationError, WorkerLost
from zmq_autograd.transport.base import (
    LINGER_SECONDS,
    UNADMITTED_SECONDS,
    Accept,
    LinkHandler,
)
from zmq_autograd.transport.endpoints import (
    WILDCARD,
    Endpoint,
    parse_dialled,
    parse_endpoint,
    tcp_endpoint,
)
from zmq_autograd.transport.guard import Guard
from zmq_autograd.transport.retry import pauses
from zmq_autograd.transport.zmq_closing import Closings
from zmq_autograd.transport.zmq_dialler import ZmqDialler
from zmq_autograd.transport.zmq_link import ZmqLink
from zmq_autograd.transport.zmq_listener import ZmqListener
from zmq_autograd.transport.zmq_socket import LoopSocket, SocketOwner
from zmq_autograd.wire.limits import DEFAULT_LIMITS, Limits

MAX_SOCKETS: Final = 16384
"""Sockets of one context; a dialled link takes three."""

HIGH_WATER_MESSAGES: Final = 64
"""Whole messages of one peer that libzmq holds in each direction; more wait in the link or, on
the way in, in the peer's network."""

_TRANSPORT_CLOSED: Final = "the transport was closed"

ATTEMPT_SECONDS: Final = 5.0
"""Seconds that one attempt to connect may take."""


class ZmqTransport:
    """Links over ZeroMQ; see `zmq_autograd.transport.base.Transport`."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        """Open nothing yet.

        Args:
            limits: on what one incoming message may hold.
        """
        self._limits = limits
        self._guard = Guard(limits)
        self._closings = Closings()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._listeners: dict[ZmqListener, None] = {}
        self._diallers: dict[ZmqDialler, None] = {}
        self._sockets: list[LoopSocket] = []
        self._closed = False

    async def listen(self, endpoint: str, accept: Accept) -> ZmqListener:
        """Open `endpoint`; port 0 or ``*`` takes a free port.

        Raises:
            ConfigurationError: the endpoint is malformed or cannot be bound.
        """
        self._check_open()
        parsed = parse_endpoint(endpoint)
        if parsed.scheme == "ipc":
            _check_path_is_free(parsed)
        try:
            address = (await _addresses(parsed))[0]
        except OSError as error:
            raise ConfigurationError(f"cannot listen at {endpoint!r}: {error}") from error
        self._check_open()
        listener = ZmqListener(
            lambda owner: self._make_socket(zmq.ROUTER, owner, ipv6=address.startswith("tcp://[")),
            accept,
            self._guard,
            self._closings,
            gone=lambda listener: self._listeners.pop(listener, None),
        )
        try:
            listener.open(address)
        except zmq.ZMQError as error:
            listener.abandon()
            raise ConfigurationError(f"cannot listen at {endpoint!r}: {error}") from error
        self._listeners[listener] = None
        return listener

    async def dial(self, endpoint: str, handler: LinkHandler, timeout: float | None) -> ZmqLink:
        """Connect to `endpoint`, trying again until `timeout` seconds are over.

        What the peer sends at once may reach `handler` before this returns.

        Raises:
            ConfigurationError: the endpoint is malformed.
            WorkerLost: nobody answered there in time; the reason says what was seen.

        Cancelling it leaves nothing behind.
        """
        self._check_open()
        parsed = parse_dialled(endpoint)
        seen = "no answer"
        try:
            async with asyncio.timeout(timeout):
                for attempt, pause in enumerate(pauses()):
                    outcome = await self._attempt(parsed, handler, attempt)
                    if isinstance(outcome, ZmqLink):
                        return outcome
                    seen = outcome
                    if self._closed:
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            seen += f", tried for {timeout:g} s"
        raise WorkerLost(endpoint, reason=seen)

    async def close(self) -> None:
        """Close every link and listener; returns within `LINGER_SECONDS` plus a second."""
        self._closed = True
        for listener in list(self._listeners):
            listener.close()
        for dialler in list(self._diallers):
            dialler.close()
        await self._closings.join()
        context, self._context = self._context, None
        for each in self._sockets:
            each.stop_hearing()  # of sockets, if any, that libzmq did not take down in time
        self._sockets.clear()
        if context is not None:
            await _terminate(context)

    async def _attempt(self, parsed: Endpoint, handler: LinkHandler, attempt: int) -> ZmqLink | str:
        try:
            addresses = await _addresses(parsed)
        except OSError as error:
            return f"cannot resolve {parsed.host}: {error}"
        if self._closed:
            return _TRANSPORT_CLOSED
        address = addresses[attempt % len(addresses)]
        try:
            dialler = ZmqDialler(
                lambda owner: self._make_socket(zmq.DEALER, owner, ipv6="[" in address),
                handler,
                self._guard,
                self._closings,
                gone=lambda dialler: self._diallers.pop(dialler, None),
            )
        except zmq.ZMQError as error:  # out of descriptors
            return f"cannot open a socket: {error}"
        self._diallers[dialler] = None
        return await dialler.connect(parsed.text, address)

    def _make_socket(self, kind: int, owner: SocketOwner, *, ipv6: bool) -> LoopSocket:
        if self._context is None:
            self._context = zmq.Context(io_threads=1)
            self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        limits = self._limits
        options = {
            zmq.IPV6: int(ipv6),
            zmq.LINGER: int(LINGER_SECONDS * 1000),
            zmq.MAXMSGSIZE: max(limits.header_bytes, limits.frame_bytes),
            zmq.HANDSHAKE_IVL: int(UNADMITTED_SECONDS * 1000),
            zmq.SNDHWM: HIGH_WATER_MESSAGES,
            zmq.RCVHWM: HIGH_WATER_MESSAGES,
        }
        if kind == zmq.ROUTER:
            # An unknown or full peer is an error to be seen, not a message silently dropped; and
            # nobody takes over another one's connection by its routing id.
            options |= {zmq.ROUTER_MANDATORY: 1, zmq.ROUTER_HANDOVER: 0}
        else:
            # Never again, in milliseconds. The option's own value for that, -1, and IMMEDIATE both
            # throw away what has come in and not been received when the connection ends.
            options |= {
                zmq.RECONNECT_IVL: 10**9,
                zmq.CONNECT_TIMEOUT: int(ATTEMPT_SECONDS * 1000),
            }
        made = LoopSocket(self._context, kind, options, limits, owner)
        self._sockets = [each for each in self._sockets if not each.gone.is_set()]
        self._sockets.append(made)
        return made

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigurationError("transport: expected open, is closed")


async def _addresses(endpoint: Endpoint) -> list[str]:
    """Return what libzmq binds or connects to; names are resolved here, off its only thread."""
    if endpoint.scheme == "ipc" or endpoint.host == WILDCARD:
        return [endpoint.text]
    port = endpoint.port or WILDCARD
    try:
        ipaddress.ip_address(endpoint.host)
    except ValueError:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        return [tcp_endpoint(str(address[0]), port) for *_, address in found]
    return [tcp_endpoint(endpoint.host, port)]


def _check_path_is_free(endpoint: Endpoint) -> None:
    """Refuse a path that somebody listens at, or that is no socket: libzmq would replace both."""
    path = endpoint.host
    if path.startswith("@"):
        return  # abstract: no file, the system itself refuses what is taken
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # nothing there, or libzmq will say what is wrong
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(
            f"cannot listen at {endpoint.text!r}: expected a socket or no file"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            pass  # somebody listens and is busy
        except OSError:
            return  # left behind by a process that is gone
    raise ConfigurationError(f"cannot listen at {endpoint.text!r}: address already in use")


async def _terminate(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Terminate `context`, which waits for libzmq's threads, in a thread of its own."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def terminate() -> None:
        context.term()
        loop.call_soon_threadsafe(done.set)

    thread = threading.Thread(target=terminate, name="zmq-context-term", daemon=True)
    thread.start()
    await done.wait()
    thread.join()
