"""Rules 2 and 3: requests both ways, and the ways they end, as exact lists of actions."""

from __future__ import annotations

import pytest

from tests.unit.session.open_sessions import CLEANED, CLEANUP, Pair
from tests.unit.session.session_pair import BOB, Failed, over_the_wire, plain
from zmq_autograd.errors import DeadlineExceeded, ProtocolError, RemoteError, WorkerLost
from zmq_autograd.session import (
    Close,
    FinishRequest,
    HandleRequest,
    Send,
    State,
    StopRequest,
    error_response,
)
from zmq_autograd.session.state import PASS_REQUESTS
from zmq_autograd.wire import Envelope
from zmq_autograd.wire.messages import (
    Cancel,
    CleanupContextRequest,
    ErrorResponse,
    ForwardRequest,
    Heartbeat,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    Reply,
    RRefBackwardRequest,
    RRefBackwardResponse,
    Status,
    Welcome,
)


@pytest.fixture
def pair() -> Pair:
    return Pair()


# --- rule 2: requests both ways, ids that grow ---------------------------------------------------


def test_a_request_is_handled_and_its_reply_ends_it(pair: Pair) -> None:
    envelope = pair.alice.request(CleanupContextRequest, None)
    assert envelope == Envelope(pair.id, 2, None)
    assert pair.bob.receive(envelope, CLEANUP) == [HandleRequest(2, CLEANUP, None)]
    answer = pair.bob.reply(2)
    assert answer == Envelope(pair.id, 2)
    assert pair.alice.receive(answer, CLEANED) == [FinishRequest(2, CLEANED)]
    assert pair.nothing_open()


def test_the_accepting_side_sends_requests_over_the_same_session(pair: Pair) -> None:
    envelope = pair.bob.request(CleanupContextRequest, None)
    assert envelope == Envelope(pair.id, 1, None)
    assert pair.alice.receive(envelope, CLEANUP) == [HandleRequest(1, CLEANUP, None)]
    answer = pair.alice.reply(1)
    assert answer == Envelope(pair.id, 1)
    assert pair.bob.receive(answer, CLEANED) == [FinishRequest(1, CLEANED)]
    assert pair.nothing_open()


def test_the_same_id_of_both_sides_is_two_requests(pair: Pair) -> None:
    pair.bob.request(Status, None)
    pair.bob.request(CleanupContextRequest, None)
    pair.alice.request(RRefBackwardRequest, None)  # 2, as bob's second
    backward = RRefBackwardRequest(1, 2)
    assert pair.bob.receive(Envelope(pair.id, 2), backward) == [HandleRequest(2, backward, None)]
    assert pair.bob.receive(Envelope(pair.id, 2), CLEANED) == [FinishRequest(2, CLEANED)]
    assert pair.bob.reply(2) == Envelope(pair.id, 2)
    done = RRefBackwardResponse()
    assert pair.alice.receive(Envelope(pair.id, 2), done) == [FinishRequest(2, done)]


def test_ids_grow_by_one_and_are_used_once(pair: Pair) -> None:
    ids = []
    for _ in range(3):
        ids.append(pair.alice.request(Status, None).request_id)
        pair.alice.forget(ids[-1])
    pair.alice.cancel(pair.alice.request(Status, None).request_id)
    ids.append(pair.alice.request(Status, None).request_id)
    assert ids == [2, 3, 4, 6]


def test_a_request_that_was_not_sent_after_all_leaves_nothing(pair: Pair) -> None:
    pair.alice.forget(pair.alice.request(Status, 1.0).request_id)
    pair.clock.now += 0.99
    assert pair.alice.tick(0.0, None) == []
    pair.clock.now += 0.01
    assert pair.alice.tick(0.0, None) == [Send(Envelope(pair.id), Heartbeat())]
    assert pair.nothing_open()


def test_a_duplicate_of_what_is_being_handled_is_ignored(pair: Pair) -> None:
    pair.bob.receive(Envelope(pair.id, 2), CLEANUP)
    assert pair.bob.receive(Envelope(pair.id, 2), CLEANUP) == []
    assert pair.bob.receive(Envelope(pair.id, 2, 0.0), Status()) == []
    assert pair.bob.tick(0.0, None) == []


@pytest.mark.parametrize("request_id", [0, 1, 2, 3, 4])
def test_an_id_that_is_not_larger_is_refused_and_not_handled(pair: Pair, request_id: int) -> None:
    pair.bob.receive(Envelope(pair.id, 4), CLEANUP)
    pair.bob.reply(4)
    problem = f"expected a request id above 4, got {request_id}"
    actions = pair.bob.receive(Envelope(pair.id, request_id), CLEANUP)
    assert actions == [pair.refusal(request_id, problem)]
    assert pair.bob.reply(request_id) is None


