"""The names of `torch.distributed.autograd`, on `zmq_autograd`'s contexts.

::

    with autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", torch.add, args=(t1, t2)).sum()
        autograd.backward(context_id, [loss])
        autograd.get_gradients(context_id)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Final

from torch import Tensor
from torch.autograd.profiler import record_function

from zmq_autograd.compat import inspect_graph
from zmq_autograd.compat.rpc import state
from zmq_autograd.engine import LocalContext, current_scope, current_span
from zmq_autograd.errors import ContextError, RemoteError, ZmqAutogradError
from zmq_autograd.node.torch_profiles import recorder_here

__all__ = ["DistAutogradContext", "backward", "context", "get_gradients", "is_available"]

_BACKWARD_NAME: Final = "torch::distributed::autograd::backward"
_COUNTER_BITS: Final = 48
_MAX_WORKER_ID: Final = 2**16 - 1

_worker_id = 0
# Never the same again, whichever group this process takes part in; 0 is no context's id.
_numbers: Final = itertools.count(1)


def is_available() -> bool:
    """Say whether this works here: it does."""
    return True


class DistAutogradContext:
    """What a program may look at of a context on this worker."""

    def __init__(self, context: LocalContext) -> None:
        """Show `context`."""
        self._context = context

    def _context_id(self) -> int:
        return self._context.context_id

    def _send_functions(self) -> dict[int, Any]:
        return inspect_graph.shown_sends(self._context.record.sends)

    def _recv_functions(self) -> dict[int, Any]:
        return inspect_graph.shown_receives(self._context.record.receives)

    def _known_worker_ids(self) -> set[int]:
        agent = state.agent()
        return {agent.get_worker_info(peer.name).id for peer in self._context.peers}


class context:
    """A context: ``with context() as context_id``.

    Calls made in the block, in this thread, and what they call in their turn, are recorded;
    leaving it forgets them on every worker.

    Raises:
        RuntimeError: the thread is in a context already, or `init_rpc` has not been called.
    """

    def __enter__(self) -> int:
        self.autograd_context = _new_context()
        return self.autograd_context._context_id()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _release_context(self.autograd_context._context_id())


def backward(context_id: int, roots: Sequence[Tensor], retain_graph: bool = False) -> None:
    """Compute the gradients of `roots` on every worker that the context has reached.

    Args:
        context_id: the context, which has reached this worker.
        roots: tensors of one element that require grad and are no leaves.
        retain_graph: keep the graph for another pass.

    Raises:
        TypeError: an argument is of another type.
        RuntimeError: there is no such context, a root cannot be one, a worker is lost, or a
            function or hook raised on this worker or another; no gradient has been added then.
    """
    if isinstance(context_id, bool) or not isinstance(context_id, int):
        raise TypeError(f"backward(): incompatible function arguments: context_id={context_id!r}")
    if not isinstance(roots, (list, tuple)) or not all(isinstance(r, Tensor) for r in roots):
        raise TypeError(f"backward(): incompatible function arguments: roots={roots!r}")
    found = _find(context_id)
    _check_roots(roots)
    agent = state.agent()
    recorder = recorder_here()
    token = current_span.set(nullcontext if recorder is None else recorder.span)
    try:
        with record_function(_BACKWARD_NAME):
            agent.portal.run(
                found.user.backward, list(roots), retain_graph=retain_graph, timeout=None
            )
    except ContextError as error:
        raise RuntimeError(_not_found(context_id) if found.is_ended else str(error)) from error
    except RemoteError as error:
        where = agent.get_worker_info(error.worker).id
        raise RuntimeError(f"Error on Node {where}: {error.message}\n{error}") from error
    except ZmqAutogradError as error:
        raise RuntimeError(str(error)) from error
    except Exception as error:
        raise RuntimeError(f"Error on Node {agent.me.id}: {error}") from error
    finally:
        current_span.reset(token)


def _check_roots(roots: Sequence[Tensor]) -> None:
    if not roots:
        raise RuntimeError("No tensors provided for gradient computation.")
    for root in roots:
        if not root.requires_grad:
            raise RuntimeError("requires_grad not set on root")
        if root.numel() != 1:
            raise RuntimeError(
                f"a root of shape {list(root.shape)} is not a scalar, all roots need to be scalar"
            )
        if root.grad_fn is None:
            raise RuntimeError("a root does not have a valid gradient function: it is a leaf")


def get_gradients(context_id: int) -> dict[Tensor, Tensor]:
    """Return the gradients of this worker's leaves, summed over the context's passes.

    Raises:
        RuntimeError: there is no such context.
    """
    found = _find(context_id)
    try:
        return state.agent().portal.call(found.gradients)
    except ZmqAutogradError as error:
        raise RuntimeError(str(error)) from error


# --- looking inside ------------------------------------------------------------------------------


def _init(worker_id: int) -> None:
    """Give contexts of this worker ids that begin with its own."""
    global _worker_id
    if not 0 <= worker_id <= _MAX_WORKER_ID:
        raise RuntimeError(f"worker id: expected 0 to {_MAX_WORKER_ID}, got {worker_id}")
    _worker_id = worker_id


def _new_context() -> DistAutogradContext:
    """Open a context in this thread."""
    agent = state.agent()
    if current_scope.get() is not None:
        raise RuntimeError("Already have an autograd context id for this thread")
    opened = agent.contexts.new((_worker_id << _COUNTER_BITS) + next(_numbers))
    agent.portal.run(opened.user.__aenter__)
    return DistAutogradContext(opened)


def _release_context(context_id: int) -> None:
    """Forget a context on every worker; a thread that is in it leaves it if it is this one."""
    found = _find(context_id)
    state.agent().portal.run(found.table.clean_up, found)
    scope = current_scope.get()
    if scope is not None and scope.context is found:
        current_scope.set(None)


def _retrieve_context(context_id: int) -> DistAutogradContext:
    return DistAutogradContext(_find(context_id))


def _current_context() -> DistAutogradContext:
    scope = current_scope.get()
    if scope is None:
        raise RuntimeError(
            "Current thread doesn't have a valid autograd context. Please wrap your code using: "
            "`with zmq_autograd.compat.autograd.context() as context_id` to generate a valid "
            "context"
        )
    return DistAutogradContext(scope.context)


def _is_valid_context(context_id: int) -> None:
    _find(context_id)


def _get_max_id() -> int:
    return (_worker_id << _COUNTER_BITS) + (1 << _COUNTER_BITS) - 1


def _get_debug_info() -> dict[str, str]:
    agent = state.agent()
    contexts = agent.portal.call(lambda: list(agent.contexts))
    running = sum(found.passes.running is not None for found in contexts)
    return {
        "num_current_backward_passes": str(running),
        "num_autograd_contexts": str(len(contexts)),
    }


def _find(context_id: int) -> LocalContext:
    agent = state.agent()
    try:
        return agent.portal.call(agent.contexts.get, context_id)
    except ZmqAutogradError as error:
        raise RuntimeError(_not_found(context_id)) from error


def _not_found(context_id: int) -> str:
    return f"Could not find autograd context with id: {context_id}"
