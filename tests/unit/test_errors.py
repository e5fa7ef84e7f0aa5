"""The tree of errors: what each one also is, what it says, and the facts that it carries."""

from __future__ import annotations

import pytest

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

REMOTE = RemoteError(
    "x is negative",
    type_name="ValueError",
    worker="carol",
    traceback="Traceback:\n  line 1\n",
    path=("bob", "carol"),
)

TEXTS: list[tuple[ZmqAutogradError, str]] = [
    (ZmqAutogradError("nothing works"), "nothing works"),
    (ConfigurationError("no keys"), "no keys"),
    (SerializationError("a set cannot travel"), "a set cannot travel"),
    (ProtocolError("worker 'bob' sent garbage", worker="bob"), "worker 'bob' sent garbage"),
    (
        RemoteError("x is negative", type_name="ValueError", worker="bob", path=("bob",)),
        "ValueError on worker 'bob': x is negative",
    ),
    (
        REMOTE,
        "ValueError on worker 'carol': x is negative (by way of bob -> carol)\n\n"
        "Remote traceback, worker 'carol':\nTraceback:\n  line 1",
    ),
    (
        NotRegistered("nothing is registered as 'f'", type_name="NotRegistered", worker="bob"),
        "NotRegistered on worker 'bob': nothing is registered as 'f'",
    ),
    (
        WorkerLost("bob", "0123456789abcdef" * 2, "its process ended"),
        "worker 'bob' (incarnation 01234567) is lost: its process ended",
    ),
    (
        WorkerLost("tcp://127.0.0.1:9", reason="connection refused"),
        "worker 'tcp://127.0.0.1:9' is lost: connection refused",
    ),
    (
        DeadlineExceeded("no reply from worker 'bob' within 2 s", workers=("bob",)),
        "no reply from worker 'bob' within 2 s",
    ),
    (
        PartialStepError(applied=["alice"], not_applied=["bob"], causes={"bob": ValueError("no")}),
        "the step did not succeed on every worker; applied: 'alice'; "
        "not applied: 'bob' (ValueError: no)",
    ),
    (
        PartialStepError(not_applied=["bob", "dora"], unknown=["carol"], causes={"carol": REMOTE}),
        "the step did not succeed on every worker; not applied: 'bob', 'dora'; not known whether "
        "it was applied: 'carol' (RemoteError: ValueError on worker 'carol': x is negative (by way "
        "of bob -> carol))",
    ),
    (ContextError("worker 'bob' has no context 7", context_id=7), "worker 'bob' has no context 7"),
    (AuthenticationError("worker 'bob' refused our key"), "worker 'bob' refused our key"),
    (ResourceExhausted("worker 'bob' would refuse this"), "worker 'bob' would refuse this"),
]


@pytest.mark.parametrize(("error", "text"), TEXTS, ids=lambda case: type(case).__name__)
def test_text(error: ZmqAutogradError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (ConfigurationError, ValueError),
        (SerializationError, TypeError),
        (NotRegistered, LookupError),
        (NotRegistered, RemoteError),
        (DeadlineExceeded, TimeoutError),
        *((getattr(errors, name), ZmqAutogradError) for name in errors.__all__),
    ],
)
def test_each_is_caught_as_what_it_also_is(kind: type[Exception], also: type[Exception]) -> None:
    assert issubclass(kind, also)


def test_all_errors_are_public_and_all_have_a_text_here() -> None:
    types = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    kinds = {kind.__name__ for kind in types if issubclass(kind, BaseException)}
    assert kinds == set(errors.__all__)
    assert {type(error).__name__ for error, _ in TEXTS} == set(errors.__all__)


def test_facts() -> None:
    error = ZmqAutogradError("text", worker="bob", path=["bob", "carol"])
    assert (error.worker, error.path) == ("bob", ("bob", "carol"))
    assert (ZmqAutogradError("text").worker, ZmqAutogradError("text").path) == (None, ())

    broken = ProtocolError("text", request_id=7)
    assert (broken.request_id, broken.is_reply) == (7, False)

    assert (REMOTE.type_name, REMOTE.message, REMOTE.worker) == (
        "ValueError",
        "x is negative",
        "carol",
    )
    assert REMOTE.traceback == "Traceback:\n  line 1\n"
    assert REMOTE.path == ("bob", "carol")

    lost = WorkerLost("bob", "ab" * 16, "frozen", path=("carol",))
    assert (lost.name, lost.worker, lost.incarnation, lost.reason, lost.path) == (
        "bob",
        "bob",
        "ab" * 16,
        "frozen",
        ("carol",),
    )

    late = DeadlineExceeded("text", workers=["bob", "carol"], message_ids=[3, 4])
    assert (late.worker, late.workers, late.message_ids) == ("bob", ("bob", "carol"), (3, 4))
    assert DeadlineExceeded("text").worker is None

    cause = ValueError("no")
    partial = PartialStepError(
        applied=["alice"], not_applied=["bob"], unknown=["carol"], causes={"bob": cause}
    )
    assert (partial.applied, partial.not_applied, partial.unknown) == (
        ("alice",),
        ("bob",),
        ("carol",),
    )
    assert (partial.causes, partial.worker) == ({"bob": cause}, "bob")

    gone = ContextError("text", context_id=9, worker="bob")
    assert (gone.context_id, gone.worker) == (9, "bob")


def test_a_way_of_one_worker_is_not_told() -> None:
    direct = RemoteError("text", type_name="E", worker="bob", path=("bob",))
    assert "by way of" not in str(direct)
