"""Errors keep their type and facts from worker to worker, and nothing they hold is trusted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.session.session_pair import Clock, open_pair, over_the_wire
from zmq_autograd import errors
from zmq_autograd.errors import (
    AuthenticationError,
    ConfigurationError,
    ContextError,
    DeadlineExceeded,
    NotRegistered,
    PartialStepError,
    ProtocolError,
    RemoteError,
    ResourceExhausted,
    SerializationError,
    WorkerLost,
    ZmqAutogradError,
)
from zmq_autograd.session import FinishRequest, error_response, exception_from
from zmq_autograd.session.failures import MAX_TEXT, MAX_TRACEBACK
from zmq_autograd.wire import Envelope
from zmq_autograd.wire.messages import ErrorResponse, Status


def sent(error: BaseException, worker: str = "bob", *, send_traceback: bool = False) -> Any:
    """Return the exception that `worker`'s peer raises where `worker` replied with `error`."""
    response = error_response(error, worker, send_traceback=send_traceback)
    _, arrived = over_the_wire(Envelope(), response)
    assert isinstance(arrived, ErrorResponse)
    assert arrived == response
    return exception_from(arrived, worker)


def raised(error: BaseException) -> BaseException:
    """Return `error` as a handler leaves it: with the place where it was raised."""
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001  # any may be passed in
        return caught


OURS: list[tuple[ZmqAutogradError, dict[str, object]]] = [
    (
        NotRegistered("no function 'stage'", type_name="NotRegistered", worker="bob"),
        {"message": "no function 'stage'", "type_name": "NotRegistered", "traceback": None},
    ),
    (
        RemoteError("bad shape", type_name="ValueError", worker="bob", traceback="line 7"),
        {"message": "bad shape", "type_name": "ValueError", "traceback": "line 7"},
    ),
    (ProtocolError("frame is short", worker="bob"), {"request_id": 0, "is_reply": False}),
    (
        WorkerLost("bob", "c" * 32, "frozen"),
        {"name": "bob", "incarnation": "c" * 32, "reason": "frozen"},
    ),
    (WorkerLost("bob"), {"name": "bob", "incarnation": "", "reason": ""}),
    (
        DeadlineExceeded("no gradient", workers=("bob", "dave"), message_ids=(3, 2**64 - 1)),
        {"workers": ("bob", "dave"), "message_ids": (3, 2**64 - 1)},
    ),
    (ContextError("no context 7", worker="bob", context_id=7), {"context_id": 7}),
    (AuthenticationError("key refused", worker="bob"), {}),
    (ResourceExhausted("out of credit", worker="bob"), {}),
]


def of_type(value: object) -> str:
    return type(value).__name__ if isinstance(value, ZmqAutogradError) else ""


# --- our own errors ------------------------------------------------------------------------------


def test_every_error_of_the_package_either_keeps_its_type_or_is_of_this_side_only() -> None:
    kept = {type(error) for error, _ in OURS}
    names = {getattr(errors, name) for name in errors.__all__}
    here_only = {ConfigurationError, SerializationError, PartialStepError}
    assert names - kept == {ZmqAutogradError, *here_only}


@pytest.mark.parametrize(("error", "facts"), OURS, ids=of_type)
def test_an_error_keeps_its_type_and_facts(
    error: ZmqAutogradError, facts: dict[str, object]
) -> None:
    received = sent(error)
    assert type(received) is type(error)
    assert {name: getattr(received, name) for name in facts} == facts
    assert (received.worker, received.path) == ("bob", ("bob",))
    assert "'bob'" in str(received)


@pytest.mark.parametrize(("error", "facts"), OURS, ids=of_type)
def test_an_error_three_hops_away_still_names_where_it_happened(
    error: ZmqAutogradError, facts: dict[str, object]
) -> None:
    received = sent(sent(sent(error, "bob"), "carol"), "dave")
    assert type(received) is type(error)
    assert {name: getattr(received, name) for name in facts} == facts
    assert (received.worker, received.path) == ("bob", ("dave", "carol", "bob"))
    assert "'bob'" in str(received)
    assert "(by way of dave -> carol -> bob)" in str(received)
    assert str(received).count("by way of") == 1


