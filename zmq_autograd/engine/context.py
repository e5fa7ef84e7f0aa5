"""A distributed autograd context as its user holds it; start reading the engine here.

What the engine has of it on this worker is a `LocalContext`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol, Self, runtime_checkable

from torch import Tensor

from zmq_autograd import ids
from zmq_autograd.autograd.anomaly import check_nan
from zmq_autograd.engine.distributed_pass import Settings
from zmq_autograd.engine.graph import collect, to_dot
from zmq_autograd.engine.local_context import LocalContext, current_scope
from zmq_autograd.engine.losses import losses_of
from zmq_autograd.errors import ConfigurationError, ContextError
from zmq_autograd.session import checked_timeout

BACKWARD_TIMEOUT: Final = 60.0
"""Seconds that a backward pass may take unless told otherwise."""


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


class Context:
    """One distributed autograd context, as one worker sees it.

    ``async with worker.context() as ctx`` opens one and, on leaving, drops it everywhere; handlers
    of calls made in it get their own worker's view of it from `za.current_context`.
    """

    def __init__(self, local: LocalContext) -> None:
        """Hold what this worker has of a context; `Worker.context` does."""
        self._local = local

    @property
    def context_id(self) -> int:
        """The same on every worker, an unsigned 64-bit number."""
        return self._local.context_id

    def __repr__(self) -> str:
        return repr(self._local)

    async def __aenter__(self) -> Self:
        if current_scope.get() is not None:
            raise ContextError("a context is open here already: contexts do not nest")
        self._local.check_not_ended()
        self._local.table.add(self._local)
        self._local.enter()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        current_scope.set(None)
        await self._local.table.clean_up(self._local)

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
            ContextError: the context is not open, belongs to a pass that failed without
                `retain_graph`, or does not reach back to what a root was computed from.
            RemoteError: a hook or a function raised on another worker.
            WorkerLost: a gradient would have to go to a worker that is lost.
            DeadlineExceeded: time ran out; names the messages and workers that were awaited.
            Exception: what a hook, a function or torch raised on this worker.

        Cancelling it aborts the pass everywhere, unless it is complete already.
        """
        scope = current_scope.get()
        if scope is not None and scope.is_pass:
            raise self._local.error("a hook cannot call backward: passes run one after another")
        self._local.check_open()
        self._local.passes.check_usable()
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
        await self._local.passes.backward(losses, settings, timeout)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of this worker's leaves, summed over the context's passes.

        Raises:
            ContextError: the context is not open, or a hook failed to take a pass's gradients over.
        """
        self._local.check_open()
        return self._local.gradients()

    async def graph(self) -> str:
        """Return the autograd graph of the context, over all its workers, as Graphviz text (DOT).

        Each worker is a cluster of its send and receive functions.  Edges lead where gradients
        flow: within a worker from a send function to the receive functions that it was computed
        from, between workers from a message's receive function to its send function.  What a pass
        has freed is dashed, without edges.  A worker that is lost, or does not answer within five
        seconds, is left out with all behind it, and the title says so.

        Raises:
            ContextError: the context is not open.
        """
        self._local.check_open()
        return to_dot(self.context_id, await collect(self._local, self._local.table.host))


def local_context(context: Context) -> LocalContext:
    """Return what the engine has of a context, which a user gave.

    Raises:
        ConfigurationError: it is something else.
    """
    if not isinstance(context, Context):
        raise ConfigurationError(
            f"expected a context, which `worker.context()` makes, got a {type(context).__name__}"
        )
    return context._local
