"""What the specification forbids, said by a peer without this library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

import zmq_autograd as za
from tests.helpers import endpoint_of
from tests.integration import helpers_bare_peer as bare
from tests.integration.helpers_bare_peer import NO_RESULT, BarePeer, call, dialled, in_session
from zmq_autograd.wire.messages import Status

pytestmark = pytest.mark.timeout(30)


# --- what the specification forbids --------------------------------------------------------------

TENSOR = ["float32", [2], False]

MALFORMED: list[tuple[str, dict[str, Any], list[bytes]]] = [
    ("unknown type", {"type": 0x7F}, []),
    ("type of no int", {"type": "status"}, []),
    ("unknown field", {"colour": "red"}, []),
    ("extra frame", {}, [b"x"]),
    ("empty extra frame", {}, [b""]),
    ("tensor without a frame", {"tensors": [TENSOR]}, []),
    ("frame too short", {"tensors": [TENSOR]}, [bytes(7)]),
    ("frame that nothing uses", {"tensors": [TENSOR]}, [bytes(8)]),
    ("unknown dtype", {"tensors": [["float31", [2], False]]}, [bytes(8)]),
    ("another session", {"session_id": 1}, []),
]


@pytest.mark.parametrize(("name", "changes", "frames"), MALFORMED, ids=[m[0] for m in MALFORMED])
async def test_what_is_no_message_is_answered_and_the_session_goes_on(
    bob: za.Worker, peer: BarePeer, name: str, changes: dict[str, Any], frames: list[bytes]
) -> None:
    request_id = await peer.start(bare.STATUS, *frames, **changes)
    header, _ = await peer.receive()
    assert (header["type"], header["code"]) == (bare.ERROR_RESPONSE, "protocol_error")
    assert header["request_id"] == request_id
    assert header["origin"] == "bob"
    assert (await peer.ask(bare.STATUS))[0]["type"] == bare.STATUS_RESPONSE


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({"type": bare.STATUS, "request_id": -1}),
        msgpack.packb({"type": bare.STATUS, "request_id": True}),
        msgpack.packb({"type": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"type": bare.STATUS}) + b"\0",
        b"\x82\xa4type\x48\xa4type\x48",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 10_000,
    ],
)
async def test_what_cannot_be_read_is_answered_to_nobody_in_particular(
    bob: za.Worker, peer: BarePeer, packed: bytes
) -> None:
    await peer.send(packed)
    header, _ = await peer.receive()
    assert (header["type"], header["code"]) == (bare.ERROR_RESPONSE, "protocol_error")
    assert header.get("request_id", 0) == 0
    assert (await peer.ask(bare.STATUS))[0]["type"] == bare.STATUS_RESPONSE


async def test_request_ids_only_grow(bob: za.Worker, peer: BarePeer) -> None:
    await peer.start(bare.STATUS, request_id=100)
    assert (await peer.receive())[0]["type"] == bare.STATUS_RESPONSE
    for old in (100, 99, 1):
        await peer.start(bare.STATUS, request_id=old)
        header, _ = await peer.receive()
        assert (header["request_id"], header["code"]) == (old, "protocol_error")
    await peer.start(bare.STATUS, request_id=101)
    assert (await peer.receive())[0]["type"] == bare.STATUS_RESPONSE


async def test_a_request_repeated_while_it_runs_runs_once(bob: za.Worker, peer: BarePeer) -> None:
    runs = []
    gate = asyncio.Event()

    @bob.register
    async def work() -> None:
        runs.append(1)
        await gate.wait()

    for _ in range(3):
        await peer.start(bare.FORWARD, **call("work", request_id=50))
    peer.last_request_id = 50
    assert (await peer.ask(bare.STATUS))[0]["type"] == bare.STATUS_RESPONSE
    gate.set()
    assert (await peer.receive())[0]["request_id"] == 50
    assert (await peer.ask(bare.STATUS))[0]["type"] == bare.STATUS_RESPONSE
    assert runs == [1]


async def test_a_reply_to_nothing_ends_the_session(bob: za.Worker, peer: BarePeer) -> None:
    await peer.reply({"request_id": 77}, bare.FORWARD_RESPONSE, **NO_RESULT)
    await peer.start(bare.STATUS)
    async with za.connect(bob.endpoints[0]) as good:
        assert await good.request(Status())
    # Whether a word came before or not, the session is over.
    assert not [h async for h in replies(peer) if h["type"] == bare.STATUS_RESPONSE]


async def replies(peer: BarePeer) -> AsyncIterator[dict[str, Any]]:
    while not await peer.silent(0.05):
        yield (await peer.receive())[0]


async def test_what_follows_cancel_and_heartbeat_is_nothing(bob: za.Worker, peer: BarePeer) -> None:
    session = {"session_id": peer.session_id}
    await peer.send({"type": bare.HEARTBEAT} | session)
    for cancelled_id in (0, 1, 2**64 - 1):
        await peer.send({"type": bare.CANCEL, "cancelled_id": cancelled_id} | session)
    assert (await peer.ask(bare.STATUS))[0]["type"] == bare.STATUS_RESPONSE


async def test_requests_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    limits = za.Limits(requests=3)
    async with za.Worker("bob", listen=endpoint_of("tcp", tmp_path), limits=limits) as bob:
        gate = asyncio.Event()
        bob.register(gate.wait, "wait")
        async with in_session(bob.endpoints[0]) as peer:
            for _ in range(5):
                await peer.start(bare.FORWARD, **call("wait"))
            refused = [(await peer.receive())[0] for _ in range(2)]
            assert [header["request_id"] for header in refused] == [5, 6]
            assert all(header["code"] == "resource_exhausted" for header in refused)
            assert all(header["retryable"] for header in refused)
            gate.set()
            done = [(await peer.receive())[0]["request_id"] for _ in range(3)]
            assert sorted(done) == [2, 3, 4]


@pytest.mark.parametrize("header_bytes", [1, 200, 400])
async def test_a_peer_that_takes_in_next_to_nothing_harms_nobody(
    bob: za.Worker, header_bytes: int
) -> None:
    def fail() -> None:
        raise ValueError("x" * 1000)

    bob.register(fail)
    async with dialled(bob.endpoints[0]) as peer:
        await peer.send(
            {
                "type": bare.HELLO,
                "request_id": 1,
                "version": 1,
                "name": "bare",
                "incarnation": bare.INCARNATION,
                "limits": bare.LIMITS | {"header_bytes": header_bytes},
                "features": [],
                "heartbeat": 60.0,
            }
        )
        if not await peer.silent(0.05):
            header, _ = await peer.receive()
            peer.session_id, peer.last_request_id = header["session_id"], 1
            # What it would refuse is said in fewer words, and not by silence.
            header, _ = await peer.ask(bare.FORWARD, **call("fail"))
            assert header["code"] == "resource_exhausted"
    async with za.connect(bob.endpoints[0]) as good:
        assert await good.request(Status())
