"""A worker and a peer without this library, which has only read the specification."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE, endpoint_of
from tests.integration import helpers_bare_peer as bare
from tests.integration.helpers_bare_peer import NO_RESULT, BarePeer, call, dialled, in_session
from zmq_autograd.wire.messages import PropagateGradientsRequest, PropagateGradientsResponse, Reply

pytestmark = pytest.mark.timeout(30)

ERROR_FIELDS = {
    "type": bare.ERROR_RESPONSE,
    "code": "remote_error",
    "text": "",
    "origin": "",
    "type_name": "",
    "traceback": None,
    "path": [],
    "incarnation": "",
    "context_id": 0,
    "message_ids": [],
    "workers": [],
    "retryable": False,
}


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_the_peer_does_not_import_the_package() -> None:
    source = Path(bare.__file__).read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not any("zmq_autograd" in line or "torch" in line for line in imports)


# --- the handshake -------------------------------------------------------------------------------


async def test_a_handshake(bob: za.Worker) -> None:
    async with dialled(bob.endpoints[0]) as peer:
        welcome = await peer.hello()
        assert 0 < welcome.pop("session_id") < 2**64
        assert welcome == {
            "type": bare.WELCOME,
            "request_id": 1,
            "version": 1,
            "name": "bob",
            "incarnation": bob.incarnation,
            "limits": bare.LIMITS,
            "features": [],
            "heartbeat": 1.0,
        }


async def test_another_version_is_refused_in_words(bob: za.Worker) -> None:
    async with dialled(bob.endpoints[0]) as peer:
        answer = await peer.hello(version=2)
        assert (answer["type"], answer["code"]) == (bare.ERROR_RESPONSE, "protocol_error")
        assert "expected protocol version 1, got 2" in answer["text"]
        assert answer["request_id"] == 1


async def test_whoever_does_not_say_hello_is_refused(bob: za.Worker) -> None:
    async with dialled(bob.endpoints[0]) as peer:
        request_id = await peer.start(bare.STATUS)
        answer, _ = await peer.receive()
        assert (answer["type"], answer["code"]) == (bare.ERROR_RESPONSE, "protocol_error")
        assert answer["request_id"] == request_id
        assert "expected Hello, got Status" in answer["text"]
    async with in_session(bob.endpoints[0]):  # the next one is welcome
        pass


async def test_unknown_features_are_ignored(bob: za.Worker) -> None:
    async with in_session(bob.endpoints[0], features=["chunks", "teleport"]) as peer:
        assert (await peer.ask(bare.STATUS))[0]["type"] == bare.STATUS_RESPONSE


async def test_a_worker_sends_heartbeats(tmp_path: Path) -> None:
    endpoint = endpoint_of("tcp", tmp_path)
    async with (
        za.Worker("bob", listen=endpoint, heartbeat=0.02) as bob,
        in_session(bob.endpoints[0]) as peer,
    ):
        for _ in range(3):
            frames = await peer.receive_raw()
            assert msgpack.unpackb(frames[0]) == {
                "type": bare.HEARTBEAT,
                "session_id": peer.session_id,
            }


async def test_a_peer_that_falls_silent_is_lost(tmp_path: Path) -> None:
    endpoint = endpoint_of("tcp", tmp_path)
    async with za.Worker("bob", listen=endpoint, heartbeat=0.02, lost_after=0.1) as bob:
        asked = asyncio.Event()
        outcome: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        tasks = []

        async def ask(peer: za.RemoteWorker) -> None:
            asked.set()
            try:
                await peer.call("anything")
            except za.ZmqAutogradError as error:
                outcome.set_result(error)

        @bob.register
        async def remember() -> None:
            peer = za.current_peer()
            assert peer is not None
            tasks.append(asyncio.create_task(ask(peer)))

        async with in_session(bob.endpoints[0], heartbeat=0.01) as peer:
            await peer.ask(bare.FORWARD, **call("remember"))
            async with asyncio.timeout(DEADLINE):
                error = await outcome
            assert isinstance(error, za.WorkerLost)
            assert (error.name, error.incarnation) == ("bare", bare.INCARNATION)
            assert "no sign of life" in str(error)


# --- gradients and calls -------------------------------------------------------------------------


async def test_gradients_one_of_them_undefined(bob: za.Worker, peer: BarePeer) -> None:
    seen: list[PropagateGradientsRequest] = []

    @bob.handler(PropagateGradientsRequest)
    async def handle(request: PropagateGradientsRequest, peer: za.RemoteWorker) -> Reply:
        assert peer.name == "bare"
        seen.append(request)
        return PropagateGradientsResponse()

    header, frames = await peer.ask(
        bare.PROPAGATE_GRADIENTS,
        floats(1, 2, 3, 4, 5, 6),
        b"",
        context_id=2**64 - 1,
        message_id=7,
        retain_graph=True,
        pass_id=0,
        grads=[0, None, 1],
        tensors=[["float32", [2, 3], False], ["bool", [0], False]],
    )
    assert header == {
        "type": bare.PROPAGATE_GRADIENTS_RESPONSE,
        "session_id": peer.session_id,
        "request_id": 2,
    }
    assert frames == []
    (request,) = seen
    assert (request.metadata.context_id, request.metadata.message_id) == (2**64 - 1, 7)
    assert request.retain_graph is True
    first, second, third = request.grads
    assert first is not None
    assert torch.equal(first, torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert second is None
    assert third is not None
    assert (third.shape, third.dtype) == ((0,), torch.bool)


async def test_gradients_of_no_context_are_an_error(bob: za.Worker, peer: BarePeer) -> None:
    header, frames = await peer.ask(
        bare.PROPAGATE_GRADIENTS,
        context_id=5,
        message_id=7,
        retain_graph=False,
        pass_id=0,
        grads=[],
    )
    assert header == ERROR_FIELDS | {
        "session_id": peer.session_id,
        "request_id": 2,
        "code": "context_error",
        "text": "worker 'bob' has no autograd context 5",
        "origin": "bob",
        "type_name": "ContextError",
        "path": ["bob"],
        "context_id": 5,
    }
    assert frames == []


async def test_a_call(bob: za.Worker, peer: BarePeer) -> None:
    bob.register(lambda x, by=1: {"y": (x * by, "text")}, "scale")
    header, frames = await peer.ask(
        bare.FORWARD,
        floats(1, 2),
        tensors=[["float32", [2], False]],
        **call("scale", {"tensor": 0}, kwargs={"by": 3}),
    )
    assert header == NO_RESULT | {
        "type": bare.FORWARD_RESPONSE,
        "session_id": peer.session_id,
        "request_id": 2,
        "result": {"dict": [["y", {"tuple": [{"tensor": 0}, "text"]}]]},
        "tensors": [["float32", [2], False]],
    }
    assert frames == [floats(3, 6)]


async def test_an_error(bob: za.Worker, peer: BarePeer) -> None:
    def fail() -> None:
        raise ValueError("it went wrong")

    bob.register(fail)
    header, frames = await peer.ask(bare.FORWARD, **call("fail"))
    traceback = header.pop("traceback")
    assert traceback.rstrip().endswith("ValueError: it went wrong")
    expected = ERROR_FIELDS | {
        "session_id": peer.session_id,
        "request_id": 2,
        "text": "it went wrong",
        "origin": "bob",
        "type_name": "ValueError",
        "path": ["bob"],
    }
    del expected["traceback"]
    assert header == expected
    assert frames == []
    missing, _ = await peer.ask(bare.FORWARD, **call("missing"))
    assert (missing["type"], missing["code"]) == (bare.ERROR_RESPONSE, "not_registered")


async def test_keys_in_any_order_and_numbers_of_any_width(bob: za.Worker, peer: BarePeer) -> None:
    bob.register(lambda: None, "f")
    fields = call("f", timeout=5, type=bare.FORWARD, session_id=peer.session_id, request_id=2)
    packed = b"\xde" + struct.pack(">H", len(fields))
    for key, value in reversed(fields.items()):
        wide = type(value) is int
        packed += b"\xdb" + struct.pack(">I", len(key)) + key.encode()
        packed += b"\xcf" + struct.pack(">Q", value) if wide else msgpack.packb(value)
    await peer.send(packed)
    header, _ = await peer.receive()
    assert header["type"] == bare.FORWARD_RESPONSE, header


async def test_many_requests_at_once(bob: za.Worker, peer: BarePeer) -> None:
    bob.register(lambda x: x, "echo")
    asked = {await peer.start(bare.FORWARD, **call("echo", n)): n for n in range(200)}
    for _ in range(200):
        header, _ = await peer.receive()
        assert header["result"] == asked.pop(header["request_id"])
    assert not asked


# --- called by the worker ------------------------------------------------------------------------


def register_ask(bob: za.Worker) -> None:
    """Let bob offer ``ask``, which asks its caller."""

    @bob.register
    async def ask() -> Any:
        peer = za.current_peer()
        assert peer is not None
        return await peer.call("double", torch.tensor([1.5, 2.5]), by=2, timeout=20)


async def test_the_worker_calls_back(bob: za.Worker, peer: BarePeer) -> None:
    register_ask(bob)
    asked = await peer.start(bare.FORWARD, **call("ask", timeout=30))
    request, frames = await peer.receive()
    assert 0 < request.pop("timeout") <= 20
    assert request == call("double", {"tensor": 0}, kwargs={"by": 2}) | {
        "type": bare.FORWARD,
        "session_id": peer.session_id,
        "request_id": 1,
        "tensors": [["float32", [2], False]],
    }
    assert frames == [floats(1.5, 2.5)]
    result = NO_RESULT | {"result": {"tensor": 0}, "tensors": [["float32", [2], False]]}
    await peer.reply(request, bare.FORWARD_RESPONSE, floats(3, 5), **result)
    header, frames = await peer.receive()
    assert (header["type"], header["request_id"]) == (bare.FORWARD_RESPONSE, asked)
    assert frames == [floats(3, 5)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("remote_error", "remote_error"),
        ("not_registered", "not_registered"),
        ("deadline_exceeded", "deadline_exceeded"),
        ("context_error", "context_error"),
        ("worker_lost", "worker_lost"),
        ("authentication_error", "authentication_error"),
        ("resource_exhausted", "resource_exhausted"),
        ("protocol_error", "protocol_error"),
        ("from_the_future", "remote_error"),
    ],
)
async def test_an_error_of_the_peer_goes_on_to_who_asked(
    bob: za.Worker, peer: BarePeer, code: str, expected: str
) -> None:
    register_ask(bob)
    await peer.start(bare.FORWARD, **call("ask"))
    request, _ = await peer.receive()
    error = ERROR_FIELDS | {"code": code, "text": "no 'luck'", "origin": "far", "path": ["bare"]}
    del error["type"]
    await peer.reply(request, bare.ERROR_RESPONSE, **error)
    header, _ = await peer.receive()
    assert (header["code"], header["origin"]) == (expected, "far")
    assert header["path"] == ["bob", "bare"]
    assert "luck" in header["text"]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (bare.FORWARD_RESPONSE, {}),
        (bare.FORWARD_RESPONSE, NO_RESULT | {"result": {"no such tag": 1}}),
        (bare.FORWARD_RESPONSE, NO_RESULT | {"extra": 1}),
        (bare.PROPAGATE_GRADIENTS_RESPONSE, {}),
        (bare.STATUS_RESPONSE, {"status": 5}),
    ],
)
async def test_a_malformed_reply_ends_its_request_and_no_other(
    bob: za.Worker, peer: BarePeer, kind: int, fields: dict[str, Any]
) -> None:
    register_ask(bob)
    for _ in range(2):
        await peer.start(bare.FORWARD, **call("ask"))
    requests = [(await peer.receive())[0] for _ in range(2)]
    await peer.reply(requests[0], kind, **fields)
    header, _ = await peer.receive()
    assert (header["type"], header["code"]) == (bare.ERROR_RESPONSE, "protocol_error")
    assert header["origin"] == "bare"
    await peer.reply(requests[1], bare.FORWARD_RESPONSE, **NO_RESULT)
    header, _ = await peer.receive()
    assert header["type"] == bare.FORWARD_RESPONSE


async def test_the_worker_cancels_what_it_asked(bob: za.Worker, peer: BarePeer) -> None:
    register_ask(bob)
    asked = await peer.start(bare.FORWARD, **call("ask"))
    request, _ = await peer.receive()
    cancel = {"type": bare.CANCEL, "session_id": peer.session_id}
    await peer.send(cancel | {"cancelled_id": asked})
    header, _ = await peer.receive()
    assert header == cancel | {"cancelled_id": request["request_id"]}
    # A reply to what was cancelled is ignored, and nothing comes for what was cancelled here.
    await peer.reply(request, bare.FORWARD_RESPONSE, **NO_RESULT)
    assert (await peer.ask(bare.STATUS))[0]["type"] == bare.STATUS_RESPONSE


async def test_a_request_ends_with_its_timeout(bob: za.Worker, peer: BarePeer) -> None:
    bob.register(asyncio.Event().wait, "wait")
    for timeout in (0, 0.0, 0.02):
        header, _ = await peer.ask(bare.FORWARD, **call("wait", timeout=timeout))
        assert (header["code"], header["origin"]) == ("deadline_exceeded", "bob")
        assert header["workers"] == ["bob"]
