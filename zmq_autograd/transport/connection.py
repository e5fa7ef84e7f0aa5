"""One network connection, seen beside libzmq through a duplicate of its descriptor.

libzmq neither says how many bytes came in nor can it end one connection of a ROUTER; the kernel
can do both.  Owns that duplicate: counters, silence, cutting.  Knows nothing of messages.  Bounds
are put on these numbers in `zmq_autograd.transport.guard`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Final

from zmq_autograd.transport.base import Silence
from zmq_autograd.transport.endpoints import tcp_endpoint
from zmq_autograd.wire.limits import KIB

# Offsets into Linux's struct tcp_info, which only ever grows at its end.
_TCP_INFO: Final = getattr(socket, "TCP_INFO", None)  # Linux alone has it
_TCP_INFO_BYTES: Final = 232
_SEGMENT_BYTES: Final = struct.Struct("=I")  # the largest segment that this side sends
_SEGMENT_BYTES_AT: Final = 16
_WINDOW: Final = struct.Struct("=I")  # bytes that the peer's host is ready to take
_WINDOW_AT: Final = 228
_LAST_DATA_RECEIVED: Final = struct.Struct("=II")  # and the last acknowledgement, milliseconds ago
_LAST_DATA_RECEIVED_AT: Final = 52
_BYTES: Final = struct.Struct("=QQ")  # acknowledged by the peer, received from it
_BYTES_AT: Final = 120
_COUNTERS_END: Final = 136  # older kernels tell no more, and so nothing of the window

_READ_BYTES: Final = 256 * KIB
_READS_PER_LOOK: Final = 16

_NO_LINGER: Final = struct.pack("=ii", 1, 0)


class Connection:
    """A connection that libzmq holds; this is a second grip on it.

    While the grip is held, the peer sees no end of the connection even if libzmq closes its own
    descriptor: whoever hears that libzmq let go calls `release`.
    """

    def __init__(self, fd: int, belongs: Callable[[socket.socket], bool]) -> None:
        """Take hold of `fd`, which libzmq may have closed, and the system given away, since.

        Args:
            fd: descriptor that libzmq named.
            belongs: says whether a socket is one of those that are expected here.
        """
        self.fd = fd
        self.opened = time.monotonic()
        self.address = ""
        # Whether the peer has said who it is; set by the link, read by the guard.
        self.admitted = False
        # What has come out of libzmq, kept by the owner.
        self.delivered_bytes = 0
        self.delivered_messages = 0
        # The guard's own: what counted as delivered when it last looked.
        self.settled_messages = 0
        self.settled_bytes = 0
        self._socket = _duplicate(fd, belongs)
        self._is_tcp = False
        # Two ends in one: what dialling a free port of one's own machine may come to.
        self.is_to_itself = False
        if self._socket is not None:
            self._is_tcp = self._socket.family in (socket.AF_INET, socket.AF_INET6)
            self.address = _peer_address(self._socket)
            self.is_to_itself = self._is_tcp and _names_itself(self._socket)

    @property
    def held(self) -> bool:
        """Whether the kernel can still be asked about this connection."""
        return self._socket is not None

    def received_bytes(self) -> int | None:
        """Return how many bytes the peer has sent; None where the system does not count them."""
        info = self._tcp_info()
        return None if info is None else int(_BYTES.unpack_from(info, _BYTES_AT)[1])

    def written_bytes(self) -> int | None:
        """Return how many bytes libzmq has written; None where the system does not count them."""
        # In this order, an acknowledgement in between makes the sum too small, never too large.
        info = self._tcp_info()
        if info is None:
            return None
        return int(_BYTES.unpack_from(info, _BYTES_AT)[0]) + self.unread_bytes()

    def unread_bytes(self) -> int:
        """Return how many bytes wait in the kernel for the peer's."""
        if self._socket is None:
            return 0
        try:
            waiting = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
        except OSError:  # this system does not tell of sockets
            return 0
        return int(struct.unpack("=i", waiting)[0])

    def silence(self) -> Silence | None:
        """Say for how long nothing has come, None where the system does not tell."""
        info = self._tcp_info()
        if info is None:
            return None
        data, acknowledgement = _LAST_DATA_RECEIVED.unpack_from(info, _LAST_DATA_RECEIVED_AT)
        return Silence(data / 1000, acknowledgement / 1000 if _has_room(info) else None)

    def read_to_end(self) -> bool:
        """Throw away what still comes; True when the peer has ended its side.

        Only then is it safe to `release`: before, the kernel would reset the connection, and a
        reset makes the peer's libzmq drop what it has not read yet.  For when libzmq here reads no
        more.
        """
        try:
            for _ in range(_READS_PER_LOOK):
                if self._socket is None or not self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT):
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True  # reset by the peer
        return False

    def finish(self) -> None:
        """Say to the peer that nothing more will be sent, behind all that was written."""
        self._shut(socket.SHUT_WR)

    def abort(self) -> None:
        """End the connection both ways and throw away what is under way.

        libzmq finds it ended, frees what it holds of a message half received, and reports a
        disconnection.  A peer that only ever sends learns it from the reset that goes out with
        `release`.
        """
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self._shut(socket.SHUT_RDWR)

    def _shut(self, directions: int) -> None:
        if self._socket is None:
            return
        try:
            self._socket.shutdown(directions)
        except OSError:
            return  # the peer was faster: it is ended already

    def release(self) -> None:
        """Let go.  Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tcp_info(self) -> bytes | None:
        if self._socket is None or not self._is_tcp or _TCP_INFO is None:
            return None
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # not allowed to ask
            return None
        return info if len(info) >= _COUNTERS_END else None


def _has_room(info: bytes) -> bool:
    """Say whether the peer's host is known to have room for a segment.

    To one that has none the kernel sends nothing but ever rarer probes, so that acknowledgements
    stay away although nothing is wrong.
    """
    if len(info) < _TCP_INFO_BYTES:
        return False
    (segment,) = _SEGMENT_BYTES.unpack_from(info, _SEGMENT_BYTES_AT)
    (window,) = _WINDOW.unpack_from(info, _WINDOW_AT)
    return bool(window >= segment)


def _duplicate(fd: int, belongs: Callable[[socket.socket], bool]) -> socket.socket | None:
    # Where this fails, libzmq has closed the descriptor and reports the disconnection next.
    try:
        copy = os.dup(fd)
    except OSError:
        return None
    try:
        duplicate = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    try:
        expected = belongs(duplicate)
    except OSError:
        expected = False
    if expected:
        return duplicate
    duplicate.close()
    return None


def _names_itself(connected: socket.socket) -> bool:
    try:
        return bool(connected.getsockname() == connected.getpeername())
    except OSError:
        return False


def _peer_address(connected: socket.socket) -> str:
    try:
        peer = connected.getpeername()
    except OSError:
        return ""
    return tcp_endpoint(peer[0], peer[1]) if isinstance(peer, tuple) else ""
