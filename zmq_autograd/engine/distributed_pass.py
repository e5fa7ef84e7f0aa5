"""One worker's part in one backward pass: who is told, what is awaited, when it is complete.

Owns the order of messages: `StartPass` to everybody first, then gradients as they become complete.
What is computed is `zmq_autograd.autograd.LocalPass`'s; what becomes of its gradients is the
context's.  Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from zmq_autograd.autograd.functions import RECEIVE_NAME, SEND_NAME, ReceiveFunction
from zmq_autograd.autograd.local_pass import Emission, LocalPass, Root, Wanted, walk_from
from zmq_autograd.autograd.walk import TooManyNodes
from zmq_autograd.engine.host import Host, Peer, current_span
from zmq_autograd.errors import ContextError, ProtocolError, WorkerLost
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    PropagateGradientsRequest,
    StartPass,
    StartPassResponse,
)

if TYPE_CHECKING:
    from zmq_autograd.engine.local_context import LocalContext

T = TypeVar("T")

Resolved = list[tuple[int, Sequence[Tensor | None] | None]]
"""Roots by their numbers, with their gradients; None for a root that gets none."""

INLINE_NODES: Final = 256
"""Nodes of a graph that is planned on the event loop, which takes less than to hand it over."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What everybody in a pass is told.

    Attributes:
        asked_id: the request for it.
        retain_graph: keep the graph for another pass.
        inputs_only: accumulate no gradients but those of the initiator's inputs.
        accumulate_grad: add them to ``.grad`` too.
        pass_id: the pass, once the owner has granted it.
        check_nan: whether anomaly mode looks for NaN, None where that is off.
    """

    asked_id: int
    retain_graph: bool = False
    inputs_only: bool = False
    accumulate_grad: bool = False
    pass_id: int = 0
    check_nan: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """What a pass starts from, on the worker that called `backward`.

    Attributes:
        edges: where in the graph the losses are.
        grads: the gradient that each is given.
        inputs: the tensors whose gradients are wanted, None for all leaves.
    """

    edges: Sequence[GradientEdge] = ()
    grads: Sequence[Tensor] = ()
    inputs: Sequence[Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """Who told of a pass first.

    Attributes:
        peer: that worker.
        awaited_ids: messages of its that it awaits gradients for from this one.
    """

    peer: Peer
    awaited_ids: frozenset[int]


@dataclass(slots=True)
class Awaited:
    """What a pass waits for.

    Attributes:
        message_ids: forward messages whose gradients have not come.
        workers: the workers that they should come from, and those whose part is not complete.
    """

    message_ids: set[int] = field(default_factory=set)
    workers: set[str] = field(default_factory=set)


class Pass:
    """See the module."""

    def __init__(
        self,
        context: LocalContext,
        host: Host,
        settings: Settings,
        losses: Losses,
        told_by: Told | None = None,
    ) -> None:
        """Fix what takes part, which is all that was recorded until now, and begin.

        Args:
            context: the context.
            host: the worker.
            settings: of the pass.
            losses: what it starts from here.
            told_by: who told of it first; None where it was asked for.
        """
        self.settings = settings
        self.cause: BaseException | None = None
        self._context = context
        self._host = host
        self._losses = losses
        self._told_by = told_by
        self._span = current_span.get()
        self._peers = [peer for peer in context.peers if peer.is_connected]
        self._sends = context.record.roots()
        self._numbers = {send.message_id: n for n, send in enumerate(self._sends, start=1)}
        # Messages of ours whose gradients have not come and may still.
        self._awaited = dict(self._numbers)
        # Roots with their gradients, None for undefined, that the local pass has not been given.
        self._resolved: Resolved = []
        self._changed = asyncio.Event()
        # Messages of ours whose graph is freed, and whose gradients will come all the same: unless
        # they are undefined, the pass must fail.
        self._stale: dict[int, Peer] = {}
        self._has_told = asyncio.Event()
        self._incomplete = set(self._peers)
        self._is_computing = False
        self._has_gradients = False
        self._gradients: dict[Tensor, Tensor] = {}
        # Roots' edges whose graph cannot be run again, and nodes, as far as these matter.
        self._freed: list[tuple[int, int]] = []
        self._spent: set[Node] = set()
        self._task = host.spawn(self._run())

    @property
    def pass_id(self) -> int:
        """The pass's id."""
        return self.settings.pass_id

    async def completion(self) -> None:
        """Wait until this worker's part, and those of all whom it told first, are complete.

        Raises:
            BaseException: the first cause, if the pass is aborted.

        Cancelling it aborts the pass.
        """
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self.cause is None:
                self.abort(ContextError("the backward pass was given up by who asked for it"))
                raise
        if self.cause is not None:  # aborted, maybe just now
            raise self.cause

    def awaited(self) -> Awaited:
        """Return what it waits for now."""
        workers = {peer.name for peer in self._incomplete}
        if self._is_computing:
            workers.add(self._host.name)
        peers = {i: self._sends[number - 1].peer for i, number in self._awaited.items()}
        peers |= self._stale
        return Awaited(set(peers), workers | {peer.name for peer in peers.values()})

    def take_gradients(self) -> dict[Tensor, Tensor]:
        """Return what it found, once it is complete everywhere; free what it ran through."""
        for root, index in self._freed:
            if root:
                self._sends[root - 1].free(index)
        self._context.record.forget_kept(self._spent)
        self._spent.clear()
        gradients, self._gradients = self._gradients, {}
        return gradients

    # --- what others tell ------------------------------------------------------------------------

    def announced(self, peer: Peer, message_ids: Iterable[int]) -> None:
        """Take in that `peer` takes part, and which gradients it will propagate to this worker."""
        coming = frozenset(message_ids)
        sends = self._context.record.sends
        for message_id in coming - self._numbers.keys():
            send = sends.get(message_id)
            if send is not None and send.peer is peer and send.freed:
                self._stale[message_id] = peer
        self._undefine(peer, coming)

    async def has_told(self, peer: Peer) -> bool:
        """Wait until this worker has told everybody what gradients it will propagate.

        Returns:
            Whether `peer` was told: one that was met after the pass began here gets none.
        """
        await self._has_told.wait()
        return peer in self._peers

    def propagated(self, peer: Peer, message_id: int, grads: Sequence[Tensor | None]) -> None:
        """Take in the gradients for a message of ours; what is not awaited is dropped.

        Raises:
            ProtocolError: they cannot be those of that message.
            RuntimeError: the graph that they belong to was freed.
        """
        send = self._context.record.sends.get(message_id)
        if send is None:
            return
        if send.peer is not peer:
            raise ProtocolError(f"message {message_id} was not sent to worker {peer.name!r}")
        send.check(grads)
        self._stale.pop(message_id, None)
        self._changed.set()
        number = self._awaited.pop(message_id, None)
        if number is not None:
            with self._span(SEND_NAME):
                self._resolve(number, grads)

    def peer_lost(self, peer: Peer) -> None:
        """Take in that `peer` is lost: what it was to propagate will not come."""
        awaited = [self._sends[number - 1].peer for number in self._awaited.values()]
        if peer in awaited or peer in self._stale.values():
            self.abort(WorkerLost(peer.name, peer.incarnation, "gradients were awaited from it"))

    def _undefine(self, peer: Peer, coming: frozenset[int] = frozenset()) -> None:
        """Take in that `peer` propagates nothing for messages of ours but those in `coming`."""
        for message_id, number in list(self._awaited.items()):
            if self._sends[number - 1].peer is peer and message_id not in coming:
                del self._awaited[message_id]
                self._resolve(number, None)

    def _resolve(self, root: int, grads: Sequence[Tensor | None] | None) -> None:
        self._resolved.append((root, grads))
        self._changed.set()

    # --- running ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._context.enter_pass(self.pass_id)
        try:
            await self._context.passes.until_idle()
            async with asyncio.TaskGroup() as group:
                await self._run_part(group)
        except BaseException as error:  # noqa: BLE001  # a hook's SystemExit, too: `completion` has it
            first = _first_of(error)
            if isinstance(first, asyncio.CancelledError):  # of a hook's, or this worker is leaving
                first = RuntimeError("the backward pass was cancelled from within")
            if self.cause is None:
                self._context.passes.raised(self.settings.asked_id, first)
            self.abort(first)
        else:
            self._context.passes.completed(self)

    async def _run_part(self, group: asyncio.TaskGroup) -> None:
        if self._losses.edges:
            self._resolve(0, self._losses.grads)
        for send in self._sends:
            if send.peer not in self._peers:
                self._undefine(send.peer)
        try:
            local = self._planned(INLINE_NODES)
        except TooManyNodes:
            local = await self._compute(self._planned)
        self._tell_all(local.receives, group)
        self._has_told.set()
        while self._stale or self._incomplete or not local.is_complete:
            await self._changed.wait()
            self._changed.clear()
            if self._resolved:
                for receive, grads in await self._advanced(local):
                    self._host.spawn(self._propagate(receive, grads))
                await asyncio.sleep(0)  # they have left, or the pass is aborted
        self._gradients, self._freed = local.gradients, local.freed
        if self._context.record.kept:
            self._spent = await self._compute(local.spent)

    def _planned(self, at_most: float = math.inf) -> LocalPass:
        """Return the plan of this worker's part; raise `TooManyNodes` if it has so many."""
        roots = [Root(self._losses.edges), *(Root(send.edges) for send in self._sends)]
        graph = walk_from(roots, at_most)
        wanted = Wanted(leaves=not self.settings.inputs_only, inputs=self._losses.inputs or ())
        local = LocalPass(
            graph,
            self._context.context_id,
            roots,
            wanted,
            retain_graph=self.settings.retain_graph,
            check_nan=self.settings.check_nan,
        )
        received = self._context.record.receives
        if any(received.get(each.message_id) is not each for each in local.receives):
            raise self._context.error(
                "backward reached a tensor that another worker of this process received: only "
                "what calls have brought here is on this worker's graph"
            )
        return local

    async def _advanced(self, local: LocalPass) -> list[Emission]:
        """Give `local` what was resolved, and return what is complete now."""
        resolved, self._resolved = self._resolved, []
        if any(grad is not None for _, grads in resolved for grad in grads or ()):
            self._has_gradients = True
        advance = partial(_advance, local, resolved)
        # Without any gradient nothing is computed.
        return await self._compute(advance) if self._has_gradients else advance()

    def _tell_all(self, receives: Iterable[ReceiveFunction], group: asyncio.TaskGroup) -> None:
        """Announce the pass to each peer, with what will be propagated to it."""
        coming: dict[Peer, list[int]] = {peer: [] for peer in self._peers}
        for receive in receives:
            coming.setdefault(receive.peer, []).append(receive.message_id)
        awaited: dict[Peer, list[int]] = {peer: [] for peer in self._peers}
        for send in self._sends:
            awaited.setdefault(send.peer, []).append(send.message_id)
        for peer in self._peers:
            told = self._told_by
            if told is not None and told.peer is peer and told.awaited_ids == set(coming[peer]):
                self._incomplete.discard(peer)  # it knows all that it would be told
            else:
                group.create_task(self._tell(peer, coming[peer], awaited[peer]))

    async def _compute(self, function: Callable[[], T]) -> T:
        """Run `function` off the loop; a pass that is aborted meanwhile leaves it running."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._context.passes.computing(self._host.spawn(self._computed(function, outcome)))
        self._is_computing = True
        try:
            return await outcome
        finally:
            self._is_computing = False

    async def _computed(self, function: Callable[[], T], outcome: asyncio.Future[T]) -> None:
        """Put what becomes of `function` into `outcome`: a task that raises may end the loop."""
        self._context.enter_pass(self.pass_id)
        try:
            result = await self._host.compute(function)
        except BaseException as error:  # noqa: BLE001  # whatever it is, the pass has it
            if not outcome.done():
                outcome.set_exception(error)
        else:
            if not outcome.done():
                outcome.set_result(result)

    async def _tell(
        self, peer: Peer, message_ids: Sequence[int], awaited_ids: Sequence[int]
    ) -> None:
        settings, passes = self.settings, self._context.passes
        committed = passes.committed
        reply = await peer.request(
            StartPass(
                self._context.context_id,
                settings.pass_id,
                message_ids,
                awaited_ids,
                settings.retain_graph,
                settings.inputs_only,
                settings.accumulate_grad,
                committed,
                settings.asked_id,
                settings.check_nan,
            ),
            timeout=None,
        )
        self._incomplete.discard(peer)
        self._changed.set()
        passes.told_committed(peer, committed)
        if isinstance(reply, StartPassResponse) and not reply.takes_part:
            self._undefine(peer)

    async def _propagate(self, receive: ReceiveFunction, grads: list[Tensor | None]) -> None:
        """Send gradients back; that they were taken over need not be awaited.

        Whoever does not get them is not complete, and learns it if this worker is lost.
        """
        peer: Peer = receive.peer
        if not peer.is_connected and all(grad is None for grad in grads):
            return
        metadata = AutogradMetadata(self._context.context_id, receive.message_id)
        request = PropagateGradientsRequest(
            metadata, grads, self.settings.retain_graph, self.settings.pass_id
        )
        try:
            with self._span(RECEIVE_NAME):
                await peer.request(request, timeout=None)
        except Exception as error:  # noqa: BLE001  # whatever it is, all must hear of it
            if self._task.done():  # this part is complete: it is the owner's to say what follows
                self._context.passes.report(self.pass_id, error)
            else:
                self.abort(error)

    # --- ending it -------------------------------------------------------------------------------

    def abort(self, cause: BaseException) -> None:
        """End it here, unless it has ended; who told of it hears of `cause`, and so its owner."""
        if self.cause is None and self._context.passes.find(self.pass_id) is self:
            self.cause = cause
            self._context.passes.aborted(self, self.awaited())
            self._gradients.clear()
            self._has_told.set()
            if self._task is not asyncio.current_task():
                self._task.cancel()


def _advance(local: LocalPass, resolved: Resolved) -> list[Emission]:
    for root, grads in resolved:
        local.resolve(root, grads)
    return local.run()


def _first_of(error: BaseException) -> BaseException:
    """Return the first error of a task group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