def test_a_lost_worker_is_named_though_another_one_tells() -> None:
    received = sent(WorkerLost("carol", "c" * 32, "frozen"), "bob")
    assert (received.name, received.path) == ("carol", ("bob",))
    assert str(received) == "worker 'carol' (incarnation cccccccc) is lost: frozen (by way of bob)"


def test_an_error_about_no_worker_is_about_the_one_that_tells() -> None:
    received = sent(DeadlineExceeded("out of time"))
    assert (received.worker, received.workers) == ("bob", ("bob",))
    assert str(received) == "worker 'bob': out of time (by way of bob)"


@pytest.mark.parametrize("name", ["o", "out", "time"])
def test_a_name_that_is_part_of_the_text_by_chance_is_named_all_the_same(name: str) -> None:
    received = sent(ContextError("out of time", worker=name), name)
    assert str(received).startswith(f"worker {name!r}: out of time")


@pytest.mark.parametrize("kind", [ConfigurationError, SerializationError, ZmqAutogradError])
def test_what_concerns_this_side_only_arrives_as_a_remote_error(
    kind: type[ZmqAutogradError],
) -> None:
    received = sent(kind("no such setting"))
    assert type(received) is RemoteError
    assert (received.type_name, received.message) == (kind.__name__, "no such setting")


def test_a_request_refused_by_the_limit_may_be_repeated() -> None:
    assert error_response(ResourceExhausted("full"), "bob").retryable
    assert not error_response(ValueError("full"), "bob").retryable


# --- everything else that a handler may raise ----------------------------------------------------


def test_an_exception_arrives_as_a_remote_error() -> None:
    received = sent(ValueError("bad shape"))
    assert type(received) is RemoteError
    assert (received.type_name, received.message) == ("ValueError", "bad shape")
    assert (received.worker, received.path, received.traceback) == ("bob", ("bob",), None)
    assert str(received) == "ValueError on worker 'bob': bad shape"


def test_a_handler_cannot_pass_as_ours_by_its_name() -> None:
    class WorkerLost(Exception):
        name, incarnation, reason, path = "carol", "c" * 32, "frozen", ("carol",)

    received = sent(WorkerLost("not ours"))
    assert type(received) is RemoteError
    assert (received.type_name, received.message) == ("WorkerLost", "not ours")


def test_a_subclass_of_ours_arrives_as_a_remote_error() -> None:
    class Timeout(DeadlineExceeded):
        pass

    received = sent(Timeout("the simulator is slow"))
    assert type(received) is RemoteError
    assert (received.type_name, received.message) == ("Timeout", "the simulator is slow")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class NoText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("error", "cause"), [(Unspeakable(), "RuntimeError"), (NoText(), "TypeError")]
)
def test_an_exception_that_cannot_be_described_is_reported(error: Exception, cause: str) -> None:
    received = sent(raised(error), send_traceback=True)
    assert received.type_name == type(error).__name__
    assert received.message == f"<its description raised {cause}>"
    assert "in raised" in received.traceback


def test_a_traceback_that_cannot_be_made_is_reported() -> None:
    error = SyntaxError("odd", ("file", 1, 1, ""))
    error.text = 5  # type: ignore[assignment]  # what is no string trips `traceback`
    received = sent(raised(error), send_traceback=True)
    assert received.type_name == "SyntaxError"
    assert received.traceback == "<its description raised AttributeError>"


@pytest.mark.parametrize("kind", [ValueError, ProtocolError, ContextError, ResourceExhausted])
def test_an_emptied_error_is_reported(kind: type[Exception]) -> None:
    error = kind("text")
    error.args = ()
    assert "'bob'" in str(sent(error))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_proper_is_reported_too(kind: type[BaseException]) -> None:
    assert sent(kind()).type_name == kind.__name__


# --- tracebacks ----------------------------------------------------------------------------------


def test_a_traceback_travels_only_where_allowed() -> None:
    error = raised(ValueError("bad shape"))
    assert sent(error).traceback is None
    told = sent(error, send_traceback=True)
    assert "in raised" in told.traceback
    assert told.traceback.endswith("ValueError: bad shape\n")
    assert f"Remote traceback, worker 'bob':\n{told.traceback.rstrip()}" in str(told)