def test_ids_may_leave_gaps_up_to_the_largest(pair: Pair) -> None:
    assert pair.bob.receive(Envelope(pair.id, 2**64 - 1), CLEANUP) == [
        HandleRequest(2**64 - 1, CLEANUP, None)
    ]
    assert pair.bob.reply(2**64 - 1) == Envelope(pair.id, 2**64 - 1)


def test_more_requests_than_the_limit_are_refused_until_one_ends() -> None:
    pair = Pair(bob_requests=2)
    for request_id in (2, 3):
        actions = pair.bob.receive(Envelope(pair.id, request_id), Status())
        assert actions == [HandleRequest(request_id, Status(), None)]
    assert pair.bob.receive(Envelope(pair.id, 4), Status()) == [
        Send(
            Envelope(pair.id, 4),
            ErrorResponse(
                "resource_exhausted",
                "2 requests are under way: that is the limit",
                "bob",
                "ResourceExhausted",
                path=("bob",),
                retryable=True,
            ),
        )
    ]
    pair.bob.receive(Envelope(pair.id), Cancel(2))
    assert pair.bob.receive(Envelope(pair.id, 5), Status()) == [HandleRequest(5, Status(), None)]
    again = pair.bob.receive(Envelope(pair.id, 4), Status())
    assert again == [pair.refusal(4, "expected a request id above 5, got 4")]


def test_requests_of_passes_have_a_limit_of_their_own() -> None:
    """Calls that wait for a pass must not keep that from going on, and passes not each other."""
    pair = Pair(bob_requests=1)
    assert pair.bob.receive(Envelope(pair.id, 2), Status()) == [HandleRequest(2, Status(), None)]
    ids = range(3, 3 + PASS_REQUESTS)
    for request_id in ids:
        actions = pair.bob.receive(Envelope(pair.id, request_id), CLEANUP)
        assert actions == [HandleRequest(request_id, CLEANUP, None)]
    [refusal] = pair.bob.receive(Envelope(pair.id, ids[-1] + 1), CLEANUP)
    assert isinstance(refusal, Send)
    assert isinstance(refusal.message, ErrorResponse)
    assert refusal.message.text == f"{PASS_REQUESTS} requests are under way: that is the limit"


def test_another_sessions_request_is_refused(pair: Pair) -> None:
    other = pair.id % 1000 + 1
    problem = f"expected session {pair.id}, got {other}"
    assert pair.bob.receive(Envelope(other, 2), CLEANUP) == [pair.refusal(2, problem)]
    assert pair.bob.receive(Envelope(other), Heartbeat()) == []
    assert pair.bob.receive(Envelope(pair.id, 2), CLEANUP) == [HandleRequest(2, CLEANUP, None)]
    assert pair.bob.receive(Envelope(other), Cancel(2)) == []
    assert pair.bob.reply(2) is not None


# --- rule 3: every request ends once at its sender -----------------------------------------------


def test_a_reply_of_the_wrong_type_breaks_the_protocol(pair: Pair) -> None:
    pair.alice.request(CleanupContextRequest, None)
    text = (
        "worker 'bob' broke the protocol: "
        "expected CleanupContextResponse, got PropagateGradientsResponse"
    )
    [finish] = pair.alice.receive(Envelope(pair.id, 2), PropagateGradientsResponse())
    assert plain([finish]) == [Failed(2, ProtocolError, text)]
    assert isinstance(finish, FinishRequest)
    assert isinstance(finish.outcome, ProtocolError)
    assert (finish.outcome.worker, finish.outcome.request_id) == ("bob", 2)
    assert pair.alice.receive(Envelope(pair.id, 2), CLEANED) == []
    assert pair.nothing_open()


def test_a_welcome_is_no_reply_to_anything_but_hello(pair: Pair) -> None:
    pair.alice.request(Status, None)
    text = "worker 'bob' broke the protocol: expected StatusResponse, got Welcome"
    actions = plain(pair.alice.receive(Envelope(pair.id, 2), Welcome("bob", BOB.incarnation)))
    assert actions == [Failed(2, ProtocolError, text)]


def test_an_error_ends_a_request_of_any_type(pair: Pair) -> None:
    pair.alice.request(ForwardRequest, None)
    raised = error_response(ValueError("no such layer"), "bob")
    actions = plain(pair.alice.receive(*over_the_wire(Envelope(pair.id, 2), raised)))
    assert actions == [Failed(2, RemoteError, "ValueError on worker 'bob': no such layer")]


