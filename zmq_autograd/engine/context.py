"""A distributed autograd context on one worker: what its user holds, and what its messages meet.

Owns which workers it has reached, whose turn it is to run a pass, and which one was complete last.
How a pass goes is `distributed_pass`'s; which contexts a worker has, `contexts`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from torch import Tensor

from zmq_autograd import ids
from zmq_autograd.autograd.accumulate import is_quick
from zmq_autograd.autograd.record import Record
from zmq_autograd.engine.distributed_pass import Losses, Pass, Settings, Told
from zmq_autograd.engine.graph import collect, to_dot
from zmq_autograd.engine.host import Host, Peer
from zmq_autograd.engine.losses import losses_of
from zmq_autograd.engine.places import Place
from zmq_autograd.errors import ContextError, DeadlineExceeded, ZmqAutogradError
from zmq_autograd.session import checked_timeout
from zmq_autograd.wire.messages import BackwardRequest, CommitPass, PropagateGradientsRequest

if TYPE_CHECKING:
    from zmq_autograd.engine.contexts import Contexts

BACKWARD_TIMEOUT: Final = 60.0
"""Seconds that a backward pass may take unless told otherwise."""

COMMIT_SECONDS: Final = 0.01
"""Seconds after which a worker is told of a complete pass if no other message told it."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What running code is in: a context, and the place where it makes its messages."""

    context: Context
    place: Place


current_scope: Final[ContextVar[Scope | None]] = ContextVar("zmq_autograd_scope", default=None)


