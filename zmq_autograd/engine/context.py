"""A distributed autograd context on one worker: what its user holds, and what its messages meet.

Owns which workers it has reached, and its way to its owner.  Its passes are `passes`'; which
contexts a worker has, `contexts`'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self, runtime_checkable

from torch import Tensor

from zmq_autograd import ids
from zmq_autograd.autograd.anomaly import check_nan
from zmq_autograd.autograd.record import Record
from zmq_autograd.engine.distributed_pass import Settings
from zmq_autograd.engine.graph import collect, to_dot
from zmq_autograd.engine.host import Host, Peer
from zmq_autograd.engine.losses import losses_of
from zmq_autograd.engine.passes import Passes
from zmq_autograd.engine.places import Place
from zmq_autograd.errors import ConfigurationError, ContextError, WorkerLost
from zmq_autograd.session import checked_timeout

if TYPE_CHECKING:
    from zmq_autograd.engine.contexts import Contexts

BACKWARD_TIMEOUT: Final = 60.0
"""Seconds that a backward pass may take unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What running code is in: a context, and the place where it makes its messages.

    Attributes:
        context: the context.
        place: the place.
        is_pass: it runs for a backward pass: a hook, say.
    """

    context: Context
    place: Place
    is_pass: bool = False


@runtime_checkable
class RemoteRoot(Protocol):
    """Something on another worker that a pass can be run from: an RRef."""

    async def run_backward(
        self,
        context: Context,
        *,
        retain_graph: bool,
        accumulate_grad: bool,
        timeout: float | None,
    ) -> None:
        """Run a pass of `context` from it."""


current_scope: Final[ContextVar[Scope | None]] = ContextVar("zmq_autograd_scope", default=None)


def reading() -> AbstractAsyncContextManager[None]:
    """Return what is entered around what may read parameters: see `gate.Gate.call`."""
    scope = current_scope.get()
    return nullcontext() if scope is None else scope.context.table.gate.call(scope.context)


def keeps(results: Iterable[Tensor]) -> None:
    """Take in that what was computed here is kept for a later pass: see `gate.Gate`."""
    scope = current_scope.get()
    if scope is not None:
        scope.context.record.keep(results)


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
        # The worker that opened it, where a call has come from that one.
        self.owner: Peer | None = None
        # A dict for its order: everybody that a call was exchanged with.
        self.peers: dict[Peer, None] = {} if parent is None else {parent: None}
        self.is_ended = False
        self._lost = ""
        self.table = table
        self._host = host
        self.passes = Passes(self, host)
        # Where this worker's own code, and the last pass, make messages.  There is one object of
        # each: a second one would give the same ids once more.
        self._own_place = Place(context_id) if parent is None else self._named_place("own")
        self._pass_place = 0, self._own_place

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
            served: the message that it serves, 0 for the program that opened the context.
        """
        place = Place(self.context_id, served) if served else self._own_place
        current_scope.set(Scope(self, place))
        return place

    def enter_pass(self, pass_id: int) -> None:
        """Have what runs in this task from now on run for a pass of this context."""
        if self._pass_place[0] != pass_id:
            self._pass_place = pass_id, self._named_place(f"pass {pass_id}")
        current_scope.set(Scope(self, self._pass_place[1], is_pass=True))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have what this task runs in a block be in this context, whichever it is in outside."""
        scope = current_scope.get()
        is_in = scope is not None and scope.context is self
        token = current_scope.set(scope if is_in else Scope(self, self._own_place))
        try:
            yield
        finally:
            current_scope.reset(token)

    def _named_place(self, name: str) -> Place:
        """Return a place that is none of a served call's, and no other worker's."""
        digest = blake2b(f"{self._host.name} {name}".encode(), digest_size=8).digest()
        # Mixed with the context's id, as those of messages are.
        return Place(self.context_id, int.from_bytes(digest, "little") ^ self.context_id)

    async def backward(
        self,
        roots: Tensor | Sequence[Tensor] | RemoteRoot,
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
            roots: a tensor or several, of this worker, that require grad; or an RRef to a tensor,
                which its owner runs the pass from, with no other arguments than `retain_graph`,
                `accumulate_grad` and `timeout`.
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

        Cancelling it aborts the pass everywhere, unless it is complete already.
        """
        scope = current_scope.get()
        if scope is not None and scope.is_pass:
            raise self.error("a hook cannot call backward: passes run one after another")
        self.passes.check_usable()
        timeout = checked_timeout(timeout)
        if isinstance(roots, RemoteRoot):
            if grad_tensors is not None or inputs is not None or create_graph:
                raise ConfigurationError(
                    "backward from an RRef: expected no grad_tensors, inputs or create_graph: what "
                    "they would refer to lives elsewhere"
                )
            await roots.run_backward(
                self, retain_graph=retain_graph, accumulate_grad=accumulate_grad, timeout=timeout
            )
            return
        losses = losses_of(roots, grad_tensors, inputs, create_graph=create_graph)
        settings = Settings(
            ids.random_id(),
            retain_graph,
            inputs is not None,
            accumulate_grad,
            check_nan=check_nan(),
        )
        await self.passes.backward(losses, settings, timeout)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of this worker's leaves, summed over the context's passes.

        Raises:
            ContextError: the context has ended, or a hook failed to take a pass's gradients over.
        """
        if self.is_ended:
            raise self.ended_error()
        self.passes.check_gradients()
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

    # --- its end ---------------------------------------------------------------------------------

    def end(self, lost: str = "") -> None:
        """Let go of everything; whatever uses it from now on raises.

        Args:
            lost: the worker whose loss is why, if that is why.
        """
        if self.is_ended:
            return
        self.is_ended = True
        self._lost = lost
        self.passes.end(self.ended_error())
        self.record.clear()

    def peer_lost(self, peer: Peer) -> None:
        """Take in that nothing can be exchanged with `peer` any more."""
        if self.parent is peer and self.owner is not None and self.owner.is_connected:
            self.parent = self.owner
        self.passes.peer_lost(peer)

    def check_open(self) -> None:
        """Raise what is wrong with using it now.

        Raises:
            ContextError: it has not been entered, or has ended.
            WorkerLost: it has ended since a worker was lost.
        """
        if self.is_ended:
            raise self.ended_error()
        if self not in self.table:
            raise self.error("it has not been entered: use it inside `async with`")

    def ended_error(self) -> ContextError | WorkerLost:
        """Return what to raise for a use after its end."""
        if self._lost:
            reason = f"context {self.context_id} on worker {self._host.name!r} ended with it"
            return WorkerLost(self._lost, reason=reason)
        return self.error("it has ended")

    def error(self, problem: str) -> ContextError:
        return ContextError(
            f"context {self.context_id} on worker {self._host.name!r}: {problem}",
            context_id=self.context_id,
            worker=self._host.name,
        )
