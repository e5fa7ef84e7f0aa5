"""Where each member of a world stands: what rank 0 knows, and lets the others wait for.

Owns the rules of joining, barriers and leaving.  Knows no network: `launch.world` has the members'
requests brought here, and says who is lost.  Everything runs in one event loop's thread.

One member keeps the books because that is the simplest thing that cannot disagree with itself: the
others ask it, and an answer is final.  What it costs, that the world cannot go on without rank 0,
costs nothing here, for no member of a world is ever replaced.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence

from zmq_autograd.errors import DeadlineExceeded, ProtocolError, WorkerLost
from zmq_autograd.launch.store import Entry
from zmq_autograd.session import checked_timeout

__all__ = ["Membership", "Stand"]


class Stand(enum.Enum):
    """Where a member stands; each leads to any below it."""

    ABSENT = "absent"  # not heard of yet
    JOINED = "joined"
    SERVING = "serving"  # has nothing more to do of its own, and answers the others
    GONE = "gone"  # leaves, or is lost


class Membership:
    """The books of one world.

    Rules:

    1. Barriers are numbered from 0.  A member arrives at number `n + 1` after number `n` has let it
       pass, so that at any time only one number is open.
    2. Arriving is remembered.  A member that gave up waiting may come again with the same number,
       and finds it open still, or passed.
    3. Every member takes part in a barrier except those that only serve.  Once one leaves or is
       lost, the open barrier fails, and so does every later one.
    4. The world is over when every member serves or is gone.
    5. When rank 0 closes the books, whoever still waits learns that rank 0 is lost to him.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        """Begin the books of a world of these members, in the order of their ranks."""
        self._entries = entries
        self._stands = [Stand.ABSENT] * len(entries)
        # The first member that is lost or leaves, and how: no barrier can be passed any more.
        self._lost: tuple[Entry, str] | None = None
        # The open barrier's number, and the ranks that have arrived at it.
        self._barrier = 0
        self._arrived: set[int] = set()
        self._closed = False
        # Set, and replaced, whenever something changes.
        self._changed = asyncio.Event()

    async def join(self, rank: int, timeout: float) -> None:
        """Let `rank` be there, and wait up to `timeout` seconds until all are.

        Raises:
            DeadlineExceeded: some did not come; it names them.
            WorkerLost: one came and was lost.
        """
        self._move(rank, Stand.JOINED)
        absent = {Stand.ABSENT}
        await self._wait("join", lambda: not self._in(absent), lambda: self._in(absent), timeout)

    async def barrier(self, rank: int, number: int, timeout: float) -> None:
        """Let `rank` arrive at barrier `number`, and wait until all who take part have.

        Raises:
            DeadlineExceeded: some did not arrive within `timeout` seconds; it names them.
            WorkerLost: one is lost or leaves, and will never arrive.
            ProtocolError: that barrier cannot be open yet.
        """
        if number > self._barrier:
            name = self._entries[rank].name
            raise ProtocolError(
                f"expected worker {name!r} at barrier {self._barrier}, got {number}", worker=name
            )
        if number == self._barrier:
            self._arrived.add(rank)
            self._change()
        event = f"barrier {number}"
        await self._wait(event, lambda: number < self._barrier, self._not_arrived, timeout)

    async def leave(self, rank: int, timeout: float | None, *, serving: bool) -> None:
        """Let `rank` have nothing more to do, and wait until the world is over.

        Args:
            rank: who leaves.
            timeout: seconds to wait, None for ever.
            serving: it only serves from now on, and leaves barriers to the others.

        Raises:
            DeadlineExceeded: some went on for longer; it names them.
        """
        if serving:
            self._move(rank, Stand.SERVING)
        else:
            self.lose(rank, "it is leaving")
        busy = {Stand.ABSENT, Stand.JOINED}
        await self._wait(
            "leave", lambda: not self._in(busy), lambda: self._in(busy), timeout, even_if_lost=True
        )

    def is_gone(self, rank: int) -> bool:
        """Whether `rank` has left or was lost."""
        return self._stands[rank] is Stand.GONE

    def lose(self, rank: int, reason: str) -> None:
        """Take in that `rank` is gone; the first reason given for the first one counts."""
        self._lost = self._lost or (self._entries[rank], reason)
        self._move(rank, Stand.GONE)

    def close(self) -> None:
        """End every wait that is not over, rank 0 being about to leave."""
        self._closed = True
        self._change()

    def _move(self, rank: int, stand: Stand) -> None:
        self._stands[rank] = stand
        self._change()

    def _change(self) -> None:
        """Open the barrier if that is due, and have all who wait look again."""
        if not self._lost and not self._not_arrived():
            self._barrier += 1
            self._arrived.clear()
        self._changed.set()
        self._changed = asyncio.Event()

    def _in(self, stands: set[Stand]) -> list[int]:
        return [rank for rank, stand in enumerate(self._stands) if stand in stands]

    def _not_arrived(self) -> list[int]:
        """Return the ranks that the open barrier waits for."""
        there = self._arrived.union(self._in({Stand.SERVING}))
        return [rank for rank in range(len(self._entries)) if rank not in there]

    async def _wait(
        self,
        event: str,
        over: Callable[[], bool],
        missing: Callable[[], list[int]],
        timeout: float | None,
        *,
        even_if_lost: bool = False,
    ) -> None:
        try:
            # What a member sent: not a number, it would upset the loop's timers.
            async with asyncio.timeout(checked_timeout(timeout)):
                while not over():
                    if self._lost and not even_if_lost:
                        raise _loss(*self._lost)
                    if self._closed:
                        raise _loss(self._entries[0], "it is leaving")
                    await self._changed.wait()
        except TimeoutError:
            names = [self._entries[rank].name for rank in missing()]
            listed = ", ".join(map(repr, names))
            raise DeadlineExceeded(
                f"{event}: still waiting for {listed} after {timeout:g} s", workers=names
            ) from None


def _loss(entry: Entry, reason: str) -> WorkerLost:
    return WorkerLost(entry.name, entry.incarnation, reason)
