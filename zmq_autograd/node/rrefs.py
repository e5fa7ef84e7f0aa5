"""The RRefs of one worker: the values that others hold here, and what it holds of others.

Owns the forks of every value that lives here, one for each holder, and drops a value with its last
fork; on the other side, that a fork is not let go before those that were made of it are counted.
``docs/objects.md`` has the protocol.  What users hold is made by the floor above, of a `Fork`.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from zmq_autograd import ids
from zmq_autograd.errors import (
    DeadlineExceeded,
    NotRegistered,
    ProtocolError,
    WorkerLost,
    ZmqAutogradError,
)
from zmq_autograd.node.forks import Fork, Given, Held, M, Owned, is_same, with_values
from zmq_autograd.wire.messages import (
    Message,
    Reply,
    Request,
    RRefAcceptRequest,
    RRefAcceptResponse,
    RRefDeleteRequest,
    RRefDeleteResponse,
    RRefForkRequest,
    RRefForkResponse,
)
from zmq_autograd.wire.objects import Reference

if TYPE_CHECKING:
    from zmq_autograd.node.node import Node

CLAIM_SECONDS: Final = 10.0
"""Seconds to reach the owner of an RRef that was passed on, and have it count the new holder."""

CLAIMS_AT_ONCE: Final = 4
"""How many owners are dialled at once for the RRefs that come from one worker."""


class RRefs:
    """See the module.  All but `keep`, `owned` and letting go runs on the event loop alone."""

    def __init__(self, node: Node, make: Callable[[Fork], Held]) -> None:
        """Make an empty table.

        Args:
            node: the worker that it is of.
            make: makes what users hold of a fork.
        """
        self._node = node
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._owned: dict[int, Owned] = {}
        self._held = 0
        # Forks that were sent, until the new holder tells that they are counted: what they were
        # made of, and the new holder.
        self._pending: dict[int, tuple[Held, Any]] = {}
        # Of what users hold here, by id.
        self._forks: dict[int, Fork] = {}
        # By parent, so that none can have this worker dial without bounds, or keep it from others.
        self._reaching: WeakKeyDictionary[Any, asyncio.Semaphore] = WeakKeyDictionary()
        # The tasks that have owners count forks, until somebody awaits them.  Not with the forks:
        # what a task raises leads to whoever awaited it, and so to what holds the fork.
        self._claims: dict[int, asyncio.Task[None]] = {}

    def status(self) -> dict[str, int]:
        """Return how many values live here, their forks, what is held of others, and what pends."""
        values = list(self._owned.values())
        return {
            "owned": len(values),
            "forks": sum(len(owned.forks) for owned in values),
            "held": self._held,
            "pending": len(self._pending),
        }

    # --- values that live here -------------------------------------------------------------------

    def keep(self, value: Any) -> Held:
        """Keep `value` as long as anybody holds what is returned; from any thread."""
        rref_id = ids.random_id()
        self._owned[rref_id] = Owned(value)
        return self._hold(Fork(rref_id, ids.random_id(), self._reference(rref_id, 0)))

    def owned(self, rref_id: int, peer: Any = None) -> Owned:
        """Return a value that lives here and that `peer`, None for this worker itself, holds.

        Raises:
            NotRegistered: there is none, or no longer, or that worker holds nothing of it.
        """
        owned = self._owned.get(rref_id)
        if owned is None or not owned.is_held_by(peer):
            who = "it" if peer is None else f"worker {peer.name!r}"
            raise self._unknown(rref_id, f"{who} holds none")
        return owned

    def _unknown(self, rref_id: int, reason: str) -> NotRegistered:
        return NotRegistered(
            f"worker {self._node.name!r} has no RRef {rref_id}: {reason}",
            type_name=NotRegistered.__name__,
            worker=self._node.name,
        )

    def _reference(self, rref_id: int, fork_id: int) -> Reference:
        me = self._node.me
        return Reference(me.name, me.incarnation, rref_id, fork_id, tuple(self._node.endpoints))

    def _drop(self, rref_id: int, fork_id: int) -> None:
        """Take in that a fork is no more, if it was."""
        owned = self._owned.get(rref_id)
        if owned is not None:
            owned.forks.pop(fork_id, None)
            if not owned.forks:
                del self._owned[rref_id]
                self._node.contexts.gate.changed()

    # --- holding ---------------------------------------------------------------------------------

    def _hold(self, fork: Fork) -> Held:
        """Make what a user holds of `fork`, which is counted, or will be."""
        if fork.is_refused:
            pass
        elif self.is_mine(fork.reference):
            self._owned[fork.rref_id].forks[fork.fork_id] = None
        else:
            self._held += 1
        held = self._make(fork)
        self._forks[fork.fork_id] = fork
        # What a finalizer refers to lives as long as the object: not this table, then, nor the
        # fork, which both lead to what may hold the object.
        weakref.finalize(
            held, _collected, weakref.ref(self), self._loop, fork.fork_id
        ).atexit = False
        return held

    def is_mine(self, reference: Reference) -> bool:
        """Tell whether the value lives on this worker."""
        return reference.incarnation == self._node.me.incarnation

    def let_go(self, fork_id: int) -> None:
        """Take in that what a user held of a fork is no more."""
        fork = self._forks.pop(fork_id, None)
        self._claims.pop(fork_id, None)
        if fork is None or fork.is_refused:
            return
        fork.is_let_go = True
        if self.is_mine(fork.reference):
            self._drop(fork.rref_id, fork_id)
            return
        self._held -= 1
        if fork.is_claimed:
            self._tell_deleted(fork)

    def _tell_deleted(self, fork: Fork) -> None:
        if fork.peer is not None and fork.peer.is_connected:
            self._tell(fork.peer, RRefDeleteRequest(fork.rref_id, fork.fork_id))

    # --- passing on ------------------------------------------------------------------------------

    def give(self, message: M, peer: Any) -> tuple[M, Given]:
        """Return `message` as it travels to `peer`, a new fork in it for each RRef."""
        given: Given = []

        def refer(held: Held) -> Reference:
            reference = self._fork_for(held, peer)
            given.append((reference.rref_id, reference.fork_id))
            return reference

        try:
            return with_values(message, Held, refer), given
        except BaseException:  # raised by a container of the user's
            self.taken_back(given)
            raise

    def taken_back(self, given: Given) -> None:
        """Take in that a message did not leave after all."""
        for rref_id, fork_id in given:
            if self._pending.pop(fork_id, None) is None:
                self._drop(rref_id, fork_id)

    def _fork_for(self, held: Held, peer: Any) -> Reference:
        rref_id, fork_id = held.fork.rref_id, ids.random_id()
        if self.is_mine(held.fork.reference):
            self._owned[rref_id].forks[fork_id] = peer
            return self._reference(rref_id, fork_id)
        self._pending[fork_id] = held, peer
        told = held.fork.reference
        dialled = getattr(held.fork.peer, "endpoint", None)
        endpoints = [*told.endpoints, *([dialled] if dialled else [])]
        return Reference(
            told.owner, told.incarnation, rref_id, fork_id, tuple(dict.fromkeys(endpoints))
        )

    def take(self, message: M, peer: Any) -> M:
        """Return `message`, which came from `peer`, as its handlers or its caller see it.

        Also of a message that nobody awaits: what is made of it here is let go of again.
        """
        return with_values(message, Reference, lambda reference: self._take(reference, peer))

    def _take(self, reference: Reference, peer: Any) -> Held:
        fork = Fork(reference.rref_id, reference.fork_id, reference)
        if fork.fork_id in self._forks:
            # Letting go of one of the two would let go of the other.
            fork.fork_id = ids.random_id()
            self._refuse(fork, ProtocolError(f"fork {reference.fork_id} of an RRef came twice"))
        elif self.is_mine(reference):
            self._tell_accepted(fork, peer)
            if not self._may_come_home(fork, peer):
                reason = f"worker {peer.name!r} holds none"
                self._refuse(fork, self._unknown(fork.rref_id, reason))
        elif reference.incarnation == peer.incarnation:
            fork.peer = peer  # the owner counts what it sends
        else:
            fork.is_claimed = False
            self._claims[fork.fork_id] = self._node.spawn(self._claim(fork, peer))
        return self._hold(fork)

    def _refuse(self, fork: Fork, error: ZmqAutogradError) -> None:
        """Have who waits for the claims of its message hear of it; the others in it are good."""
        fork.is_refused = True
        self._claims[fork.fork_id] = self._node.spawn(_raise(error))

    def _may_come_home(self, fork: Fork, peer: Any) -> bool:
        owned = self._owned.get(fork.rref_id)
        return (
            owned is not None
            and owned.is_held_by(peer)
            and is_same(owned.forks.get(fork.fork_id, peer), peer)
        )

    async def until_claimed(self, message: Message, until: float | None = None) -> None:
        """Wait until the owners count all RRefs in `message`, which was taken.

        Args:
            message: the message.
            until: when to give up, by the event loop's clock; None for never.

        Raises:
            DeadlineExceeded: an owner has not answered by then.
            ZmqAutogradError: one cannot be reached, or knows nothing of it.
        """
        if not self._claims:  # so it is for nearly all messages, which need not be searched
            return
        claims: list[tuple[str, asyncio.Task[None]]] = []

        def look(held: Held) -> Held:
            claim = self._claims.pop(held.fork.fork_id, None)
            if claim is not None:
                claims.append((held.fork.reference.owner, claim))
            return held

        with_values(message, Held, look)
        for owner, claim in claims:
            try:
                async with asyncio.timeout_at(until):
                    await asyncio.shield(claim)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"worker {owner!r}, who owns an RRef that was passed on, did not count its new "
                    "holder in time",
                    workers=(owner,),
                ) from None

    async def _claim(self, fork: Fork, parent: Any) -> None:
        try:
            async with asyncio.timeout(CLAIM_SECONDS):
                async with self._reaching.setdefault(parent, asyncio.Semaphore(CLAIMS_AT_ONCE)):
                    fork.peer = await self._reach(fork.reference)
                await fork.peer.request(RRefForkRequest(fork.rref_id, fork.fork_id))
        except TimeoutError:
            raise _unreachable(fork.reference, "it did not answer in time") from None
        finally:
            fork.is_claimed = True
            self._tell_accepted(fork, parent)
            if fork.is_let_go:
                self._tell_deleted(fork)

    async def _reach(self, reference: Reference) -> Any:
        """Return the worker that owns `reference`, connected to it now if it was not."""
        for channel in self._node.channels:
            if channel.peer is not None and channel.peer.incarnation == reference.incarnation:
                return channel.peer
        reason = "it tells no endpoint" if not reference.endpoints else ""
        for endpoint in reference.endpoints:
            try:
                channel = await self._node.connect(endpoint, CLAIM_SECONDS)
            except ZmqAutogradError as error:
                reason = str(error)
                continue
            if channel.peer.incarnation == reference.incarnation:
                return channel.peer
            reason = f"at {endpoint} there is another worker, {channel.peer.name!r}"
            channel.users -= 1
            if not channel.users:
                channel.close("it is not the worker that was looked for")
        raise _unreachable(reference, reason)

    def _tell_accepted(self, fork: Fork, parent: Any) -> None:
        if parent.is_connected:
            self._tell(parent, RRefAcceptRequest(fork.rref_id, fork.fork_id))

    def _tell(self, peer: Any, message: Request) -> None:
        async def tell() -> None:
            await peer.request(message)

        self._node.spawn(tell())

    # --- messages --------------------------------------------------------------------------------

    @property
    def handlers(self) -> dict[type[Request], Callable[[Any, Any], Awaitable[Reply]]]:
        """What handles each type of message about who holds what."""
        return {
            RRefForkRequest: self.fork,
            RRefAcceptRequest: self.accept,
            RRefDeleteRequest: self.delete,
        }

    async def fork(self, request: RRefForkRequest, peer: Any) -> RRefForkResponse:
        """Count another holder."""
        owned = self._owned.get(request.rref_id)
        if owned is None:
            raise self._unknown(request.rref_id, "its last holder let go or was lost")
        if not peer.is_connected:
            raise WorkerLost(peer.name, peer.incarnation, "it is gone")
        if not is_same(owned.forks.setdefault(request.fork_id, peer), peer):
            raise ProtocolError(f"fork {request.fork_id} of RRef {request.rref_id} is another's")
        return RRefForkResponse()

    async def accept(self, request: RRefAcceptRequest, peer: Any) -> RRefAcceptResponse:
        """Let go of what a fork was made of, which is counted now."""
        pending = self._pending.get(request.fork_id)
        if pending is not None and is_same(pending[1], peer):
            del self._pending[request.fork_id]
        return RRefAcceptResponse()

    async def delete(self, request: RRefDeleteRequest, peer: Any) -> RRefDeleteResponse:
        """Take in that a holder let go."""
        owned = self._owned.get(request.rref_id)
        if owned is not None and is_same(owned.forks.get(request.fork_id), peer):
            self._drop(request.rref_id, request.fork_id)
        return RRefDeleteResponse()

    # --- ends ------------------------------------------------------------------------------------

    def peer_lost(self, peer: Any) -> None:
        """Take in that `peer` is gone, and with it all that it held."""
        for rref_id, owned in list(self._owned.items()):
            for fork_id, holder in list(owned.forks.items()):
                if holder is peer:
                    self._drop(rref_id, fork_id)
        self._pending = {id_: of for id_, of in self._pending.items() if of[1] is not peer}

    def close(self) -> None:
        """Let go of everything."""
        self._owned.clear()
        self._pending.clear()


def _collected(table: weakref.ref[RRefs], loop: asyncio.AbstractEventLoop, fork_id: int) -> None:
    """Let go of a fork, from whichever thread collects garbage."""
    rrefs = table()
    if rrefs is None:
        return
    try:
        loop.call_soon_threadsafe(rrefs.let_go, fork_id)
    except RuntimeError:
        return  # the loop is closed: all that was held has gone with it


async def _raise(error: ZmqAutogradError) -> None:
    raise error


def _unreachable(reference: Reference, reason: str) -> WorkerLost:
    return WorkerLost(
        reference.owner,
        reference.incarnation,
        f"it owns an RRef that was passed on, and cannot be reached: {reason}",
    )
