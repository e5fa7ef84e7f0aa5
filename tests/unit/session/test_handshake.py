"""Rule 1: who dialled says Hello, who accepted answers Welcome; anything else ends the session."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.session.session_pair import (
    ALICE,
    BOB,
    Clock,
    Failed,
    accepting,
    dialling,
    open_pair,
    over_the_wire,
    plain,
)
from zmq_autograd.errors import DeadlineExceeded, ProtocolError, ResourceExhausted, WorkerLost
from zmq_autograd.session import Close, FinishRequest, Identity, Opened, Send, State, error_response
from zmq_autograd.wire import Envelope, Limits
from zmq_autograd.wire.messages import (
    Cancel,
    CleanupContextRequest,
    CleanupContextResponse,
    ErrorResponse,
    Heartbeat,
    Hello,
    Message,
    Status,
    Welcome,
)

HELLO = Hello("alice", ALICE.incarnation)
WELCOME = Welcome("bob", BOB.incarnation)


def refusal(problem: str) -> ErrorResponse:
    return ErrorResponse("protocol_error", problem, "bob", "ProtocolError", path=("bob",))


# --- both ways -----------------------------------------------------------------------------------


def test_hello_is_the_first_request_and_belongs_to_no_session() -> None:
    dialled = dialling(Clock())
    assert dialled.start(10.0) == Send(Envelope(0, 1, 10.0), HELLO)
    assert (dialled.state, dialled.peer, dialled.peer_name) == (State.DIALLED, None, "tcp://bob")


def test_hello_is_answered_with_welcome_and_opens_the_session() -> None:
    accepted = accepting(Clock())
    actions = accepted.receive(Envelope(0, 1), HELLO)
    assert accepted.session_id > 0
    assert actions == [Send(Envelope(accepted.session_id, 1), WELCOME), Opened(ALICE)]
    assert (accepted.state, accepted.peer, accepted.peer_name) == (State.OPEN, ALICE, "alice")


def test_welcome_opens_the_session_and_ends_the_hello() -> None:
    dialled = dialling(Clock())
    dialled.start()
    actions = dialled.receive(Envelope(77, 1), WELCOME)
    assert actions == [Opened(BOB), FinishRequest(1, WELCOME)]
    assert (dialled.state, dialled.session_id, dialled.peer_name) == (State.OPEN, 77, "bob")


def test_each_side_learns_all_that_the_other_says_of_itself() -> None:
    clock = Clock()
    alice = Identity("alice", "1" * 32, Limits(frames=7), ("chunks",), 0.5)
    bob = Identity("bob", "2" * 32, Limits(requests=3), ("shared_memory", "credit"), 2.0)
    dialled, accepted = dialling(clock, alice), accepting(clock, bob)
    hello = dialled.start()
    welcome = accepted.receive(*over_the_wire(hello.envelope, hello.message))[0]
    assert isinstance(welcome, Send)
    dialled.receive(*over_the_wire(welcome.envelope, welcome.message))
    assert (dialled.peer, accepted.peer) == (bob, alice)
    assert dialled.session_id == accepted.session_id


def test_every_session_gets_another_id() -> None:
    assert len({open_pair(Clock())[0].session_id for _ in range(50)}) == 50


# --- what ends it at the accepting side ----------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [Status(), CleanupContextRequest(5), Heartbeat(), Cancel(1)],
    ids=lambda message: type(message).__name__,
)
def test_anything_but_hello_is_refused(message: Message) -> None:
    accepted = accepting(Clock())
    problem = f"expected Hello, got {type(message).__name__}"
    actions = accepted.receive(Envelope(0, 9), message)
    assert actions == [Send(Envelope(0, 9), refusal(problem)), Close(problem)]
    assert accepted.state is State.CLOSED


@pytest.mark.parametrize("message", [WELCOME, ErrorResponse("x", "y", "z")])
def test_a_reply_instead_of_hello_is_not_answered(message: Message) -> None:
    accepted = accepting(Clock())
    actions = accepted.receive(Envelope(0, 1), message)
    assert actions == [Close(f"expected Hello, got {type(message).__name__}")]


def test_another_version_is_refused_by_both_numbers() -> None:
    accepted = accepting(Clock())
    actions = accepted.receive(Envelope(0, 1), replace(HELLO, version=2))
    problem = "expected protocol version 1, got 2"
    assert actions == [Send(Envelope(0, 1), refusal(problem)), Close(problem)]
    assert (accepted.state, accepted.session_id) == (State.CLOSED, 0)


def test_hello_without_request_id_is_refused() -> None:
    accepted = accepting(Clock())
    problem = "expected a request id on Hello, got none"
    actions = accepted.receive(Envelope(0, 0), HELLO)
    assert actions == [Send(Envelope(0, 0), refusal(problem)), Close(problem)]


@pytest.mark.parametrize("request_id", [0, 4])
def test_no_message_at_all_is_answered_and_ends_it(request_id: int) -> None:
    accepted = accepting(Clock())
    actions = accepted.receive_malformed(ProtocolError("no map", request_id=request_id))
    assert actions == [Send(Envelope(0, request_id), refusal("no map")), Close("no map")]
    assert accepted.state is State.CLOSED


def test_a_malformed_reply_before_hello_ends_it_in_silence() -> None:
    error = ProtocolError("no map", request_id=1)
    error.is_reply = True
    assert accepting(Clock()).receive_malformed(error) == [Close("no map")]


# --- what ends it at the dialling side -----------------------------------------------------------


def broken(problem: str) -> list[object]:
    text = f"worker 'tcp://bob' broke the protocol: {problem}"
    return [Failed(1, ProtocolError, text), Close(text)]


@pytest.mark.parametrize(
    ("envelope", "message", "problem"),
    [
        (Envelope(77, 1), HELLO, "expected Welcome, got Hello"),
        (Envelope(77, 0), Heartbeat(), "expected Welcome, got Heartbeat"),
        (Envelope(77, 0), Cancel(1), "expected Welcome, got Cancel"),
        (
            Envelope(77, 1),
            CleanupContextResponse(),
            "expected Welcome, got CleanupContextResponse",
        ),
        (Envelope(77, 3), Status(), "expected Welcome, got Status"),
        (Envelope(0, 1), WELCOME, "expected a session id on Welcome, got none"),
        (Envelope(77, 2), WELCOME, "expected Welcome to our Hello, got one to request 2"),
        (Envelope(77, 0), WELCOME, "expected Welcome to our Hello, got one to request 0"),
        (Envelope(77, 1), replace(WELCOME, version=9), "expected protocol version 1, got 9"),
    ],
)
def test_anything_but_a_right_welcome_ends_it_without_an_answer(
    envelope: Envelope, message: Message, problem: str
) -> None:
    dialled = dialling(Clock())
    dialled.start()
    assert plain(dialled.receive(envelope, message)) == broken(problem)
    assert (dialled.state, dialled.peer) == (State.CLOSED, None)


@pytest.mark.parametrize("is_reply", [True, False])
def test_what_is_no_message_instead_of_welcome_breaks_the_protocol(is_reply: bool) -> None:
    dialled = dialling(Clock())
    dialled.start()
    error = ProtocolError("header: expected a map, got int", request_id=int(is_reply))
    error.is_reply = is_reply
    assert plain(dialled.receive_malformed(error)) == broken("header: expected a map, got int")


def test_a_refusal_keeps_its_type() -> None:
    dialled = dialling(Clock())
    dialled.start()
    full = error_response(ResourceExhausted("too many sessions", worker="bob"), "bob")
    actions = plain(dialled.receive(Envelope(0, 1), full))
    text = "worker 'bob': too many sessions (by way of bob)"
    assert actions == [Failed(1, ResourceExhausted, text), Close(text)]


def test_a_loss_before_welcome_names_the_address() -> None:
    dialled = dialling(Clock())
    dialled.start()
    lost = Failed(1, WorkerLost, "worker 'tcp://bob' is lost: connection refused")
    assert plain(dialled.lose("connection refused")) == [lost, Close("connection refused")]


def test_a_hello_that_is_not_answered_in_time_ends() -> None:
    clock = Clock()
    dialled = dialling(clock)
    dialled.start(2.0)
    clock.now += 2.0
    text = "no reply from worker 'tcp://bob' within 2 s"
    assert plain(dialled.tick(0.0, None)) == [Failed(1, DeadlineExceeded, text)]
    late = plain(dialled.receive(Envelope(77, 1), WELCOME))
    problem = "expected Welcome to our Hello, got one to request 1"
    assert late == [Close(f"worker 'tcp://bob' broke the protocol: {problem}")]


# --- before and after it -------------------------------------------------------------------------


@pytest.mark.parametrize("dialled", [True, False])
def test_time_alone_does_nothing_before_the_handshake(dialled: bool) -> None:
    clock = Clock()
    session = dialling(clock) if dialled else accepting(clock)
    for _ in range(100):
        assert session.wakeup() > clock.now, "the owner's timer would spin"
        clock.now = session.wakeup()
        assert session.tick(60.0, 60.0) == []


def test_silence_before_the_handshake_does_not_count_after_it() -> None:
    clock = Clock()
    dialled = dialling(clock)
    dialled.start()
    for _ in range(400):
        clock.now += 0.25
        dialled.tick(clock.now - 1000.0, 0.0)
    dialled.receive(Envelope(77, 1), WELCOME)
    clock.now += 0.25
    assert dialled.tick(0.25, 0.25) == [Send(Envelope(77), Heartbeat())]


def test_a_second_hello_is_refused_and_the_session_goes_on() -> None:
    _, accepted = open_pair(Clock())
    session_id = accepted.session_id
    actions = accepted.receive(Envelope(session_id, 2), HELLO)
    problem = "expected no second Hello in a session"
    assert actions == [Send(Envelope(session_id, 2), refusal(problem))]
    assert accepted.state is State.OPEN


def test_a_hello_for_no_session_is_refused_and_the_session_goes_on() -> None:
    _, accepted = open_pair(Clock())
    session_id = accepted.session_id
    problem = f"expected session {session_id}, got 0"
    actions = accepted.receive(Envelope(0, 1), HELLO)
    assert actions == [Send(Envelope(session_id, 1), refusal(problem))]
    assert (accepted.session_id, accepted.state) == (session_id, State.OPEN)
