"""A peer that lives is never given up; one that does not is, within its bound."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.session.session_pair import BOB, Clock, Failed, open_pair, plain
from zmq_autograd.errors import WorkerLost
from zmq_autograd.session import Action, Close, Send
from zmq_autograd.session.liveness import Liveness
from zmq_autograd.wire import Envelope
from zmq_autograd.wire.messages import Heartbeat, Status

INTERVAL = 0.25
"""Seconds between checks at the default heartbeat."""

CUT_WITHIN = 1.0 + 1.5 + 0.25
"""Seconds: a heartbeat until something is sent, its time to be acknowledged, one check."""


def liveness(now: float = 0.0) -> Liveness:
    return Liveness(now, heartbeat=1.0, lost_after=7.0)


# --- frozen --------------------------------------------------------------------------------------


def test_silence_counts_as_frozen_after_seven_seconds() -> None:
    live = liveness()
    for step in range(1, 29):
        assert live.check(step * INTERVAL, step * INTERVAL, 0.0) is None
    assert live.check(7.25, 7.25, 0.0) == "frozen: no sign of life for 7.2 s"


def test_bytes_that_arrive_are_life_though_no_message_ends() -> None:
    live = liveness()
    for step in range(1, 4 * 3600):
        assert live.check(step * INTERVAL, 0.1, 0.1) is None


def test_a_peer_with_slow_heartbeats_is_given_three_of_them() -> None:
    live = liveness()
    live.expect_heartbeat(5.0)
    for step in range(1, 61):
        assert live.check(step * INTERVAL, step * INTERVAL, None) is None
    assert live.check(15.25, 15.25, None) == "frozen: no sign of life for 15.2 s"


def test_a_peer_with_quick_heartbeats_is_not_given_up_sooner() -> None:
    live = liveness()
    live.expect_heartbeat(0.1)
    assert live.check(0.25, 6.9, None) is None


def test_the_session_takes_the_peers_heartbeat_from_the_handshake() -> None:
    clock = Clock()
    alice, _ = open_pair(clock, bob=replace(BOB, heartbeat=10.0))
    clock.now += 0.25
    assert alice.tick(29.9, None) == []
    clock.now += 0.25
    assert alice.tick(30.1, None)[-1] == Close("frozen: no sign of life for 30.1 s")


# --- cut off -------------------------------------------------------------------------------------


def test_what_stays_unacknowledged_counts_as_cut_off() -> None:
    live = liveness()
    live.sent(0.1)
    for step in range(1, 7):
        assert live.check(step * INTERVAL, 0.0, step * INTERVAL) is None
    assert live.next_check() == 1.1 + 0.5
    assert live.check(1.6, 0.0, 1.6) == "cut off: its host acknowledged nothing for 1.5 s"


def test_an_idle_peer_that_has_nothing_to_acknowledge_is_alive() -> None:
    live = liveness()
    for step in range(1, 25):
        assert live.check(step * INTERVAL, 0.0, step * INTERVAL) is None


def test_an_acknowledgement_of_what_was_sent_before_is_none_of_what_came_after() -> None:
    live = liveness()
    live.sent(0.0)
    live.sent(0.3)
    for step in range(1, 8):  # the last acknowledgement came at 0.1
        assert live.check(step * INTERVAL, 0.0, max(0.0, step * INTERVAL - 0.1)) is None
    assert live.next_check() == 1.8
    assert live.check(1.8, 0.0, 1.7) == "cut off: its host acknowledged nothing for 1.5 s"


def test_what_is_sent_without_pause_takes_no_memory() -> None:
    live = liveness()
    for step in range(100_000):
        live.sent(step * 0.01)
    assert len(live._unacknowledged) == 8


def test_an_acknowledgement_may_seem_a_kernel_tick_early() -> None:
    live = liveness()
    live.sent(0.203)
    assert live.check(0.25, 0.0, 0.05) is None  # so at 0.200
    for step in range(2, 12):
        assert live.check(step * INTERVAL, 0.0, step * INTERVAL - 0.2) is None


def test_a_network_that_tells_nothing_leaves_only_silence() -> None:
    live = liveness()
    live.sent(0.0)
    for step in range(1, 40):
        assert live.check(step * INTERVAL, 0.0, None) is None
        assert live.next_check() > step * INTERVAL
    assert live.check(10.0, 7.5, None) == "frozen: no sign of life for 7.5 s"


def test_callers_of_a_cut_off_peer_hear_its_name() -> None:
    clock = Clock()
    alice, _ = open_pair(clock)
    clock.now = 2000.0
    alice.tick(0.0, 0.0)
    alice.request(Status, 60.0)
    actions: list[Action] = []
    while not actions and clock.now < 2010.0:
        clock.now = alice.wakeup()
        actions = [
            action
            for action in alice.tick(clock.now - 1999.9, clock.now - 1999.9)
            if action != Send(Envelope(alice.session_id), Heartbeat())
        ]
    assert clock.now == 2001.5
    reason = "cut off: its host acknowledged nothing for 1.5 s"
    lost = f"worker 'bob' (incarnation bbbbbbbb) is lost: {reason}"
    assert plain(actions) == [Failed(2, WorkerLost, lost), Close(reason)]


# --- this side's own stalls ----------------------------------------------------------------------


def test_a_stall_of_this_side_is_not_the_peers_death() -> None:
    live = liveness()
    live.sent(0.0)
    assert live.check(0.25, 0.0, 0.2) is None
    live.sent(0.26)
    assert live.check(30.0, 29.7, 29.7) is None  # nothing of the last 30 s has been read yet
    assert live.check(30.25, 0.1, 0.1) is None


def test_a_stall_of_this_side_does_not_hide_the_peers_death_for_long() -> None:
    live = liveness()
    live.sent(0.0)
    assert live.check(30.0, 30.0, 30.0) is None
    assert live.check(30.25, 30.25, None) == "frozen: no sign of life for 30.2 s"


# --- any schedule --------------------------------------------------------------------------------


class World:
    """A peer and a network as the kernel shows them, around one `Liveness`."""

    def __init__(self, round_trip: float, died_at: float = math.inf) -> None:
        self.live = liveness()
        self.now = 0.0
        self.round_trip = round_trip
        self.died_at = died_at
        self.acknowledged: list[float] = [0.0]

    def send(self) -> None:
        self.live.sent(self.now)
        if self.now + self.round_trip <= self.died_at:
            self.acknowledged.append(self.now + self.round_trip)

    def check(self, received_ago: float) -> str | None:
        """Tick as a session does: check, then a heartbeat if one is due."""
        last = max(at for at in self.acknowledged if at <= self.now)
        # The kernel counts in ticks of 4 ms, on both ends of the difference.
        ago = (math.floor(self.now / 0.004) - math.floor(last / 0.004)) * 0.004
        reason = self.live.check(self.now, received_ago, ago)
        if reason is None and self.live.heartbeat_due(self.now):
            self.send()
        return reason


LATENESS = st.floats(0.0, 0.05)
"""Seconds by which this side's timer is late."""