def test_the_first_workers_traceback_survives_every_hop() -> None:
    first = sent(raised(ValueError("bad shape")), send_traceback=True)
    last = sent(raised(sent(raised(first), "carol", send_traceback=True)), "dave")
    assert last.traceback == first.traceback
    assert "'bob'" in str(last)


@pytest.mark.parametrize(("error", "facts"), OURS, ids=of_type)
def test_our_own_errors_tell_no_place_in_this_workers_code(
    error: ZmqAutogradError, facts: dict[str, object]
) -> None:
    response = error_response(raised(error), "bob", send_traceback=True)
    assert response.traceback == facts.get("traceback")


# --- bounds --------------------------------------------------------------------------------------

LONG = "x" * 100_000


@pytest.mark.parametrize(
    "error",
    [
        ValueError(LONG),
        ProtocolError(LONG),
        ContextError(LONG),
        WorkerLost("bob", "", LONG),
        RemoteError(LONG, type_name="E", worker="bob"),
        SerializationError(LONG),
    ],
    ids=lambda error: type(error).__name__,
)
def test_texts_are_cut(error: Exception) -> None:
    response = error_response(error, "bob")
    assert len(response.text) == MAX_TEXT
    assert set(response.text) == {"x"}


def test_tracebacks_keep_their_end() -> None:
    response = error_response(raised(ValueError(LONG + "end")), "bob", send_traceback=True)
    assert response.traceback is not None
    assert len(response.traceback) == MAX_TRACEBACK
    assert response.traceback.endswith("xend\n")
    relayed = RemoteError("no", type_name="E", worker="eve", traceback=LONG + "end")
    again = error_response(relayed, "bob").traceback
    assert again is not None
    assert len(again) == MAX_TRACEBACK
    assert again.endswith("xend")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no file '\udcff'"),
        ContextError("no file '\udcff'"),
        WorkerLost("bob", "", "no file '\udcff'"),
        RemoteError("no file '\udcff'", type_name="E", worker="bob", traceback="\ud800"),
        ResourceExhausted("no file '\udcff'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lone_surrogates_travel_as_question_marks(error: Exception) -> None:
    received = sent(raised(error), send_traceback=True)
    assert "no file '?'" in str(received)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(), max_size=50), hops=st.lists(st.text(max_size=9), max_size=4))
def test_any_text_crosses_any_workers(text: str, hops: list[str]) -> None:
    error: BaseException = ValueError(text)
    for hop in hops:
        encodable = hop.encode("utf-8", "replace").decode() or "nobody"
        error = sent(error, encodable)
    assert isinstance(error, RemoteError if hops else ValueError)


# --- what a peer may say -------------------------------------------------------------------------


def test_an_unknown_code_is_a_remote_error() -> None:
    received = exception_from(ErrorResponse("quota", "no more", "bob"), "bob")
    assert type(received) is RemoteError
    assert (received.type_name, received.worker) == ("quota", "bob")
    assert str(received) == "quota on worker 'bob': no more"


@pytest.mark.parametrize("code", ["", "ConfigurationError", "worker_lost ", "__class__", "exit"])
def test_codes_are_looked_up_nowhere(code: str) -> None:
    assert type(exception_from(ErrorResponse(code, "no", "bob"), "bob")) is RemoteError


@pytest.mark.parametrize(
    "code",
    [
        "not_registered",
        "remote_error",
        "protocol_error",
        "worker_lost",
        "deadline_exceeded",
        "context_error",
        "authentication_error",
        "resource_exhausted",
        "quota",
    ],
)
def test_an_error_without_facts_is_about_the_peer(code: str) -> None:
    received = exception_from(ErrorResponse(code, "", ""), "bob")
    assert received.worker == "bob"
    assert "'bob'" in str(received)


def test_an_error_about_another_worker_names_that_one() -> None:
    received = exception_from(ErrorResponse("context_error", "no context", "carol"), "bob")
    assert str(received) == "worker 'carol': no context"


def test_an_undescribable_exception_leaves_the_session_alive() -> None:
    alice, bob = open_pair(Clock())
    bob.receive(alice.request(Status, None), Status())
    envelope = bob.reply(2)
    assert envelope is not None
    response = error_response(raised(Unspeakable()), "bob", send_traceback=True)
    [finish] = alice.receive(*over_the_wire(envelope, response))
    assert isinstance(finish, FinishRequest)
    assert isinstance(finish.outcome, RemoteError)