class Context:
    """One distributed autograd context, as one worker sees it.

    ``async with worker.context() as ctx`` opens one and, on leaving, drops it everywhere; handlers
    of calls made in it get their own worker's view of it from `za.current_context`.

    Attributes:
        context_id: the same on every worker, an unsigned 64-bit number.
    """

    def __init__(self, context_id: int, host: Host, table: Contexts, parent: Peer | None) -> None:
        """Make a context; `Contexts` does.

        Args:
            context_id: its id.
            host: the worker that it is on.
            table: what forgets it once it has ended.
            parent: where it came from, None on the worker that opened it.
        """
        self.context_id = context_id
        self.record = Record(context_id)
        self.parent = parent
        # A dict for its order: everybody that a call was exchanged with.
        self.peers: dict[Peer, None] = {} if parent is None else {parent: None}
        self.is_ended = False
        # The last pass that is complete everywhere, 0 for none.
        self.committed = 0
        # The pass that runs; and the one whose part here is complete, until all are.
        self.running: Pass | None = None
        self.staged: Pass | None = None
        self.table = table
        self._host = host
        self._broken: str | None = None
        self._gradients_broken: BaseException | None = None
        self._committing: asyncio.Task[None] | None = None
        self._owing: set[Peer] = set()
        self._over: set[int] = set()
        # By pass asked for here, what it starts from, and why it was aborted.
        self._requested: dict[int, Losses] = {}
        self._causes: dict[int, BaseException] = {}
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<Context {self.context_id} on worker {self._host.name!r}>"

    # --- what its user holds ---------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if current_scope.get() is not None:
            raise ContextError("a context is open here already: contexts do not nest")
        if self.is_ended:
            raise self.ended_error()
        self.table.add(self)
        self.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        current_scope.set(None)
        await self.table.clean_up(self)

    def enter(self, served: int = 0) -> Place:
        """Have what runs in this task from now on be in this context; return its place there.

        Args:
            served: the message or pass that it serves, 0 for the program that opened the context.
        """
        place = Place(self.context_id, served)
        current_scope.set(Scope(self, place))
        return place

    async def backward(
        self,
        roots: Tensor | Sequence[Tensor],
        grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
        *,
        retain_graph: bool = False,
        inputs: Tensor | Sequence[Tensor] | None = None,
        accumulate_grad: bool = False,
        create_graph: bool = False,
        timeout: float | None = BACKWARD_TIMEOUT,
    ) -> None:
        """Compute the gradients of `roots` on every worker that this context has reached.

        They are added to those that `gradients` returns, on each worker for its own leaves; all of
        them, or none if this raises.  Passes of one context run one after another.

        Args:
            roots: a tensor or several, of this worker, that require grad.
            grad_tensors: for each root the gradient to start from, of its shape; None stands for 1
                and needs a root of one element.
            retain_graph: keep the graph for another pass.
            inputs: find the gradients of these tensors of this worker alone, leaves or not.
            accumulate_grad: add the gradients to the leaves' ``.grad`` too.
            create_graph: must be False: gradients of gradients are not supported across workers.
            timeout: seconds, None for ever.

        Raises:
            ConfigurationError: the roots, their gradients or the timeout cannot be.
            ContextError: the context has ended, belongs to a pass that failed without
                `retain_graph`, or does not reach back to what a root was computed from.
            RemoteError: a hook or a function raised on another worker.
            WorkerLost: a gradient would have to go to a worker that is lost.
            DeadlineExceeded: time ran out; names the messages and workers that were awaited.
            Exception: what a hook, a function or torch raised on this worker.

        Cancelling it aborts the pass everywhere.
        """
        self.check_usable()
        timeout = checked_timeout(timeout)
        losses = losses_of(roots, grad_tensors, inputs, create_graph=create_graph)
        settings = Settings(ids.random_id(), retain_graph, inputs is not None, accumulate_grad)
        self._requested[settings.pass_id] = losses
        running = asyncio.ensure_future(self.run_pass(settings))
        try:
            done, _ = await asyncio.wait({running}, timeout=timeout)
            if not done:
                raise await self._expired(settings.pass_id, timeout)
            running.result()
        finally:
            self._requested.pop(settings.pass_id, None)
            self._causes.pop(settings.pass_id, None)
            running.add_done_callback(_hear)
            running.cancel()

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of this worker's leaves, summed over the context's passes.

        Raises:
            ContextError: the context has ended, or a hook failed to take a pass's gradients over.
        """
        if self.is_ended:
            raise self.ended_error()
        if self._gradients_broken is not None:
            raise self._error(f"its gradients are lost: {self._gradients_broken}")
        return dict(self.record.gradients)

    async def graph(self) -> str:
        """Return the autograd graph of the context, over all its workers, as Graphviz text (DOT).

        Each worker is a cluster of its send and receive functions.  Edges lead where gradients
        flow: within a worker from a send function to the receive functions that it was computed
        from, between workers from a message's receive function to its send function.  What a pass
        has freed is dashed, without edges.  A worker that is lost, or does not answer within five
        seconds, is left out with all behind it, and the title says so.

        Raises:
            ContextError: the context has ended.
        """
        if self.is_ended:
            raise self.ended_error()
        return to_dot(self.context_id, await collect(self, self._host))

    # --- calls -----------------------------------------------------------------------------------

    def sending(self, peer: Peer, message_id: int, tensors: Iterable[Tensor]) -> bool:
        """Record that a message leaves for `peer`; say whether it is on the graph.

        Raises:
            ContextError: the context has ended.
        """
        if self.is_ended:
            raise self.ended_error()
        self.peers.setdefault(peer)
        return self.record.send(message_id, peer, tensors)

    def not_sent(self, message_id: int) -> None:
        """Take back a message that did not leave after all."""
        self.record.sends.pop(message_id, None)

    def received(self, peer: Peer, message_id: int, tensors: Iterable[Tensor]) -> None:
        """Record that a message came from `peer`, and put its tensors on the graph.

        Raises:
            ContextError: the context has ended.
        """
        if self.is_ended:
            raise self.ended_error()
        self.peers.setdefault(peer)
        self.record.receive(message_id, peer, tensors)

    def tell_committed(self, peer: Peer) -> int:
        """Return the last complete pass, which the message about to leave tells `peer`."""
        self._owing.discard(peer)
        return self.committed

    # --- passes ----------------------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise ContextError if no pass can run in it any more."""
        if self.is_ended:
            raise self.ended_error()
        if self._broken is not None:
            raise self._error(
                "an earlier pass failed without retain_graph=True, and part of the graph is gone: "
                f"{self._broken}"
            )

    async def run_pass(self, settings: Settings) -> None:
        """Run a pass when its turn has come, or have the context's owner run it.

        Raises:
            BaseException: the first cause, if it is aborted.
        """
        if self.parent is None:
            async with self._turn:
                self.check_usable()
                await self.start(settings).completion()
        else:
            await self._ask_owner(self.parent, settings)
        self.learn_committed(settings.pass_id)
        await self.until_committed()
        if self._gradients_broken is not None:
            raise self._gradients_broken
        if self.is_ended:
            raise self.ended_error()

    async def _ask_owner(self, parent: Peer, settings: Settings) -> None:
        request = BackwardRequest(
            self.context_id,
            settings.pass_id,
            settings.retain_graph,
            settings.inputs_only,
            settings.accumulate_grad,
        )
        try:
            await parent.request(request, timeout=None)
        except ZmqAutogradError:
            cause = self._causes.pop(settings.pass_id, None)
            if cause is None:
                raise
            raise cause from None  # as it was raised here, before it went round by the owner

    def start(self, settings: Settings, told_by: Told | None = None) -> Pass:
        """Take part in a pass from now on.

        Args:
            settings: of the pass.
            told_by: who told of it; None on the context's owner.
        """
        self.staged = None  # of an aborted pass, or it would have been told to be complete
        losses = self._requested.get(settings.pass_id, Losses())
        self.running = Pass(self, self._host, settings, losses, told_by)
        return self.running

    def is_over(self, pass_id: int) -> bool:
        """Whether this worker's part in the pass has ended."""
        return pass_id in self._over

    def never_start(self, pass_id: int) -> None:
        """Take in that a pass was aborted, whether or not it was ever heard of here."""
        self._over.add(pass_id)

    def propagated(self, request: PropagateGradientsRequest, peer: Peer) -> None:
        """Take in gradients; those of a pass that has ended are dropped.

        Raises:
            ContextError: there is no such pass.
            ProtocolError: they cannot be those of that message.
        """
        running = self.running
        if running is not None and running.pass_id == request.pass_id:
            try:
                running.propagated(peer, request.metadata.message_id, request.grads)
            except Exception as error:
                running.abort(error)
                raise
        elif not self.is_over(request.pass_id):
            raise self._error(f"no backward pass {request.pass_id} is under way")

    @property
    def queued(self) -> list[int]:
        """The passes asked for on this worker that have not started: others have their turn."""
        return [p for p in self._requested if not self.is_over(p) and self.find_pass(p) is None]

    def find_pass(self, pass_id: int) -> Pass | None:
        """Return the pass that runs here or waits to be complete elsewhere, if it is `pass_id`."""
        for found in (self.running, self.staged):
            if found is not None and found.pass_id == pass_id:
                return found
        return None

    def pass_completed(self, ended: Pass) -> None:
        """Take in that the part of this worker and of all behind it is complete."""
        self._over.add(ended.pass_id)
        self.running, self.staged = None, ended

    def pass_aborted(self, ended: Pass) -> None:
        """Take in that a pass is over without a result."""
        self._over.add(ended.pass_id)
        self.running = self.staged = None
        if ended.pass_id in self._requested and ended.cause is not None:
            self._causes[ended.pass_id] = ended.cause
        if not ended.settings.retain_graph:
            # Not the error itself: its traceback holds on to the graph.
            self._broken = str(ended.cause)

    def learn_committed(self, pass_id: int) -> None:
        """Take in that a pass is complete everywhere; `until_committed` waits for its gradients."""
        staged = self.staged
        if staged is not None and staged.pass_id == pass_id:
            self.staged = None
            self.committed = pass_id
            gradients = staged.take_gradients()
            into_grad = staged.settings.accumulate_grad
            self._committing = self._host.spawn(self._commit(gradients, into_grad=into_grad))

    async def until_committed(self) -> None:
        """Wait until the gradients of the last complete pass are the context's."""
        if self._committing is not None:
            await asyncio.shield(self._committing)

    async def _commit(self, gradients: dict[Tensor, Tensor], *, into_grad: bool) -> None:
        self.enter(self.committed)
        summed = partial(self.record.summed, gradients, into_grad=into_grad)
        try:
            self.record.gradients = (
                summed() if is_quick(gradients) else await self._host.compute(summed)
            )
        except Exception as error:  # noqa: BLE001  # a user's hook: it is told where it matters
            self._gradients_broken, self._broken = error, str(error)
        self._owing.update(peer for peer in self.peers if peer.is_connected)
        asyncio.get_running_loop().call_later(COMMIT_SECONDS, self._pay)

    def _pay(self) -> None:
        """Tell those of the last complete pass whom no other message has told."""
        owing, self._owing = self._owing, set()
        for peer in owing if not self.is_ended else ():
            if peer.is_connected:
                message = CommitPass(self.context_id, self.committed)
                self._host.spawn(peer.request(message, timeout=None))

    async def _expired(self, pass_id: int, timeout: float | None) -> DeadlineExceeded:
        """End a pass whose time ran out; return what to raise."""
        running = self.find_pass(pass_id)
        text = f"backward in context {self.context_id} did not end within {timeout:g} s"
        if running is None:
            text += ": it waited for its turn"
            return DeadlineExceeded(text, workers=(self._host.name,))
        awaited = await running.abort(DeadlineExceeded(text, workers=(self._host.name,)))
        workers, message_ids = sorted(awaited.workers), sorted(awaited.message_ids)
        return DeadlineExceeded(
            f"{text}: workers {', '.join(map(repr, workers))} and the gradients for "
            f"{len(message_ids)} messages were awaited",
            workers=workers,
            message_ids=message_ids,
        )

    # --- its end ---------------------------------------------------------------------------------

    def end(self) -> None:
        """Let go of everything; whatever uses it from now on raises ContextError."""
        if self.is_ended:
            return
        self.is_ended = True
        for ended in (self.running, self.staged):
            if ended is not None:
                ended.abort(self.ended_error())
        self.running = self.staged = self._gradients_broken = None
        self.record.clear()
        self._requested.clear()

    def peer_lost(self, peer: Peer) -> None:
        """Take in that nothing can be exchanged with `peer` any more."""
        self._owing.discard(peer)
        if self.running is not None:
            self.running.peer_lost(peer)

    def ended_error(self) -> ContextError:
        """Return what to raise for a use after its end."""
        return self._error("it has ended")

    def _error(self, problem: str) -> ContextError:
        return ContextError(
            f"context {self.context_id} on worker {self._host.name!r}: {problem}",
            context_id=self.context_id,
            worker=self._host.name,
        )


def _hear(task: asyncio.Future[None]) -> None:
    """Take the outcome of a task that nobody awaits any more."""
    if not task.cancelled():
        task.exception()
