"""All workers telling all: the one with the least name gathers, and tells the others.

It is the way in which a group waits for each other.  A lost worker ends the waiting.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, Final

from zmq_autograd.compat.rpc import state
from zmq_autograd.errors import ZmqAutogradError

LOOK_SECONDS: Final = 2.0
"""Seconds after which who waits looks whether those that it waits for are there still."""


class AllGatherStates:
    """One gathering.

    Attributes:
        gathered_objects: what the workers have told, by name.
        proceed_signal: it is complete here.
        names: who takes part, once that is known; on the worker that gathers.
    """

    def __init__(self) -> None:
        self.gathered_objects: dict[str, Any] = {}
        self.proceed_signal = threading.Event()
        self.names: frozenset[str] = frozenset()

    def missing(self) -> Collection[str]:
        """Return those that have told nothing yet."""
        return self.names - self.gathered_objects.keys()


class Gatherings:
    """The gatherings of one process, by an id that all that take part know."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.RLock()
        self._counts: dict[str, int] = {}
        self._states: defaultdict[str, AllGatherStates] = defaultdict(AllGatherStates)

    def next_id(self, names: Iterable[str]) -> str:
        """Return the id of the next gathering of these workers: the same on each of them."""
        with self._lock:
            key = ",".join(sorted(names))  # no name has a comma
            number = self._counts.get(key, 0)
            self._counts[key] = number + 1
            return f"{key},{number}"

    def of(self, sequence_id: str) -> AllGatherStates:
        """Return a gathering, made if it is new here."""
        with self._lock:
            return self._states[sequence_id]

    def take(self, sequence_id: str, name: str, told: Any, names: Iterable[str]) -> None:
        """Take in, on the worker that gathers, what `name` tells.

        Raises:
            RuntimeError: it takes no part, or has told already.
        """
        with self._lock:
            gathering = self._states[sequence_id]
            gathering.names = frozenset(names)
            if name not in gathering.names or name in gathering.gathered_objects:
                raise RuntimeError(f"{name} is not expected in {sequence_id}, or came twice")
            gathering.gathered_objects[name] = told
            if not gathering.missing():
                gathering.proceed_signal.set()

    def complete(self, sequence_id: str, told: dict[str, Any]) -> None:
        """Take in, on one of the others, what all have told."""
        gathering = self.of(sequence_id)
        gathering.gathered_objects = told
        gathering.proceed_signal.set()

    def end(self, sequence_id: str) -> AllGatherStates:
        """Forget a gathering and return it."""
        with self._lock:
            return self._states.pop(sequence_id, AllGatherStates())

    def clear(self) -> None:
        """Forget all of them: the group is another one from now on."""
        with self._lock:
            self._counts.clear()
            self._states.clear()


def wait(gathering: AllGatherStates, leader: str, seconds: float | None) -> None:
    """Wait until `gathering` is complete.

    Args:
        gathering: on the worker that gathers, it knows whom it waits for.
        leader: the worker that gathers.
        seconds: how long at most, None for no limit.

    Raises:
        RuntimeError: somebody that it waits for is lost, or did not come in time.
    """
    agent = state.agent()
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        left = LOOK_SECONDS if until is None else min(LOOK_SECONDS, until - time.monotonic())
        if gathering.proceed_signal.wait(max(0.0, left)):
            return
        awaited = [leader] if agent.me.name != leader else sorted(gathering.missing())
        if left <= 0:
            raise RuntimeError(f"workers {awaited} timed out in _all_gather after {seconds:.2f} s")
        for name in awaited:
            try:
                agent.portal.run(agent.reach, agent.get_worker_info(name))
            except ZmqAutogradError as error:
                raise RuntimeError(f"worker {name} does not take part any more: {error}") from error
