"""What the tests of the session share: a clock to set, two workers, and actions to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zmq_autograd.session import (
    LOST_AFTER_SECONDS,
    Action,
    FinishRequest,
    Identity,
    Send,
    Session,
    State,
)
from zmq_autograd.wire import Envelope, encode, open_envelope
from zmq_autograd.wire.messages import Message

ALICE = Identity("alice", "a" * 32)
BOB = Identity("bob", "b" * 32)


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Failed:
    """A `FinishRequest` whose outcome is an error: errors compare by identity, this by content."""

    request_id: int
    kind: type[BaseException]
    text: str


def plain(actions: Sequence[Action]) -> list[Action | Failed]:
    """Make `actions` comparable."""
    return [
        Failed(action.request_id, type(action.outcome), str(action.outcome))
        if isinstance(action, FinishRequest) and isinstance(action.outcome, BaseException)
        else action
        for action in actions
    ]


def dialling(clock: Clock, me: Identity = ALICE, lost_after: float = LOST_AFTER_SECONDS) -> Session:
    """Return the side that dials, before its Hello."""
    return Session(me, "tcp://bob", clock, dialled=True, lost_after=lost_after)


def accepting(clock: Clock, me: Identity = BOB, lost_after: float = LOST_AFTER_SECONDS) -> Session:
    """Return the side that accepted."""
    return Session(me, "tcp://alice", clock, dialled=False, lost_after=lost_after)


def open_pair(
    clock: Clock, *, alice: Identity = ALICE, bob: Identity = BOB
) -> tuple[Session, Session]:
    """Return alice's and bob's sides of a session that is open."""
    dialled, accepted = dialling(clock, alice), accepting(clock, bob)
    hello = dialled.start()
    welcome = accepted.receive(hello.envelope, hello.message)[0]
    assert isinstance(welcome, Send)
    dialled.receive(welcome.envelope, welcome.message)
    assert (dialled.state, accepted.state) == (State.OPEN, State.OPEN)
    return dialled, accepted


def over_the_wire(envelope: Envelope, message: Message) -> tuple[Envelope, Message]:
    """Return what the peer reads of `message` in `envelope`."""
    return open_envelope(encode(message, envelope))


def limited_to(requests: int, me: Identity = BOB) -> Identity:
    """Return `me` with a smaller limit of requests."""
    return replace(me, limits=replace(me.limits, requests=requests))
