"""A peer that speaks ``docs/protocol.md`` with nothing but pyzmq and msgpack.

It must not import the package: what it knows it has from the specification.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import msgpack
import zmq
import zmq.asyncio

HELLO, WELCOME, HEARTBEAT, CANCEL = 0x40, 0x41, 0x42, 0x43
FORWARD, FORWARD_RESPONSE = 0x0F, 0x10
PROPAGATE_GRADIENTS, PROPAGATE_GRADIENTS_RESPONSE = 0x11, 0x12
ERROR_RESPONSE = 0x37
STATUS, STATUS_RESPONSE = 0x48, 0x49

INCARNATION: Final = "0123456789abcdef" * 2

LIMITS: Final = {
    "header_bytes": 2**18,
    "frames": 4096,
    "frame_bytes": 2**30,
    "message_bytes": 2**31,
    "requests": 1024,
}

NO_RESULT: Final = {
    "result": None,
    "context_id": 0,
    "message_id": 0,
    "profiler_events": None,
    "committed": 0,
}
"""What a response holds that holds nothing."""

DEADLINE: Final = 10.0

Header = dict[str, Any]
Message = tuple[Header, list[bytes]]


class BarePeer:
    """One DEALER, and the session that it has with a worker."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self.session_id = 0
        self.last_request_id = 0

    async def send(self, header: Any, *frames: bytes) -> None:
        """Send a header, packed if it is no bytes yet, and raw frames."""
        packed = header if isinstance(header, bytes) else msgpack.packb(header)
        await self._socket.send_multipart([packed, *frames])

    async def receive(self) -> Message:
        """Return the next message that is no heartbeat."""
        while True:
            frames = await self.receive_raw()
            header = msgpack.unpackb(frames[0])
            if header["type"] != HEARTBEAT:
                return header, frames[1:]

    async def receive_raw(self) -> list[bytes]:
        """Return the frames of the next message."""
        async with asyncio.timeout(DEADLINE):
            return list(await self._socket.recv_multipart())

    async def silent(self, seconds: float) -> bool:
        """Say whether nothing, heartbeats included, comes for so long."""
        return not await self._socket.poll(int(seconds * 1000))

    async def hello(self, **changes: Any) -> dict[str, Any]:
        """Ask for a session and return the answer's header."""
        self.last_request_id += 1
        fields = {
            "type": HELLO,
            "request_id": self.last_request_id,
            "version": 1,
            "name": "bare",
            "incarnation": INCARNATION,
            "limits": LIMITS,
            "features": [],
            "heartbeat": 60.0,
        }
        await self.send(fields | changes)
        header, frames = await self.receive()
        assert not frames
        self.session_id = header.get("session_id", 0)
        return header

    async def ask(self, kind: int, *frames: bytes, **fields: Any) -> Message:
        """Send a request and return what is replied to it."""
        request_id = await self.start(kind, *frames, **fields)
        header, replied = await self.receive()
        assert header["request_id"] == request_id
        assert header["session_id"] == self.session_id
        return header, replied

    async def start(self, kind: int, *frames: bytes, **fields: Any) -> int:
        """Send a request and return its id."""
        self.last_request_id += 1
        envelope = {
            "type": kind,
            "session_id": self.session_id,
            "request_id": self.last_request_id,
        }
        await self.send(envelope | fields, *frames)
        return self.last_request_id

    async def reply(
        self, request: dict[str, Any], kind: int, *frames: bytes, **fields: Any
    ) -> None:
        """Answer a request of the worker's."""
        envelope = {"session_id": self.session_id, "request_id": request["request_id"]}
        await self.send({"type": kind} | envelope | fields, *frames)


def call(function: str, *args: Any, **fields: Any) -> dict[str, Any]:
    """Return the fields of a call."""
    return {
        "function": function,
        "args": list(args),
        "kwargs": {},
        "context_id": 0,
        "message_id": 0,
        "modes": [True, False, []],
        "profiler": None,
        "committed": 0,
        "from_owner": False,
        "target_id": 0,
        "keep": False,
    } | fields


@asynccontextmanager
async def dialled(endpoint: str) -> AsyncIterator[BarePeer]:
    """Connect a peer that has not said who it is yet."""
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.ipv6 = True
        socket.connect(endpoint)
        yield BarePeer(socket)


@asynccontextmanager
async def in_session(endpoint: str, **changes: Any) -> AsyncIterator[BarePeer]:
    """Connect a peer and open a session."""
    async with dialled(endpoint) as peer:
        header = await peer.hello(**changes)
        assert header["type"] == WELCOME, header
        yield peer
