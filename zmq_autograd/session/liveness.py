"""Is the peer still there?  Arithmetic on times; asks nobody and sends nothing.

Two signs of death are told apart.  A *cut* peer: its host no longer acknowledges what this side
sends, so the machine or the network is gone; noticed quickly, since nothing but death explains it.
A *frozen* one: its host answers, but the process sends nothing, not even heartbeats; given more
time, since a process may be busy.  Bytes count as they arrive, not when their message is whole: a
peer in the middle of sending a gigabyte over a slow line is alive.
"""

from __future__ import annotations

from collections import deque
from typing import Final

LOST_AFTER_SECONDS: Final = 7.0
"""Default silence after which a peer counts as frozen."""

CUT_AFTER_HEARTBEATS: Final = 1.5
"""Heartbeats that the peer's host may leave unacknowledged before the peer counts as cut off."""

CHECKS_PER_HEARTBEAT: Final = 4

_REMEMBERED: Final = 2 * CHECKS_PER_HEARTBEAT
"""Sendings that are remembered: more than fit into the time after which a peer is cut off."""

MISSED_HEARTBEATS: Final = 3
"""Heartbeats that a peer may miss, at the pace it announced, before it can count as frozen."""

KERNEL_TICK: Final = 0.01
"""Seconds by which the kernel's times of acknowledgements may be early: it counts in ticks."""


class Liveness:
    """What one side knows of the other's signs of life.  All times are on the session's clock."""

    def __init__(self, now: float, *, heartbeat: float, lost_after: float) -> None:
        """Begin at `now`; `heartbeat` and `lost_after` are in seconds."""
        self._heartbeat = heartbeat
        self._lost_after = lost_after
        self._cut_after = CUT_AFTER_HEARTBEATS * heartbeat
        self._interval = heartbeat / CHECKS_PER_HEARTBEAT
        self._checked_at = now
        self._sent_at = now
        # When something was sent that the peer's host is not known to have acknowledged, earliest
        # first.  Of what is sent within one interval only the first counts, and no more than
        # it takes to be cut off are kept.
        self._unacknowledged: deque[float] = deque()

    def expect_heartbeat(self, seconds: float) -> None:
        """Note that the peer may send nothing for `seconds` while it is well."""
        self._lost_after = max(self._lost_after, MISSED_HEARTBEATS * seconds)

    def skip(self, now: float) -> None:
        """Let a check pass: there is no peer yet, or none any more."""
        self._checked_at = now

    def sent(self, now: float) -> None:
        """Note that something was sent."""
        self._sent_at = now
        waiting = self._unacknowledged
        if not waiting or (len(waiting) < _REMEMBERED and now >= waiting[-1] + self._interval):
            waiting.append(now)

    def heartbeat_due(self, now: float) -> bool:
        """Say whether a heartbeat should go out."""
        return now >= self._sent_at + self._heartbeat

    def next_check(self) -> float:
        """Return when `check` is due."""
        dues = [self._checked_at + self._interval, self._sent_at + self._heartbeat]
        if self._unacknowledged:
            dues.append(self._unacknowledged[0] + self._cut_after)
        return min(due for due in dues if due > self._checked_at)

    def check(self, now: float, received_ago: float, acknowledged_ago: float | None) -> str | None:
        """Return why the peer counts as lost, None while it does not.

        Args:
            now: the time.
            received_ago: seconds since any byte came from the peer.
            acknowledged_ago: seconds since its host acknowledged anything, None if unknown.
        """
        # After a stall of this side, what the peer sent meanwhile may not have been read yet.
        stalled = now - self._checked_at > self._heartbeat + self._interval
        self._checked_at = now
        if acknowledged_ago is not None:
            self._note_acknowledged(now - acknowledged_ago + KERNEL_TICK)
        if stalled:
            return None
        if received_ago > self._lost_after:
            return f"frozen: no sign of life for {received_ago:.1f} s"
        if acknowledged_ago is None or not self._unacknowledged:
            return None
        since = self._unacknowledged[0]
        if now < since + self._cut_after:
            return None
        return f"cut off: its host acknowledged nothing for {now - since:.1f} s"

    def _note_acknowledged(self, at: float) -> None:
        while self._unacknowledged and self._unacknowledged[0] <= at:
            self._unacknowledged.popleft()
