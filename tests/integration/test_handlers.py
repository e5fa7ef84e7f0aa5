"""`Worker.handler`: taking over one type of message, and passing it on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import Pair, connected
from zmq_autograd.wire.codec import SCHEMAS
from zmq_autograd.wire.messages import (
    AbortPass,
    AbortPassResponse,
    AutogradMetadata,
    BackwardRequest,
    BackwardResponse,
    CleanupContextRequest,
    CleanupContextResponse,
    CommitPass,
    CommitPassResponse,
    ErrorResponse,
    ForwardRequest,
    ForwardResponse,
    Heartbeat,
    Hello,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    Reply,
    Request,
    RRefAcceptRequest,
    RRefAcceptResponse,
    RRefBackwardRequest,
    RRefBackwardResponse,
    RRefDeleteRequest,
    RRefDeleteResponse,
    RRefFetchRequest,
    RRefFetchResponse,
    RRefForkRequest,
    RRefForkResponse,
    StartPass,
    StartPassResponse,
    Status,
    StatusResponse,
    Welcome,
)

pytestmark = pytest.mark.timeout(30)

MAX_ID = 2**64 - 1

EXCHANGES: list[tuple[Request, Reply]] = [
    (
        PropagateGradientsRequest(AutogradMetadata(0, MAX_ID), [torch.ones(2), None], True, 5),
        PropagateGradientsResponse(),
    ),
    (ForwardRequest("anything", (1,), {"a": 2}), ForwardResponse({"result": 3})),
    (CleanupContextRequest(MAX_ID), CleanupContextResponse()),
    (StartPass(1, 2, (3, 4), (5,), retain_graph=True), StartPassResponse()),
    (AbortPass(1, 2, "remote_error", "because", "carol"), AbortPassResponse((3,), ("dave",))),
    (CommitPass(1, 2), CommitPassResponse()),
    (BackwardRequest(1, 2, retain_graph=True), BackwardResponse(3)),
    (RRefBackwardRequest(1, 2, retain_graph=True), RRefBackwardResponse()),
    (RRefFetchRequest(1), RRefFetchResponse([1, 2])),
    (RRefForkRequest(1, 2), RRefForkResponse()),
    (RRefAcceptRequest(1, 2), RRefAcceptResponse()),
    (RRefDeleteRequest(1, 2), RRefDeleteResponse()),
    (Status(), StatusResponse({"busy": True})),
]


def facts(value: Any) -> Any:
    """Return a message as plain data."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [facts(item) for item in value]
    if isinstance(value, (Request, Reply, AutogradMetadata, za.messages.Modes)):
        return type(value), {name: facts(getattr(value, name)) for name in value.__slots__}
    return value


def test_every_request_is_tried_here() -> None:
    requests = {kind for kind in SCHEMAS if issubclass(kind, Request)}
    assert {type(request) for request, _ in EXCHANGES} == requests - {Hello}


@pytest.mark.parametrize(("request_", "reply"), EXCHANGES, ids=lambda value: type(value).__name__)
async def test_a_handler_takes_over_its_type_of_message(
    pair: Pair, request_: Request, reply: Reply
) -> None:
    seen: list[tuple[Request, za.RemoteWorker]] = []

    @pair.bob.handler(type(request_))
    async def handle(request: Request, peer: za.RemoteWorker) -> Reply:
        seen.append((request, peer))
        return reply

    received = await pair.remote_bob.request(request_)
    assert facts(received) == facts(reply)
    ((request, peer),) = seen
    assert facts(request) == facts(request_)
    assert (peer.name, peer.incarnation) == ("alice", pair.alice.incarnation)


@pytest.mark.parametrize(
    "request_",
    [
        RRefFetchRequest(1),
        RRefForkRequest(1, 2),
        RRefBackwardRequest(1, 2),
        ForwardRequest("method", target_id=1),
    ],
    ids=lambda request: type(request).__name__,
)
async def test_what_asks_for_an_rref_that_is_not_there_is_told_so(request_: Request) -> None:
    async with connected() as pair:
        with pytest.raises(za.NotRegistered, match="worker 'bob' has no RRef 1") as raised:
            await pair.remote_bob.request(request_)
        assert raised.value.worker == "bob"


