"""When the time of which request runs out.  Knows ids and times; `state` knows what follows."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from typing import Final

from zmq_autograd.errors import ConfigurationError
from zmq_autograd.wire.limits import short

_SPARE: Final = 64
"""Entries of ended requests that are not worth clearing away."""


FOR_EVER: Final = 1e9
"""Seconds above which a timeout is none."""


def checked_timeout(timeout: float | None) -> float | None:
    """Return `timeout` in seconds, None for ever.

    Raises:
        ConfigurationError: it is negative or not a number.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise ConfigurationError(f"timeout: expected seconds >= 0 or None, got {short(timeout)}")
    return None if timeout > FOR_EVER else timeout


class Deadlines:
    """The deadlines of open requests, soonest first.

    A request may end long before its deadline, so the entries of ended ones are cleared away once
    they are most of all: what is held here grows with the requests under way, never with those
    that were.
    """

    def __init__(self, sent: Collection[int], received: Collection[int]) -> None:
        """Watch the open requests of both sides, whose ids `sent` and `received` hold at any time.

        An id never comes back into them.
        """
        self._sent = sent
        self._received = received
        # (deadline, ours, request id); ours is True for a request that this side sent.
        self._heap: list[tuple[float, bool, int]] = []

    def __len__(self) -> int:
        """Return the number of entries held, those of ended requests included."""
        return len(self._heap)

    def add(self, deadline: float | None, *, ours: bool, request_id: int) -> None:
        """Note when the time of an open request runs out, None for never."""
        if deadline is None:
            return
        heapq.heappush(self._heap, (deadline, ours, request_id))
        if len(self._heap) > 2 * (len(self._sent) + len(self._received)) + _SPARE:
            self._heap = [entry for entry in self._heap if self._is_open(entry)]
            heapq.heapify(self._heap)

    def soonest(self) -> float | None:
        """Return the first deadline of an open request, None if none has one."""
        while self._heap and not self._is_open(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: float) -> list[tuple[bool, int]]:
        """Return the open requests whose time has run out, as (ours, request id); each once."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._is_open(entry):
                due.append(entry[1:])
        return due

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()

    def _is_open(self, entry: tuple[float, bool, int]) -> bool:
        _, ours, request_id = entry
        return request_id in (self._sent if ours else self._received)