SENDS = st.lists(st.floats(0.0, 1.0), max_size=4).map(sorted)
"""When something is sent between two checks, as parts of the time between them."""

MANY = settings(max_examples=300, deadline=None)


@MANY
@given(
    round_trip=st.floats(0.0, 1.2),
    steps=st.lists(
        st.tuples(st.one_of(LATENESS, LATENESS, st.floats(0.05, 40.0)), SENDS), max_size=60
    ),
)
def test_a_peer_that_lives_is_never_lost(
    round_trip: float, steps: list[tuple[float, list[float]]]
) -> None:
    world = World(round_trip)
    for lateness, sends in steps:
        begin, end = world.now, world.live.next_check() + lateness
        assert end > begin
        for part in sends:
            world.now = begin + part * (end - begin)
            world.send()
        world.now = end
        # After a stall the first check comes before the reading of what has arrived.
        unread = lateness if lateness > 1.25 else 0.0
        assert world.check(1.0 + unread) is None


@MANY
@example(
    # The last acknowledgement came 11 ms before something was sent: which of the two was first
    # is within what the kernel's clock leaves open.
    round_trip=1.140625,
    died_at=2.125,
    steps=[(0.03859421064202956, [1.0]), (0.03743636155723267, [])],
)
@given(
    round_trip=st.floats(0.0, 1.2),
    died_at=st.floats(0.0, 10.0),
    steps=st.lists(st.tuples(LATENESS, SENDS), min_size=1, max_size=30),
)
def test_a_peer_that_is_cut_off_is_lost_within_the_bound(
    round_trip: float, died_at: float, steps: list[tuple[float, list[float]]]
) -> None:
    world = World(round_trip, died_at)
    reason, step = None, 0
    while reason is None:
        lateness, sends = steps[step % len(steps)]
        step += 1
        begin, end = world.now, world.live.next_check() + lateness
        for part in sends:
            world.now = begin + part * (end - begin)
            world.send()
        world.now = end
        reason = world.check(max(0.0, world.now - died_at))
        if reason is None:
            assert world.now < died_at + CUT_WITHIN + 2 * 0.05
    assert reason.startswith("cut off")
    assert world.now >= died_at


@MANY
@given(
    frozen_at=st.floats(0.0, 10.0),
    steps=st.lists(st.tuples(LATENESS, SENDS), min_size=1, max_size=30),
)
def test_a_peer_that_is_frozen_is_lost_within_the_bound(
    frozen_at: float, steps: list[tuple[float, list[float]]]
) -> None:
    world = World(0.001)
    reason, step = None, 0
    while reason is None:
        lateness, sends = steps[step % len(steps)]
        step += 1
        begin, end = world.now, world.live.next_check() + lateness
        for part in sends:
            world.now = begin + part * (end - begin)
            world.send()
        world.now = end
        reason = world.check(max(0.0, world.now - frozen_at))
        if reason is None:
            assert world.now <= frozen_at + 7.0 + INTERVAL + 0.05
    assert reason.startswith("frozen")
    assert world.now - frozen_at > 7.0 - 1e-9


def test_the_bounds_hold_what_is_promised() -> None:
    assert CUT_WITHIN < 3.0
    assert 7.0 + INTERVAL < 10.0


@pytest.mark.parametrize("heartbeat", [0.05, 1.0, 10.0])
def test_all_times_scale_with_the_heartbeat(heartbeat: float) -> None:
    live = Liveness(0.0, heartbeat=heartbeat, lost_after=100.0)
    assert live.next_check() == heartbeat / 4
    assert not live.heartbeat_due(0.99 * heartbeat)
    assert live.heartbeat_due(heartbeat)
    live.sent(0.0)
    assert live.check(0.99 * heartbeat, 0.0, 2 * heartbeat) is None
    assert live.check(1.49 * heartbeat, 0.0, 2 * heartbeat) is None
    assert live.check(1.5 * heartbeat, 0.0, 2 * heartbeat) is not None