async def test_what_lets_go_of_an_rref_that_is_not_there_does_nothing() -> None:
    async with connected() as pair:
        for _ in range(2):
            deleted = await pair.remote_bob.request(RRefDeleteRequest(1, 2))
            assert deleted == RRefDeleteResponse()
            accepted = await pair.remote_bob.request(RRefAcceptRequest(1, 2))
            assert accepted == RRefAcceptResponse()


async def test_defaults(pair: Pair) -> None:
    with pytest.raises(za.ContextError) as raised:
        await pair.remote_bob.propagate_gradients([], context_id=MAX_ID, message_id=1)
    assert (raised.value.context_id, raised.value.worker) == (MAX_ID, "bob")
    assert "'bob'" in str(raised.value)
    for _ in range(2):
        reply = await pair.remote_bob.request(CleanupContextRequest(MAX_ID))
        assert reply == CleanupContextResponse()
    status = await pair.remote_bob.request(Status())
    assert isinstance(status, StatusResponse)
    expected = {"name": "bob", "incarnation": pair.bob.incarnation, "peers": ["alice"]}
    assert expected.items() <= status.status.items()


async def test_gradients_arrive_defined_or_not(pair: Pair) -> None:
    seen: list[PropagateGradientsRequest] = []

    @pair.bob.handler(PropagateGradientsRequest)
    async def handle(request: PropagateGradientsRequest, peer: za.RemoteWorker) -> Reply:
        seen.append(request)
        for gradient in request.grads:
            if gradient is not None:
                gradient += 1  # its receiver's own
        return PropagateGradientsResponse()

    shared = torch.ones(3, requires_grad=True)
    grads = [shared, None, shared, torch.zeros(0), torch.tensor(2.5, dtype=torch.bfloat16)]
    await pair.remote_bob.propagate_gradients(grads, context_id=1, message_id=2, retain_graph=True)
    await pair.remote_bob.propagate_gradients([], context_id=0, message_id=0)
    await pair.remote_bob.propagate_gradients((None, None), context_id=1, message_id=2)
    first, second, third = seen
    assert first.metadata == AutogradMetadata(1, 2)
    assert first.retain_graph
    assert facts(first.grads) == [[2, 2, 2], None, [2, 2, 2], [], 3.5]
    assert all(g is None or not g.requires_grad for g in first.grads)
    assert shared.tolist() == [1, 1, 1]
    assert (list(second.grads), second.retain_graph) == ([], False)
    assert list(third.grads) == [None, None]


async def test_a_thousand_gradients_in_one_message(pair: Pair) -> None:
    total = []

    @pair.bob.handler(PropagateGradientsRequest)
    async def handle(request: PropagateGradientsRequest, peer: za.RemoteWorker) -> Reply:
        total.append(sum(g.sum().item() for g in request.grads if g is not None))
        return PropagateGradientsResponse()

    grads = [torch.full((5,), float(n)) if n % 3 else None for n in range(1000)]
    await pair.remote_bob.propagate_gradients(grads, context_id=1, message_id=2)
    assert total == [sum(5 * n for n in range(1000) if n % 3)]


@pytest.mark.parametrize("grads", [[1.0], ["x"], [torch.ones(2, device="meta")], [[torch.ones(1)]]])
async def test_gradients_that_cannot_travel_are_refused_here(pair: Pair, grads: Any) -> None:
    with pytest.raises(za.SerializationError):
        await pair.remote_bob.propagate_gradients(grads, context_id=1, message_id=1)
    for wrong in (-1, 2**64, "1", None, True):
        with pytest.raises(za.SerializationError):
            await pair.remote_bob.propagate_gradients([], context_id=1, message_id=wrong)  # type: ignore[arg-type]


async def test_default_handler_passes_on(pair: Pair) -> None:
    order = []
    pair.bob.register(lambda x: x + 1, "increment")

    @pair.bob.handler(ForwardRequest)
    async def handle(request: ForwardRequest, peer: za.RemoteWorker) -> Reply:
        order.append(request.function)
        reply = await pair.bob.default_handler(request, peer)
        assert isinstance(reply, ForwardResponse)
        return ForwardResponse(reply.result * 10)

    assert await pair.remote_bob.call("increment", 1) == 20
    with pytest.raises(za.NotRegistered):
        await pair.remote_bob.call("missing")
    assert order == ["increment", "missing"]


async def test_only_requests_have_a_default_handler(pair: Pair) -> None:
    with pytest.raises(NotImplementedError, match="Request has no default handler"):
        await pair.bob.default_handler(Request(), pair.remote_bob)


