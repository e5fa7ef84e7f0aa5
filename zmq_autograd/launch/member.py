"""One member's life in its world: who the others are, and waiting for them together.

Owns the table of members, the connections to them, and the way a wait is asked of rank 0.  What
rank 0 knows of everyone is in `launch.membership`.  How this member came to know the others, and
what the user sees, is in `launch.world`.

Each member connects to rank 0 and calls it to join, to arrive at a barrier and to leave: calls
like any other, that end when everyone is where they should be.  Rank 0 in turn calls each member
over the same connection, and gets no answer until that member closes: where the session finds the
member dead, that call ends with `WorkerLost`, and with it the wait of all who wait for the member.
A member that loses rank 0 sees its own calls end in the same way.  So nobody waits for the dead,
with no timer beside the session's own.  Rank 0 also tells each member of each loss, so that whoever
comes to a barrier when rank 0 itself has gone for that reason still hears of the first cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Context
from typing import Final

from zmq_autograd.errors import (
    ConfigurationError,
    DeadlineExceeded,
    ProtocolError,
    WorkerLost,
    ZmqAutogradError,
)
from zmq_autograd.launch.membership import Membership
from zmq_autograd.launch.store import Entry
from zmq_autograd.remote import RemoteWorker
from zmq_autograd.worker import Worker

__all__ = ["BARRIER", "JOIN", "LEAVE", "LOST", "WATCH", "Member"]

# Names under which rank 0 offers its services, and the others the last two.
JOIN: Final = "za.world.join"
BARRIER: Final = "za.world.barrier"
LEAVE: Final = "za.world.leave"
WATCH: Final = "za.world.watch"
LOST: Final = "za.world.lost"

REPLY_SECONDS: Final = 10.0
"""Seconds that rank 0 has to tell that a wait is over, beyond the wait itself."""

TELL_SECONDS: Final = 1.0
"""Seconds that the others have to take in that a member is lost."""


class Member:
    """A member that knows all others, from there to its closing."""

    def __init__(self, worker: Worker, rank: int, entries: Sequence[Entry]) -> None:
        """Begin the life of the member `rank`.

        Args:
            worker: runs, and can be reached as its entry says.
            rank: its number.
            entries: all members, in the order of their ranks.

        Raises:
            ConfigurationError: two members have the same name.
        """
        _check_names(entries)
        self.rank = rank
        # Rank 0's books; None on the others.
        self.membership = Membership(entries) if rank == 0 else None
        self._worker = worker
        self._entries = entries
        # By rank: whom we have a connection with, and who is being dialled.
        self._peers: dict[int, RemoteWorker] = {}
        self._dialling = [asyncio.Lock() for _ in entries]
        # Rank 0's standing calls to the others, each ending when that member does.
        self._watches: set[asyncio.Task[None]] = set()
        # Rank 0's calls that tell of a loss, each short.
        self._tellings: set[asyncio.Task[None]] = set()
        # The first loss that rank 0 told us of.
        self._loss: tuple[str, str, str] | None = None
        # Barriers passed; one is waited for at a time.
        self._passed = 0
        self._arriving = asyncio.Lock()

    async def close(self) -> None:
        """Wait for nobody any more, and let nobody wait here.  Idempotent."""
        if self.membership:
            self.membership.close()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, *self._tellings, return_exceptions=True)

    # --- waiting for all -------------------------------------------------------------------------

    async def join(self, timeout: float) -> None:
        """Return when all members are there; for what it raises see `Membership`."""
        if self.membership:
            await self.membership.join(self.rank, timeout)
        else:
            await self._ask(JOIN, timeout, within=timeout)

    async def barrier(self, timeout: float) -> None:
        """Return when all members have called this as often; for what it raises see `Membership`.

        After a failure or a cancellation the next call waits at the same barrier.
        """
        async with self._arriving:
            try:
                if self.membership:
                    await self.membership.barrier(self.rank, self._passed, timeout)
                else:
                    await self._ask(BARRIER, self._passed, timeout, within=timeout)
            except WorkerLost as error:
                if self._loss is None:
                    raise
                raise WorkerLost(*self._loss) from error  # rank 0 may have gone because of it
            self._passed += 1

    async def leave(self, timeout: float | None, *, serving: bool) -> None:
        """Return when the world is over; for what it raises see `Membership`."""
        if self.membership:
            await self.membership.leave(self.rank, timeout, serving=serving)
        else:
            await self._ask(LEAVE, timeout, serving, within=timeout)

    async def _ask(self, service: str, *arguments: float | None, within: float | None) -> None:
        coordinator = await self.peer(0, within)
        timeout = None if within is None else within + REPLY_SECONDS
        await coordinator.call(service, *arguments, timeout=timeout)

    # --- the others ------------------------------------------------------------------------------

    async def peer(self, who: int | str, timeout: float | None) -> RemoteWorker:
        """Return the member of that rank or name, connecting to it the first time.

        Raises:
            ConfigurationError: there is no such member, or it is this one.
            WorkerLost: nobody answers where it should be, or somebody else does.
        """
        entry = self._entry(who)
        if entry.rank == self.rank:
            raise ConfigurationError(f"expected another member of the world, got {who!r}: itself")
        async with self._dialling[entry.rank]:
            # A lost one stays: nobody in a world is replaced, so dialling again finds nobody.
            if entry.rank not in self._peers:
                self._peers[entry.rank] = await self._dial(entry, timeout)
            return self._peers[entry.rank]

    def _entry(self, who: int | str) -> Entry:
        for entry in self._entries:
            if who in (entry.rank, entry.name):
                return entry
        names = ", ".join(repr(entry.name) for entry in self._entries)
        raise ConfigurationError(
            f"expected a rank below {len(self._entries)} or one of {names}, got {who!r}"
        )

    async def _dial(self, entry: Entry, timeout: float | None) -> RemoteWorker:
        """Try the member's endpoints in turn, sharing the time between them."""
        share = None if timeout is None else timeout / len(entry.endpoints)
        failure: ZmqAutogradError | None = None
        for endpoint in entry.endpoints:
            try:
                peer = await self._worker.connect(endpoint, timeout=share)
            except (WorkerLost, DeadlineExceeded) as error:
                failure = error
            else:
                return _checked(peer, entry)
        reason = f"nobody answers at {', '.join(entry.endpoints)}"
        raise WorkerLost(entry.name, entry.incarnation, reason) from failure

    # --- rank 0's part ---------------------------------------------------------------------------

    async def admit(self, peer: RemoteWorker, membership: Membership, timeout: float) -> None:
        """Let a member join that has connected to us, and keep an eye on it from now on."""
        rank = self.rank_of(peer)
        self._peers[rank] = peer
        # In a context of its own: it outlives the request that it is started by.
        watch = asyncio.create_task(self._watch(rank, peer, membership), context=Context())
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        await membership.join(rank, timeout)

    def hear_of_loss(self, peer: RemoteWorker, name: str, incarnation: str, reason: str) -> None:
        """Take in from rank 0 that a member is lost.

        Raises:
            ProtocolError: `peer` is not rank 0.
        """
        if self.rank_of(peer) != 0:
            raise ProtocolError(
                f"expected rank 0, got worker {peer.name!r}: only rank 0 tells who is lost",
                worker=peer.name,
            )
        self._loss = self._loss or (name, incarnation, reason)

    def rank_of(self, peer: RemoteWorker) -> int:
        """Return the rank of a peer.

        Raises:
            ProtocolError: it is no member of this world, or another life of one.
        """
        for entry in self._entries:
            if (entry.name, entry.incarnation) == (peer.name, peer.incarnation):
                return entry.rank
        raise ProtocolError(
            f"expected a member of the world, got worker {peer.name!r} "
            f"(incarnation {peer.incarnation[:8]})",
            worker=peer.name,
        )

    async def _watch(self, rank: int, peer: RemoteWorker, membership: Membership) -> None:
        try:
            await peer.call(WATCH, timeout=None)
            reason = "it has left"
        except WorkerLost as error:
            reason = error.reason
        except ZmqAutogradError as error:
            reason = f"it cannot be watched: {error}"
        if not membership.is_gone(rank):
            self._tell(self._entries[rank], reason)
        membership.lose(rank, reason)

    def _tell(self, lost: Entry, reason: str) -> None:
        """Tell all other members that one is lost."""

        async def tell(peer: RemoteWorker) -> None:
            with suppress(ZmqAutogradError):  # who cannot be told is lost too, and has its watch
                await peer.call(LOST, lost.name, lost.incarnation, reason, timeout=TELL_SECONDS)

        for rank, peer in self._peers.items():
            if rank != lost.rank:
                telling = asyncio.create_task(tell(peer))
                self._tellings.add(telling)
                telling.add_done_callback(self._tellings.discard)


def _check_names(entries: Sequence[Entry]) -> None:
    ranks: dict[str, int] = {}
    for entry in entries:
        if entry.name in ranks:
            raise ConfigurationError(
                f"expected a different name for each member of the world, got {entry.name!r} "
                f"for ranks {ranks[entry.name]} and {entry.rank}"
            )
        ranks[entry.name] = entry.rank


def _checked(peer: RemoteWorker, entry: Entry) -> RemoteWorker:
    if (peer.name, peer.incarnation) != (entry.name, entry.incarnation):
        reason = (
            f"worker {peer.name!r} (incarnation {peer.incarnation[:8]}) answers in its place at "
            f"{peer.endpoint}"
        )
        raise WorkerLost(entry.name, entry.incarnation, reason)
    return peer
