"""The contexts of one worker, and what it does with the messages about them.

Owns which contexts there are and which there were: a message that comes late makes nothing anew.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from zmq_autograd import ids
from zmq_autograd.engine.context import Context
from zmq_autograd.engine.distributed_pass import Settings, Told
from zmq_autograd.engine.gate import Gate
from zmq_autograd.engine.host import Host, Peer, tell
from zmq_autograd.engine.local_context import LocalContext
from zmq_autograd.errors import ContextError, ResourceExhausted, WorkerLost
from zmq_autograd.session import exception_from
from zmq_autograd.wire.messages import (
    AbortPass,
    AbortPassResponse,
    BackwardRequest,
    BackwardResponse,
    CleanupContextRequest,
    CleanupContextResponse,
    CommitPass,
    CommitPassResponse,
    ErrorResponse,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    Reply,
    Request,
    StartPass,
    StartPassResponse,
)

CLEANUP_SECONDS: Final = 2.0
"""Seconds that leaving a context waits for the other workers."""

MAX_CONTEXTS: Final = 65_536
"""Contexts that a worker is in at most: some 256 MiB of their bare selves."""

REMEMBERED_SECONDS: Final = 60.0
"""Seconds for which an ended context is remembered: as long as a call takes by default."""

REMEMBERED: Final = 65_536
"""Ended contexts that are remembered at most; some 8 MiB."""


class Contexts:
    """See the module.

    Attributes:
        host: the worker.
        gate: where steps of optimizers wait for the contexts that read parameters.
    """

    def __init__(self, host: Host) -> None:
        """Make an empty table for the worker `host`."""
        self.host = host
        self.gate = Gate(host.name, self)
        self._contexts: dict[int, LocalContext] = {}
        # When each ended, and by whose loss, if that was why.
        self._ended: OrderedDict[int, tuple[float, str]] = OrderedDict()

    def __iter__(self) -> Iterator[LocalContext]:
        return iter(list(self._contexts.values()))

    def __len__(self) -> int:
        return len(self._contexts)

    def __contains__(self, context: object) -> bool:
        return (
            isinstance(context, LocalContext) and self._contexts.get(context.context_id) is context
        )

    # --- making and finding ----------------------------------------------------------------------

    def new(self, context_id: int | None = None) -> LocalContext:
        """Return a context that this worker owns; it is there once it is entered.

        Args:
            context_id: its id, which no other context of any worker has; by default a random one.
        """
        return self._made(context_id or ids.random_id(), None)

    def _made(self, context_id: int, parent: Peer | None) -> LocalContext:
        made = LocalContext(context_id, self.host, self, parent)
        made.user = Context(made)
        return made

    def add(self, context: LocalContext) -> None:
        """Have a new context from now on.

        Raises:
            ContextError: it was entered before.
        """
        if context.context_id in self._contexts:
            raise context.error("it has been entered already: open one for each task")
        self._contexts[context.context_id] = context

    def join(self, context_id: int, peer: Peer, *, from_owner: bool) -> LocalContext:
        """Return the context that a call of `peer`'s came in, made if it is new here.

        Args:
            context_id: the context.
            peer: who called.
            from_owner: it is the worker that opened the context.

        Raises:
            ContextError: it has ended.
            WorkerLost: it has ended since a worker was lost on the way to its owner.
        """
        context = self._contexts.get(context_id)
        if context is None:
            self._check_not_ended(context_id)
            if len(self._contexts) >= MAX_CONTEXTS:
                raise ResourceExhausted(
                    f"worker {self.host.name!r} has {MAX_CONTEXTS} contexts: that is the limit",
                    worker=self.host.name,
                )
            context = self._contexts[context_id] = self._made(context_id, peer)
        context.peers.setdefault(peer)
        if from_owner and context.owner is None:
            context.owner = peer
        return context

    def _check_not_ended(self, context_id: int) -> None:
        if context_id in self._ended:
            _, lost = self._ended[context_id]
            if not lost:
                raise self._unknown(context_id)
            reason = f"context {context_id} on worker {self.host.name!r} ended with it"
            raise WorkerLost(lost, reason=reason)

    def _of(self, context_id: int, peer: Peer) -> LocalContext | None:
        """Return a context that `peer` has to do with; any other is none of its business."""
        context = self._contexts.get(context_id)
        return context if context is not None and peer in context.peers else None

    def find(self, context_id: int, peer: Peer) -> LocalContext:
        """Return a context that `peer` has to do with.

        Raises:
            ContextError: there is no such context, or no longer.
        """
        return self._there(context_id, self._of(context_id, peer))

    def get(self, context_id: int) -> LocalContext:
        """Return a context of this worker.

        Raises:
            ContextError: there is no such context, or no longer.
        """
        return self._there(context_id, self._contexts.get(context_id))

    def _there(self, context_id: int, context: LocalContext | None) -> LocalContext:
        if context is None:
            self._check_not_ended(context_id)
            raise self._unknown(context_id)
        return context

    def reached(self, context_id: int) -> LocalContext | None:
        """Return a context of this worker, None if it has not come here.

        Raises:
            ContextError: it has ended.
            WorkerLost: it has ended since a worker was lost on the way to its owner.
        """
        if context_id not in self._contexts:
            self._check_not_ended(context_id)
        return self._contexts.get(context_id)

    def _unknown(self, context_id: int) -> ContextError:
        return ContextError(
            f"worker {self.host.name!r} has no autograd context {context_id}",
            context_id=context_id,
            worker=self.host.name,
        )

    # --- messages --------------------------------------------------------------------------------

    @property
    def handlers(self) -> dict[type[Request], Callable[[Any, Any], Awaitable[Reply]]]:
        """What handles each type of message about contexts."""
        return {
            StartPass: self.start_pass,
            PropagateGradientsRequest: self.propagate_gradients,
            AbortPass: self.abort_pass,
            CommitPass: self.commit_pass,
            BackwardRequest: self.backward,
            CleanupContextRequest: self.cleanup_context,
        }

    async def start_pass(self, request: StartPass, peer: Peer) -> StartPassResponse:
        """Take part in a pass, and return when this part of it is complete."""
        context = self._of(request.context_id, peer)
        if context is None:
            _, lost = self._ended.get(request.context_id, (0.0, "nobody"))
            if not lost:
                raise self._unknown(request.context_id)
            # The call went to a handler that took no part in it; or the context ended here with a
            # worker that was lost, which matters only if a gradient has to come here.
            return StartPassResponse(takes_part=False)
        # Nothing is awaited before the pass has begun: its gradients may be the next message.
        passes = context.passes
        passes.learn_committed(request.committed)
        running = passes.find(request.pass_id)
        if running is not None:
            running.announced(peer, request.message_ids)
            # Who hears the reply knows what will come from here.
            was_told = await running.has_told(peer)
            return StartPassResponse(is_complete=False, takes_part=was_told)
        if passes.is_over(request.pass_id) or context.parent is None:  # an owner starts its own
            return StartPassResponse(is_complete=False)
        settings = _settings(request, request.pass_id)
        running = passes.start(settings, Told(peer, frozenset(request.awaited_ids)))
        running.announced(peer, request.message_ids)
        await running.completion()
        return StartPassResponse()

    async def propagate_gradients(
        self, request: PropagateGradientsRequest, peer: Peer
    ) -> PropagateGradientsResponse:
        """Take gradients over; those of a pass that has ended are dropped."""
        context = self.find(request.metadata.context_id, peer)
        context.passes.propagated(request, peer)
        return PropagateGradientsResponse()

    async def abort_pass(self, request: AbortPass, peer: Peer) -> AbortPassResponse:
        """End a pass here and behind."""
        context = self._of(request.context_id, peer)
        if context is None:
            return AbortPassResponse()
        error = ErrorResponse(
            request.code,
            request.text,
            request.origin,
            request.type_name,
            request.traceback,
            request.path,
            request.incarnation,
            request.context_id,
            request.message_ids,
            request.workers,
        )
        cause = exception_from(error, peer.name)
        awaited = await context.passes.heard_aborted(request.pass_id, cause, peer)
        return AbortPassResponse(sorted(awaited.message_ids), sorted(awaited.workers))

    async def commit_pass(self, request: CommitPass, peer: Peer) -> CommitPassResponse:
        """Take in that a pass is complete everywhere."""
        context = self._of(request.context_id, peer)
        if context is not None:
            context.passes.learn_committed(request.committed)
            await context.passes.until_committed()
        return CommitPassResponse()

    async def backward(self, request: BackwardRequest, peer: Peer) -> BackwardResponse:
        """Run a pass for `peer`, or pass the request on towards the context's owner."""
        passes = self.find(request.context_id, peer).passes
        return BackwardResponse(await passes.run(_settings(request)))

    async def cleanup_context(
        self, request: CleanupContextRequest, peer: Peer
    ) -> CleanupContextResponse:
        """Drop a context, here and behind; it ends by its owner's will, told along the parents."""
        context = self._of(request.context_id, peer)
        if context is not None and peer in (context.parent, context.owner):
            context.passes.learn_committed(request.committed)
            await context.passes.until_committed()
            await self.clean_up(context, source=peer, lost=request.lost)
        elif not (request.context_id in self._contexts or request.context_id in self._ended):
            # Or a call on its way would make it.
            self._remember(request.context_id, request.lost)
        return CleanupContextResponse()

    # --- ending ----------------------------------------------------------------------------------

    async def clean_up(
        self, context: LocalContext, source: Peer | None = None, lost: str = ""
    ) -> None:
        """End `context` here and on every worker behind; never raises because of one of those.

        Args:
            context: one of this table.
            source: who asked for it, and so needs not be told.
            lost: the worker whose loss is why.
        """
        self._forget(context, lost)
        seconds = CLEANUP_SECONDS if source is None else CLEANUP_SECONDS / 2
        others = [peer for peer in context.peers if peer is not source and peer.is_connected]
        request = CleanupContextRequest(context.context_id, context.passes.committed, lost)
        await tell(self.host, others, request, seconds)

    def peer_lost(self, peer: Peer) -> None:
        """Drop the contexts whose way to their owner led over `peer`."""
        for context in self:
            context.peer_lost(peer)
            if context.parent is peer:
                self.host.spawn(self.clean_up(context, source=peer, lost=peer.name))

    def close(self) -> None:
        """End all contexts; the other workers learn it when this one has gone."""
        for context in self:
            self._forget(context)

    def _forget(self, context: LocalContext, lost: str = "") -> None:
        self._contexts.pop(context.context_id, None)
        self._remember(context.context_id, lost)
        context.end(lost)
        self.gate.changed()

    def _remember(self, context_id: int, lost: str = "") -> None:
        now = time.monotonic()
        self._ended[context_id] = now, lost
        while self._ended:
            oldest, _ = next(iter(self._ended.values()))
            if len(self._ended) <= REMEMBERED and now - oldest <= REMEMBERED_SECONDS:
                break
            self._ended.popitem(last=False)


def _settings(request: StartPass | BackwardRequest, pass_id: int = 0) -> Settings:
    return Settings(
        request.asked_id,
        request.retain_graph,
        request.inputs_only,
        request.accumulate_grad,
        pass_id,
        request.check_nan,
    )