async def test_a_handler_may_answer_with_an_error(pair: Pair) -> None:
    @pair.bob.handler(StartPass)
    async def handle(request: StartPass, peer: za.RemoteWorker) -> Reply:
        return ErrorResponse(
            "context_error", "not here", "carol", context_id=7, path=("bob", "carol")
        )

    with pytest.raises(za.ContextError) as raised:
        await pair.remote_bob.request(StartPass(7, 1))
    assert (raised.value.context_id, raised.value.worker) == (7, "carol")
    assert raised.value.path == ("bob", "carol")


async def test_a_handler_that_raises_tells_the_sender(pair: Pair) -> None:
    @pair.bob.handler(PropagateGradientsRequest)
    async def handle(request: PropagateGradientsRequest, peer: za.RemoteWorker) -> Reply:
        raise ArithmeticError("gradient overflows")

    with pytest.raises(za.RemoteError) as raised:
        await pair.remote_bob.propagate_gradients([], context_id=1, message_id=1)
    assert raised.value.type_name == "ArithmeticError"
    assert raised.value.traceback is not None
    assert "in handle" in raised.value.traceback


@pytest.mark.parametrize("wrong", [None, 5, StatusResponse({}), Status(), Heartbeat(), Status])
async def test_a_wrong_reply_is_the_handlers_error(wrong: Any) -> None:
    async with connected() as pair:

        @pair.bob.handler(StartPass)
        async def handle(request: StartPass, peer: za.RemoteWorker) -> Reply:
            return wrong  # type: ignore[no-any-return]

        with pytest.raises(za.RemoteError, match="StartPass: expected StartPassResponse, got"):
            await pair.remote_bob.request(StartPass(1, 1))


@pytest.mark.parametrize(
    "kind", [Hello, Request, Reply, Welcome, StatusResponse, Heartbeat, str, "Status", None]
)
def test_only_requests_have_handlers(kind: Any) -> None:
    async def handle(request: Any, peer: za.RemoteWorker) -> Reply:
        return StatusResponse()

    with pytest.raises(za.ConfigurationError, match="expected a request type"):
        za.Worker("bob").handler(kind)(handle)


def test_only_coroutine_functions_are_handlers() -> None:
    handler: Any
    for handler in (lambda request, peer: StatusResponse(), StatusResponse, None):
        with pytest.raises(za.ConfigurationError, match="expected a coroutine function"):
            za.Worker("bob").handler(Status)(handler)


def test_a_type_has_one_handler() -> None:
    bob = za.Worker("bob")

    @bob.handler(Status)
    async def first(request: Status, peer: za.RemoteWorker) -> Reply:
        return StatusResponse(1)

    with pytest.raises(za.ConfigurationError, match="'bob' has a handler for Status already"):
        bob.handler(Status)(first)


async def test_only_requests_can_be_sent(pair: Pair) -> None:
    wrong: Any
    for wrong in (StatusResponse({}), Heartbeat(), "status", None):
        with pytest.raises(za.SerializationError, match="expected a request of"):
            await pair.remote_bob.request(wrong)
    with pytest.raises(za.ProtocolError, match="no second Hello"):
        await pair.remote_bob.request(Hello("alice", "0" * 32))
    assert await pair.remote_bob.request(Status())


async def test_handlers_stay_over_a_restart(endpoint: str) -> None:
    bob = za.Worker("bob", listen=endpoint)

    @bob.handler(Status)
    async def handle(request: Status, peer: za.RemoteWorker) -> Reply:
        return StatusResponse(bob.incarnation)

    async with za.Worker("alice") as alice:
        for _ in range(2):
            async with bob:
                remote = await alice.connect(bob.endpoints[0])
                reply = await remote.request(Status())
                assert reply.status == bob.incarnation  # type: ignore[attr-defined]


async def test_a_handler_sees_whom_it_serves(pair: Pair) -> None:
    @pair.bob.handler(Status)
    async def handle(request: Status, peer: za.RemoteWorker) -> Reply:
        assert za.current_peer() is peer
        assert za.current_worker() is pair.bob
        return StatusResponse(await peer.call("ask", 1))

    pair.alice.register(lambda x: x + 1, "ask")
    replies = await asyncio.gather(*(pair.remote_bob.request(Status()) for _ in range(5)))
    assert [reply.status for reply in replies] == [2] * 5  # type: ignore[attr-defined]
