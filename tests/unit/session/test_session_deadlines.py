"""Deadlines come due in order, once, and leave no heap of ended requests behind."""

from __future__ import annotations

from tests.unit.session.session_pair import Clock, open_pair
from zmq_autograd.session.deadlines import Deadlines
from zmq_autograd.wire import Envelope
from zmq_autograd.wire.messages import CleanupContextRequest


def test_they_come_due_in_order_and_once() -> None:
    deadlines = Deadlines({1, 2, 3}, {1})
    for deadline, ours, request_id in [(3.0, True, 1), (1.0, True, 2), (2.0, False, 1)]:
        deadlines.add(deadline, ours=ours, request_id=request_id)
    deadlines.add(None, ours=True, request_id=3)
    assert deadlines.soonest() == 1.0
    assert deadlines.take_due(0.9) == []
    assert deadlines.take_due(2.0) == [(True, 2), (False, 1)]
    assert deadlines.soonest() == 3.0
    assert deadlines.take_due(9.0) == [(True, 1)]
    assert deadlines.take_due(9.0) == []
    assert deadlines.soonest() is None


def test_those_of_ended_requests_never_come_due() -> None:
    sent, received = {1, 2}, {1}
    deadlines = Deadlines(sent, received)
    deadlines.add(1.0, ours=True, request_id=1)
    deadlines.add(2.0, ours=False, request_id=1)
    deadlines.add(3.0, ours=True, request_id=2)
    sent.remove(1)
    assert deadlines.soonest() == 2.0
    received.clear()
    assert deadlines.soonest() == 3.0
    assert deadlines.take_due(9.0) == [(True, 2)]


def test_clearing_forgets_all() -> None:
    deadlines = Deadlines({1}, set())
    deadlines.add(1.0, ours=True, request_id=1)
    deadlines.clear()
    assert (deadlines.soonest(), deadlines.take_due(9.0), len(deadlines)) == (None, [], 0)


def test_what_is_held_does_not_grow_with_the_requests_that_were() -> None:
    open_requests: set[int] = set()
    deadlines = Deadlines(open_requests, set())
    for request_id in range(10_000):
        open_requests.add(request_id)
        deadlines.add(1e9 + request_id, ours=True, request_id=request_id)
        if request_id >= 10:
            open_requests.remove(request_id - 10)
        assert len(deadlines) <= 2 * 12 + 65
    assert deadlines.take_due(2e9) == [(True, request_id) for request_id in range(9990, 10_000)]


def test_a_peer_cannot_fill_memory_with_far_deadlines() -> None:
    _, bob = open_pair(Clock())
    for request_id in range(2, 5000):
        bob.receive(Envelope(bob.session_id, request_id, 1e300), CleanupContextRequest(1))
        assert bob.reply(request_id) is not None
    assert len(bob._deadlines) <= 70