@pytest.mark.parametrize("reply", [CLEANED, ErrorResponse("remote_error", "no", "bob")])
def test_a_reply_to_what_was_never_sent_ends_the_session(pair: Pair, reply: Reply) -> None:
    pair.alice.request(Status, None)
    pair.alice.receive(Envelope(pair.id, 1), CLEANUP)
    cause = "it replied to request 3, which was never sent"
    assert plain(pair.alice.receive(Envelope(pair.id, 3), reply)) == [
        StopRequest(1),
        Failed(2, WorkerLost, f"worker 'bob' (incarnation bbbbbbbb) is lost: {cause}"),
        Close(cause),
    ]


@pytest.mark.parametrize("request_id", [0, 1, 2])
def test_a_second_reply_is_ignored(pair: Pair, request_id: int) -> None:
    pair.alice.request(CleanupContextRequest, None)
    pair.alice.receive(Envelope(pair.id, 2), CLEANED)
    assert pair.alice.receive(Envelope(pair.id, request_id), CLEANED) == []
    assert pair.alice.state is State.OPEN


def test_another_sessions_reply_does_not_end_the_request(pair: Pair) -> None:
    pair.alice.request(CleanupContextRequest, None)
    assert pair.alice.receive(Envelope(0, 2), CLEANED) == []
    assert pair.alice.receive(Envelope(0, 99), CLEANED) == []
    assert pair.alice.receive(Envelope(pair.id, 2), CLEANED) == [FinishRequest(2, CLEANED)]


def test_a_deadline_names_the_messages_that_are_awaited(pair: Pair) -> None:
    pair.alice.request(PropagateGradientsRequest, 0.5, (7,))
    pair.clock.now += 0.5
    [finish, _] = pair.alice.tick(0.0, None)
    assert isinstance(finish, FinishRequest)
    assert isinstance(finish.outcome, DeadlineExceeded)
    assert finish.outcome.message_ids == (7,)
    assert str(finish.outcome) == "no reply from worker 'bob' about message 7 within 0.5 s"


def test_a_deadline_ends_a_request_and_tells_the_peer(pair: Pair) -> None:
    pair.alice.request(Status, 0.75)
    assert pair.alice.wakeup() == pair.clock.now + 0.25
    pair.clock.now += 0.74
    assert pair.alice.tick(0.0, None) == []
    assert pair.alice.wakeup() == 1000.75
    pair.clock.now = 1000.75
    [finish, send] = pair.alice.tick(0.0, None)
    text = "no reply from worker 'bob' within 0.75 s"
    assert plain([finish]) == [Failed(2, DeadlineExceeded, text)]
    assert isinstance(finish, FinishRequest)
    assert isinstance(finish.outcome, DeadlineExceeded)
    assert (finish.outcome.workers, finish.outcome.worker) == (("bob",), "bob")
    assert send == Send(Envelope(pair.id), Cancel(2))
    assert pair.alice.tick(0.0, None) == []
    assert pair.alice.receive(Envelope(pair.id, 2), ErrorResponse("x", "late", "bob")) == []
    assert pair.nothing_open()


def test_deadlines_end_requests_in_their_own_order(pair: Pair) -> None:
    for timeout in (0.3, 0.1, None, 0.2):
        pair.alice.request(Status, timeout)
    pair.clock.now += 0.25
    ended = [a.request_id for a in pair.alice.tick(0.0, None) if isinstance(a, FinishRequest)]
    assert ended == [3, 5]


def test_a_reply_makes_its_deadline_void(pair: Pair) -> None:
    pair.alice.request(CleanupContextRequest, 0.5)
    pair.alice.receive(Envelope(pair.id, 2), CLEANED)
    pair.clock.now += 0.5
    assert pair.alice.tick(0.0, None) == []


def test_cancelling_tells_the_peer_once_and_ends_the_request(pair: Pair) -> None:
    pair.alice.request(CleanupContextRequest, 0.5)
    assert pair.alice.cancel(2) == [Send(Envelope(pair.id), Cancel(2))]
    assert pair.alice.cancel(2) == []
    assert pair.alice.receive(Envelope(pair.id, 2), CLEANED) == []
    pair.clock.now += 0.5
    assert pair.alice.tick(0.0, None) == []
    assert pair.nothing_open()


def test_cancelling_what_does_not_exist_does_nothing(pair: Pair) -> None:
    assert [pair.alice.cancel(request_id) for request_id in (0, 1, 2, 99)] == [[], [], [], []]
