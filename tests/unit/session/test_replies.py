"""Rules 4 and 5, the loss of a session, and heartbeats, as exact lists of actions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.session.open_sessions import CLEANED, CLEANUP, Pair, malformed
from tests.unit.session.session_pair import BOB, Clock, Failed, open_pair, over_the_wire, plain
from zmq_autograd.errors import ProtocolError, WorkerLost
from zmq_autograd.session import (
    Action,
    Close,
    FinishRequest,
    HandleRequest,
    Send,
    Session,
    State,
    StopRequest,
)
from zmq_autograd.wire import Envelope
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    Cancel,
    CleanupContextRequest,
    ErrorResponse,
    Heartbeat,
    PropagateGradientsRequest,
    Reply,
    Status,
)


@pytest.fixture
def pair() -> Pair:
    return Pair()


# --- rule 4: every request ends once at its receiver ---------------------------------------------


def test_the_deadline_of_a_request_is_what_its_sender_left(pair: Pair) -> None:
    pair.clock.now = 2000.0
    actions = pair.bob.receive(Envelope(pair.id, 2, 0.25), CLEANUP)
    assert actions == [HandleRequest(2, CLEANUP, 2000.25)]
    assert pair.bob.wakeup() <= 2000.25
    pair.clock.now = 2000.25
    late = pair.refusal(2, "worker 'bob' did not finish in time", "deadline_exceeded")
    assert pair.bob.tick(0.0, None)[:2] == [StopRequest(2), late]
    assert pair.bob.reply(2) is None
    assert pair.nothing_open()


def test_a_request_without_any_time_left_is_stopped_at_once(pair: Pair) -> None:
    assert pair.bob.receive(Envelope(pair.id, 2, 0.0), CLEANUP) == [
        HandleRequest(2, CLEANUP, pair.clock.now)
    ]
    assert pair.bob.wakeup() == pair.clock.now
    assert pair.bob.tick(0.0, None)[0] == StopRequest(2)


def test_deadlines_shrink_with_each_hop() -> None:
    clock = Clock()
    first, second = open_pair(clock), open_pair(clock)
    envelope, _ = over_the_wire(first[0].request(CleanupContextRequest, 10.0), CLEANUP)
    clock.now += 1.0  # on the wire
    [handle] = first[1].receive(envelope, CLEANUP)
    assert isinstance(handle, HandleRequest)
    assert handle.deadline == 1011.0
    clock.now += 4.0  # in the handler, which passes on what is left
    passed_on, _ = over_the_wire(second[0].request(Status, handle.deadline - clock.now), Status())
    assert passed_on.timeout == 6.0
    assert second[1].receive(passed_on, Status()) == [HandleRequest(2, Status(), 1011.0)]


def test_a_reply_in_time_makes_the_deadline_void(pair: Pair) -> None:
    pair.bob.receive(Envelope(pair.id, 2, 0.5), CLEANUP)
    assert pair.bob.reply(2) is not None
    pair.clock.now += 0.5
    assert pair.bob.tick(0.0, None) == []


def test_a_cancelled_request_is_stopped_once_and_not_answered(pair: Pair) -> None:
    pair.bob.receive(Envelope(pair.id, 2, 0.5), CLEANUP)
    assert pair.bob.receive(Envelope(pair.id), Cancel(2)) == [StopRequest(2)]
    assert pair.bob.receive(Envelope(pair.id), Cancel(2)) == []
    assert pair.bob.reply(2) is None
    pair.clock.now += 0.5
    assert pair.bob.tick(0.0, None) == []


@pytest.mark.parametrize("request_id", [0, 1, 2, 3, 2**64 - 1])
def test_cancelling_what_is_not_under_way_is_ignored(pair: Pair, request_id: int) -> None:
    pair.bob.request(Status, None)  # bob's own 1 is not alice's to cancel
    pair.bob.receive(Envelope(pair.id, 2), CLEANUP)
    pair.bob.reply(2)
    assert pair.bob.receive(Envelope(pair.id), Cancel(request_id)) == []
    assert len(pair.bob.lose("the end")) == 2


def test_a_request_is_answered_once(pair: Pair) -> None:
    pair.bob.receive(Envelope(pair.id, 2), CLEANUP)
    assert pair.bob.reply(2) == Envelope(pair.id, 2)
    assert [pair.bob.reply(request_id) for request_id in (0, 1, 2, 3)] == [None] * 4


# --- rule 5: a reply is never answered -----------------------------------------------------------


def test_a_malformed_request_is_answered_with_its_id(pair: Pair) -> None:
    for request_id in (2, 0):
        actions = pair.bob.receive_malformed(malformed("unknown field 'x'", request_id))
        assert actions == [pair.refusal(request_id, "unknown field 'x'")]
    assert pair.bob.state is State.OPEN


def test_the_answer_to_a_malformed_request_ends_it_at_its_sender(pair: Pair) -> None:
    pair.alice.request(CleanupContextRequest, None)
    [answer] = pair.bob.receive_malformed(malformed("frame is short", 2))
    assert isinstance(answer, Send)
    actions = plain(pair.alice.receive(*over_the_wire(answer.envelope, answer.message)))
    text = "worker 'bob': frame is short (by way of bob)"
    assert actions == [Failed(2, ProtocolError, text)]


def test_a_malformed_reply_ends_its_request_and_is_not_answered(pair: Pair) -> None:
    pair.alice.request(Status, None)
    text = "worker 'bob' broke the protocol: frame is short"
    error = malformed("frame is short", 2, is_reply=True)
    assert plain(pair.alice.receive_malformed(error)) == [Failed(2, ProtocolError, text)]
    assert pair.alice.receive_malformed(error) == []
    assert pair.alice.receive_malformed(malformed("frame is short", is_reply=True)) == []
    assert pair.alice.receive_malformed(malformed("no", 99, is_reply=True)) == []
    assert pair.nothing_open()


def test_answers_to_malformed_input_die_out(pair: Pair) -> None:
    sides = [pair.alice, pair.bob]
    [answer] = pair.bob.receive_malformed(malformed("garbage"))
    for hop in range(3):
        assert isinstance(answer, Send)
        assert sides[hop % 2].receive(answer.envelope, answer.message) == []


@pytest.mark.parametrize("session_id", [0, 12345])
@pytest.mark.parametrize("reply", [CLEANED, ErrorResponse("protocol_error", "no", "alice")])
def test_no_reply_is_answered_whatever_it_says(pair: Pair, session_id: int, reply: Reply) -> None:
    for request_id in (0, 1, 2, 7, 2**64 - 1):
        actions = pair.bob.receive(Envelope(session_id, request_id), reply)
        assert not any(isinstance(action, Send) for action in actions)


def test_one_way_messages_are_not_answered(pair: Pair) -> None:
    assert pair.bob.receive(Envelope(pair.id), Heartbeat()) == []
    assert pair.bob.receive(Envelope(pair.id, 5), Heartbeat()) == []
    assert pair.bob.receive(Envelope(pair.id), Cancel(5)) == []


# --- the loss of the session ---------------------------------------------------------------------


def test_a_loss_ends_everything_once(pair: Pair) -> None:
    for _ in range(3):
        pair.alice.request(Status, 1.0)
    for request_id in (4, 7, 9):
        pair.alice.receive(Envelope(pair.id, request_id), CLEANUP)
    text = "worker 'bob' (incarnation bbbbbbbb) is lost: connection reset"
    actions = pair.alice.lose("connection reset")
    assert plain(actions) == [
        StopRequest(4),
        StopRequest(7),
        StopRequest(9),
        Failed(2, WorkerLost, text),
        Failed(3, WorkerLost, text),
        Failed(4, WorkerLost, text),
        Close("connection reset"),
    ]
    outcomes = [a.outcome for a in actions if isinstance(a, FinishRequest)]
    for outcome in outcomes:
        assert isinstance(outcome, WorkerLost)
        assert (outcome.name, outcome.incarnation) == ("bob", BOB.incarnation)
        assert outcome.reason == "connection reset"
    assert len(set(map(id, outcomes))) == 3, "tasks that raise one exception share its traceback"


def test_those_who_ask_too_late_hear_the_same(pair: Pair) -> None:
    pair.alice.lose("connection reset")
    error = pair.alice.loss()
    assert str(error) == "worker 'bob' (incarnation bbbbbbbb) is lost: connection reset"


CLOSED_CALLS: list[Callable[[Session, int], list[Action] | Envelope | None]] = [
    lambda side, id_: side.lose("again"),
    lambda side, id_: side.receive(Envelope(id_, 3), CLEANUP),
    lambda side, id_: side.receive(Envelope(id_, 1), CLEANED),
    lambda side, id_: side.receive(Envelope(id_, 99), CLEANED),
    lambda side, id_: side.receive(Envelope(id_), Heartbeat()),
    lambda side, id_: side.receive(Envelope(id_), Cancel(2)),
    lambda side, id_: side.receive(Envelope(0, 1), Status()),
    lambda side, id_: side.receive_malformed(malformed("no")),
    lambda side, id_: side.receive_malformed(malformed("no", 1, is_reply=True)),
    lambda side, id_: side.tick(100.0, 100.0),
    lambda side, id_: side.cancel(1),
    lambda side, id_: side.reply(2),
]


@pytest.mark.parametrize("call", CLOSED_CALLS)
def test_a_closed_session_is_silent(
    pair: Pair, call: Callable[[Session, int], list[Action] | Envelope | None]
) -> None:
    pair.bob.request(Status, 1.0)
    pair.bob.receive(Envelope(pair.id, 2, 1.0), CLEANUP)
    pair.bob.lose("connection reset")
    pair.clock.now += 60.0
    assert not call(pair.bob, pair.id)
    assert pair.bob.state is State.CLOSED


# --- heartbeats ----------------------------------------------------------------------------------


def test_a_heartbeat_goes_out_only_when_nothing_else_did(pair: Pair) -> None:
    heartbeat = [Send(Envelope(pair.id), Heartbeat())]
    for _ in range(3):
        pair.clock.now += 0.999
        assert pair.alice.tick(0.0, 0.0) == []
        pair.clock.now += 0.001
        assert pair.alice.tick(0.0, 0.0) == heartbeat
        assert pair.alice.tick(0.0, 0.0) == []


def send_request(pair: Pair) -> None:
    pair.alice.request(PropagateGradientsRequest, None)
    pair.alice.note_sent()


def send_reply(pair: Pair) -> None:
    metadata = AutogradMetadata(1, 2)
    pair.alice.receive(Envelope(pair.id, 1), PropagateGradientsRequest(metadata, []))
    assert pair.alice.reply(1) is not None
    pair.alice.note_sent()


def send_cancel(pair: Pair) -> None:
    assert pair.alice.cancel(2)


def send_refusal(pair: Pair) -> None:
    assert pair.alice.receive_malformed(malformed("no"))


@pytest.mark.parametrize("send", [send_request, send_reply, send_cancel, send_refusal])
def test_whatever_is_sent_stands_for_a_heartbeat(pair: Pair, send: Callable[[Pair], None]) -> None:
    pair.alice.request(Status, None)
    pair.clock.now += 0.5
    send(pair)
    pair.clock.now += 0.5
    assert pair.alice.tick(0.0, 0.0) == []
    pair.clock.now += 0.5
    assert pair.alice.tick(0.0, 0.0) == [Send(Envelope(pair.id), Heartbeat())]


def test_a_request_that_was_not_sent_does_not_stand_for_a_heartbeat(pair: Pair) -> None:
    pair.clock.now += 0.5
    pair.alice.forget(pair.alice.request(Status, None).request_id)
    pair.clock.now += 0.5
    assert pair.alice.tick(0.0, 0.0) == [Send(Envelope(pair.id), Heartbeat())]


def test_what_arrives_does_not_stand_for_a_heartbeat(pair: Pair) -> None:
    pair.clock.now += 0.5
    pair.alice.receive(Envelope(pair.id), Heartbeat())
    pair.clock.now += 0.5
    assert pair.alice.tick(0.0, 0.0) == [Send(Envelope(pair.id), Heartbeat())]


def test_a_silent_peer_is_lost_with_all_that_was_asked_of_it(pair: Pair) -> None:
    pair.alice.request(Status, None)
    pair.clock.now += 0.25
    reason = "frozen: no sign of life for 7.1 s"
    assert plain(pair.alice.tick(7.1, 0.0)) == [
        Failed(2, WorkerLost, f"worker 'bob' (incarnation bbbbbbbb) is lost: {reason}"),
        Close(reason),
    ]
