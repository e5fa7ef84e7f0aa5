"""Two sessions joined by two queues, driven by any order of events: what must hold always, holds.

The messages between them go through the real codec.  The peer of either may also send garbage,
repeat what it sent, or answer what it was not asked, and the link may break at any time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.unit.session.session_pair import ALICE, BOB, Clock, accepting, dialling, limited_to
from zmq_autograd import ids
from zmq_autograd.errors import ProtocolError, WorkerLost, ZmqAutogradError
from zmq_autograd.ids import MAX_ID
from zmq_autograd.session import (
    Action,
    Close,
    FinishRequest,
    HandleRequest,
    Opened,
    Send,
    Session,
    State,
    StopRequest,
    error_response,
)
from zmq_autograd.wire import Buffer, Envelope, encode, open_envelope
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    Cancel,
    CleanupContextRequest,
    CleanupContextResponse,
    ErrorResponse,
    Heartbeat,
    Hello,
    Message,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    Reply,
    Request,
    Status,
    StatusResponse,
)

LIMIT = 3
"""Requests that either side lets run at once: small, so that it is met."""

LONGEST_TIMEOUT = 30.0

REQUESTS: list[Request] = [
    Status(),
    CleanupContextRequest(5),
    PropagateGradientsRequest(AutogradMetadata(1, 2), [None]),
]
RIGHT: dict[type[Request], Reply] = {
    Status: StatusResponse({"busy": False}),
    CleanupContextRequest: CleanupContextResponse(),
    PropagateGradientsRequest: PropagateGradientsResponse(),
}
LOST: list[Buffer] = []
"""Stands in a queue for the end of the link."""


@dataclass
class Side:
    """One session, its owner, and the queue of what is on the way to it."""

    session: Session
    inbox: deque[list[Buffer]] = field(default_factory=deque)
    # What was delivered last, to be delivered again.
    delivered: list[Buffer] | None = None
    heard_at: float = 0.0
    # Our requests: those that have not ended, and all there were.
    open: dict[int, Request] = field(default_factory=dict)
    last_id: int = 0
    # Those that a bad peer of the peer cancelled in our name: nobody will reply.
    betrayed: set[int] = field(default_factory=set)
    # The peer's requests: those that run, and all that were handled.
    running: dict[int, Request] = field(default_factory=dict)
    handled: list[int] = field(default_factory=list)
    closed: bool = False

    @property
    def is_open(self) -> bool:
        return self.session.state is State.OPEN


class TwoSessions(RuleBasedStateMachine):
    """Alice dialled bob."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.alice = Side(dialling(self.clock, limited_to(LIMIT, ALICE)))
        self.bob = Side(accepting(self.clock, limited_to(LIMIT, BOB)))
        self.sides = {True: self.alice, False: self.bob}
        for side in self.sides.values():
            side.heard_at = self.clock.now
        hello = self.alice.session.start(LONGEST_TIMEOUT)
        assert isinstance(hello.message, Hello)
        self.alice.open[1], self.alice.last_id = hello.message, 1
        self.perform(self.alice, [hello])

    @initialize(handshake=st.sampled_from([True] * 9 + [False]))
    def shake_hands(self, handshake: bool) -> None:
        if handshake:
            self.deliver_one(self.bob)
            self.deliver_one(self.alice)
            assert self.alice.is_open
            assert self.bob.is_open

    # --- an owner, as simple as can be -----------------------------------------------------------

    def peer(self, side: Side) -> Side:
        return self.bob if side is self.alice else self.alice

    def put(self, side: Side, frames: list[Buffer]) -> None:
        """Put `frames` on the way to `side`."""
        if not side.closed:
            side.inbox.append(frames)
            side.heard_at = self.clock.now

    def perform(self, side: Side, actions: list[Action]) -> None:
        """Carry out `actions` and check that each may be asked for."""
        for action in actions:
            assert not side.closed, "nothing comes after Close"
            match action:
                case Send(envelope, message):
                    self.put(self.peer(side), encode(message, envelope))
                case Opened(peer):
                    assert peer.name == ("bob" if side is self.alice else "alice")
                case HandleRequest(request_id, message):
                    assert request_id > max(side.handled, default=0), "ids grow, each is used once"
                    side.handled.append(request_id)
                    side.running[request_id] = message
                case StopRequest(request_id):
                    del side.running[request_id]
                case FinishRequest(request_id, outcome):
                    request = side.open.pop(request_id)
                    assert isinstance(outcome, (request.reply, ZmqAutogradError))
                case Close():
                    side.closed = True
                    self.put(self.peer(side), LOST)
        if side.closed:
            assert side.session.state is State.CLOSED
            assert not side.open
            assert not side.running

    def deliver_one(self, side: Side) -> None:
        frames = side.inbox.popleft()
        if frames is LOST:
            self.perform(side, side.session.lose("the link broke"))
            return
        side.delivered = frames
        try:
            envelope, message = open_envelope(frames)
        except ProtocolError as error:
            actions = side.session.receive_malformed(error)
            answers = error.is_reply
        else:
            actions = side.session.receive(envelope, message)
            answers = isinstance(message, Reply)
        sends = [action for action in actions if isinstance(action, Send)]
        assert len(sends) <= (0 if answers else 1), "a reply is never answered"
        self.perform(side, actions)

    def tick(self, side: Side) -> None:
        expired = len(side.open) + len(side.running)
        actions = side.session.tick(self.clock.now - side.heard_at, None)
        assert sum(isinstance(action, Send) for action in actions) <= expired + 1
        self.perform(side, actions)

    # --- what either side does -------------------------------------------------------------------

    @precondition(lambda self: self.alice.is_open or self.bob.is_open)
    @rule(
        data=st.data(),
        message=st.sampled_from(REQUESTS),
        timeout=st.sampled_from([None, 0.0, 0.25, 2.0, LONGEST_TIMEOUT]),
        count=st.integers(1, LIMIT + 1),
    )
    def request(self, data: Any, message: Request, timeout: float | None, count: int) -> None:
        side = data.draw(st.sampled_from([s for s in self.sides.values() if s.is_open]))
        for _ in range(count):
            self.request_one(side, message, timeout, sends=True)
        self.request_one(side, message, timeout, sends=False)

    def request_one(
        self, side: Side, message: Request, timeout: float | None, *, sends: bool
    ) -> None:
        envelope = side.session.request(type(message), timeout)
        side.session.note_sent()
        assert envelope.request_id > side.last_id
        side.last_id = envelope.request_id
        if sends:
            side.open[envelope.request_id] = message
            self.put(self.peer(side), encode(message, envelope))
        else:
            side.session.forget(envelope.request_id)

    @precondition(lambda self: self.alice.running or self.bob.running)
    @rule(data=st.data(), kind=st.sampled_from(["right", "right", "wrong", "error"]))
    def reply(self, data: Any, kind: str) -> None:
        side = data.draw(st.sampled_from([s for s in self.sides.values() if s.running]))
        request_id = data.draw(st.sampled_from(sorted(side.running)))
        request = side.running.pop(request_id)
        envelope = side.session.reply(request_id)
        assert envelope is not None, "who runs a request may reply"
        message: Message = RIGHT[type(request)]
        if kind == "wrong":
            message = RIGHT[Status if not isinstance(request, Status) else CleanupContextRequest]
        if kind == "error":
            message = error_response(ValueError("no such layer"), side.session.me.name)
        self.put(self.peer(side), encode(message, envelope))

    @rule(is_alice=st.booleans(), data=st.data())
    def reply_where_nobody_waits(self, is_alice: bool, data: Any) -> None:
        side = self.sides[is_alice]
        ended = sorted(set(side.handled) - set(side.running))
        request_id = data.draw(st.sampled_from([0, MAX_ID, *ended]))
        if request_id not in side.running:
            assert side.session.reply(request_id) is None

    @rule(is_alice=st.booleans(), data=st.data())
    def cancel(self, is_alice: bool, data: Any) -> None:
        side = self.sides[is_alice]
        choices = sorted(side.open) if side.is_open and side.open else [0, side.last_id + 1]
        request_id = data.draw(st.sampled_from(choices))
        side.open.pop(request_id, None)
        self.perform(side, side.session.cancel(request_id))
        assert side.session.cancel(request_id) == []

    # --- what the network and the clock do -------------------------------------------------------

    @precondition(lambda self: self.alice.inbox or self.bob.inbox)
    @rule(data=st.data(), count=st.sampled_from([1, 20, 20]))
    def deliver(self, data: Any, count: int) -> None:
        side = data.draw(st.sampled_from([s for s in self.sides.values() if s.inbox]))
        for _ in range(min(count, len(side.inbox))):
            self.deliver_one(side)

    @rule(steps=st.integers(1, 12))
    def time_passes(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.now += 0.25
            for side in self.sides.values():
                self.tick(side)

    @rule(steps=st.sampled_from([2, 6, 24, 80]), is_alice=st.booleans())
    def one_side_stalls(self, steps: int, is_alice: bool) -> None:
        stalled = self.sides[is_alice]
        for _ in range(steps):
            self.clock.now += 0.25
            self.tick(self.peer(stalled))
        was_open = stalled.is_open
        self.tick(stalled)
        if steps > 5:
            assert stalled.is_open is was_open, "its own stall is not the peer's death"

    @precondition(lambda self: self.alice.is_open and self.bob.is_open)
    @rule(is_alice=st.booleans(), chance=st.integers(0, 9))
    def link_breaks(self, is_alice: bool, chance: int) -> None:
        if chance:
            return
        self.perform(self.sides[is_alice], self.sides[is_alice].session.lose("the link broke"))

    # --- what a bad peer does --------------------------------------------------------------------

    @rule(is_alice=st.booleans())
    def repeat(self, is_alice: bool) -> None:
        side = self.sides[is_alice]
        if side.delivered is not None:
            self.put(side, side.delivered)

    @precondition(lambda self: self.alice.is_open or self.bob.is_open)
    @rule(is_alice=st.booleans(), garbage=st.binary(min_size=1, max_size=8), cut=st.booleans())
    def garble(self, is_alice: bool, garbage: bytes, cut: bool) -> None:
        side = self.sides[is_alice]
        frames: list[Buffer] = [garbage]
        if cut and side.delivered is not None:
            header = bytes(side.delivered[0])
            frames = [header[: len(header) - len(garbage)] + garbage]
        self.put(side, frames)

    @precondition(lambda self: self.alice.is_open or self.bob.is_open)
    @rule(
        is_alice=st.booleans(),
        data=st.data(),
        message=st.sampled_from(
            [
                *REQUESTS,
                *RIGHT.values(),
                Heartbeat(),
                Hello("eve", "e" * 32),
                ErrorResponse("quota", "no", "eve"),
            ]
        ),
        has_extra_frame=st.booleans(),
    )
    def forge(self, is_alice: bool, data: Any, message: Message, has_extra_frame: bool) -> None:
        side = self.sides[is_alice]
        next_id = max(side.handled, default=1) + 1
        # Of these, a reply to one that was never sent ends the session.
        known = [0, side.last_id, *side.open, *side.handled[-2:]]
        request_id = data.draw(st.sampled_from([*known, *known, next_id]))
        session_id = data.draw(st.sampled_from([side.session.session_id] * 4 + [0, 1]))
        frames = encode(message, Envelope(session_id, request_id, 1.0))
        self.put(side, [*frames, b"more"] if has_extra_frame else frames)

    @precondition(lambda self: self.alice.is_open or self.bob.is_open)
    @rule(is_alice=st.booleans(), data=st.data())
    def forge_cancel(self, is_alice: bool, data: Any) -> None:
        side = self.sides[is_alice]
        request_id = data.draw(st.sampled_from([0, 1, MAX_ID, *side.running, *side.handled[-2:]]))
        self.peer(side).betrayed.add(request_id)
        self.put(side, encode(Cancel(request_id), Envelope(side.session.session_id)))

    # --- what holds always -----------------------------------------------------------------------

    @invariant()
    def sessions_and_owners_agree(self) -> None:
        for side in self.sides.values():
            assert set(side.session._sent) == set(side.open)
            assert side.session._received.keys() == set(side.running)
            kinds = side.session._received.values()
            assert sum(kind.is_limited for kind in kinds) <= LIMIT
            assert len(side.session._deadlines) <= 2 * (len(side.open) + len(side.running)) + 66

    @invariant()
    def the_timer_does_not_spin(self) -> None:
        for side in self.sides.values():
            if side.is_open:
                assert side.session.wakeup() - self.clock.now <= 0.25

    def deliver_all(self) -> None:
        """Deliver what is under way, and what that leads to, which must be little."""
        on_the_way = sum(len(side.inbox) for side in self.sides.values())
        delivered = 0
        while any(side.inbox for side in self.sides.values()):
            for side in self.sides.values():
                while side.inbox:
                    self.deliver_one(side)
                    delivered += 1
        ends_of_the_link = 2
        assert delivered <= 2 * on_the_way + ends_of_the_link, "answers to answers"

    def teardown(self) -> None:
        """Let all that is under way come to its end: nothing may remain."""
        self.deliver_all()
        for side in self.sides.values():
            for request_id in side.betrayed & set(side.open):
                del side.open[request_id]
                self.perform(side, side.session.cancel(request_id))
            for request_id, request in list(side.running.items()):
                del side.running[request_id]
                envelope = side.session.reply(request_id)
                assert envelope is not None
                self.put(self.peer(side), encode(RIGHT[type(request)], envelope))
        for _ in range(int(LONGEST_TIMEOUT * 4) + 1):
            self.clock.now += 0.25
            for side in self.sides.values():
                while side.inbox:
                    self.deliver_one(side)
                self.tick(side)
        for side in self.sides.values():
            assert not side.open, "every request ends"
            assert not side.running
            assert side.session._deadlines.soonest() is None
            for action in side.session.lose("the end"):
                assert isinstance(action, Close), "nothing is left to end"


def run(max_examples: int, steps: int) -> None:
    # A failure can be repeated only if nothing is left to chance but hypothesis's own choices.
    with mock.patch.object(ids, "random_id", return_value=77):
        run_state_machine_as_test(
            TwoSessions,
            settings=settings(max_examples=max_examples, stateful_step_count=steps, deadline=None),
        )


def test_any_order_of_events() -> None:
    run(max_examples=150, steps=50)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_any_order_of_events_for_long() -> None:
    run(max_examples=5000, steps=100)


def test_a_link_that_falls_silent_ends_both_sides() -> None:
    machine = TwoSessions()
    machine.deliver_one(machine.bob)
    machine.deliver_one(machine.alice)
    for side in machine.sides.values():
        side.open[side.last_id + 1] = Status()
        side.session.request(Status, None)
    began = machine.clock.now
    while not (machine.alice.closed and machine.bob.closed):
        machine.clock.now += 0.25
        assert machine.clock.now - began <= 7.5
        for side in machine.sides.values():
            if not side.closed:
                actions = side.session.tick(machine.clock.now - began, None)
                outcomes = [a.outcome for a in actions if isinstance(a, FinishRequest)]
                assert all(isinstance(outcome, WorkerLost) for outcome in outcomes)
                machine.perform(side, actions)
                side.inbox.clear()
