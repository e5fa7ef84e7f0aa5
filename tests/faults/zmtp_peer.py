"""A peer that speaks ZMTP 3.0 by hand, and need not keep to it: https://rfc.zeromq.org/spec/23."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

GREETING: Final = (
    b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
)

TIMEOUT_SECONDS: Final = 10.0


def ready(socket_type: bytes) -> bytes:
    """Return the READY command that ends the handshake of the mechanism NULL."""
    body = b"\x05READY" + b"\x0bSocket-Type" + len(socket_type).to_bytes(4, "big") + socket_type
    return b"\x04" + bytes([len(body)]) + body


def frame(payload: bytes, *, more: bool) -> bytes:
    """Return a frame of a message."""
    if len(payload) < 256:
        return bytes([more, len(payload)]) + payload
    return bytes([2 | more]) + len(payload).to_bytes(8, "big") + payload


def claim(size: int) -> bytes:
    """Return the head of a frame that says it will be `size` bytes long."""
    return b"\x03" + size.to_bytes(8, "big")


def connect(endpoint: str) -> socket.socket:
    """Open a bare TCP connection."""
    parts = urlsplit(endpoint)
    return socket.create_connection((parts.hostname, parts.port or 0), timeout=TIMEOUT_SECONDS)


def shake_hands(peer: socket.socket, socket_type: bytes) -> None:
    """Go through the handshake as `socket_type`."""
    peer.sendall(GREETING)
    _read(peer, len(GREETING))
    peer.sendall(ready(socket_type))
    _flags, size = _read(peer, 2)
    _read(peer, size)


def ended(peer: socket.socket) -> bool:
    """Wait until the other side has ended the connection; False if it does not in time."""
    try:
        while peer.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def pour(peer: socket.socket, what: bytes, times: int) -> int:
    """Send `what` again and again; return the bytes sent until the other side ended it."""
    sent = 0
    try:
        for _ in range(times):
            sent += peer.send(what)
    except OSError:
        return sent
    return sent


def _read(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = peer.recv(size - len(data))
        if not piece:
            raise ConnectionError("ended during the handshake")
        data += piece
    return data


class HostileServer:
    """Listens and does the same to each who connects, in a thread of its own."""

    def __init__(self, answer: bytes, endless: bytes = b"", socket_type: bytes = b"") -> None:
        """Set what is sent: `answer`, or a handshake as `socket_type`, then `endless` for ever."""
        self._answer = answer
        self._endless = endless
        self._socket_type = socket_type
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._closing = threading.Event()
        self._peers: list[socket.socket] = []
        self.poured = 0
        self.endpoint = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, name="hostile-server")

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                peer, _ = self._listening.accept()
            except OSError:
                return
            self._peers.append(peer)
            peer.settimeout(TIMEOUT_SECONDS)
            with contextlib.suppress(OSError):
                if self._socket_type:
                    shake_hands(peer, self._socket_type)
                if self._answer:
                    peer.sendall(self._answer)
                if self._endless:
                    self.poured += pour(peer, self._endless, 1 << 16)

    def close(self) -> None:
        """End all connections and the thread."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for peer in self._peers:
            peer.close()
        self._thread.join(TIMEOUT_SECONDS)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()


@contextlib.contextmanager
def hostile_server(
    answer: bytes = b"", endless: bytes = b"", socket_type: bytes = b""
) -> Iterator[HostileServer]:
    """Run a `HostileServer`."""
    server = HostileServer(answer, endless, socket_type)
    server.start()
    try:
        yield server
    finally:
        server.close()
