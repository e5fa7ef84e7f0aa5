"""Two ways to run torch's engine on part of a graph: one call for many nodes, and one step.

Traps of torch's engine that this goes around, all seen on torch 2.13: with ``inputs=`` at an inner
node it runs that node's tensor hooks on what is there so far, and runs past the node if another
input lies behind; calling a node as a function skips hooks and fails on custom Functions.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward

from zmq_autograd.autograd.functions import FREED_TEXT

_FREED: Final = "zmq_autograd.freed"

_any_freed = False
"""Whether any node was ever marked: to ask a node costs more than to walk to it."""


class _Stop(Exception):  # no error: it ends a step
    """Raised behind a node that was stepped, so that nothing behind it runs."""


def call(
    outputs: Sequence[GradientEdge],
    grads: Sequence[Tensor],
    inputs: Sequence[GradientEdge],
    *,
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """Run all nodes between `outputs` and `inputs`, and return the gradients of the inputs.

    Raises:
        Exception: whatever a hook, a Function or torch raises.
    """
    if not outputs or not inputs:
        return (None,) * len(inputs)
    with torch.inference_mode(mode=False):
        return _run_engine(outputs, grads, inputs, retain_graph=retain_graph)


def step(
    node: Node, grads: dict[int, Tensor], nexts: Sequence[GradientEdge]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Run `node` alone; return the gradients that it passes on, and those that it was given.

    The first are one for each of its ``next_functions``, the second one for each of its inputs,
    after the tensor hooks there.  What it saved is kept.

    Args:
        node: not a sink.
        grads: by input of the node.
        nexts: all edges that lead from it.  Torch's engine looks no further than those, and a node
            computes nothing for others.

    Raises:
        Exception: whatever a hook, the node or torch raises.
    """
    check_not_freed((node,))
    taken: list[tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]] = []
    thread = threading.get_ident()

    def take(passed_on: Any, given: Any) -> None:
        if threading.get_ident() == thread and not taken:
            taken.append((tuple(passed_on), tuple(given)))
            raise _Stop

    hook = node.register_hook(take)
    try:
        with torch.inference_mode(mode=False):
            outputs = [GradientEdge(node, index) for index in grads]
            _run_engine(outputs, list(grads.values()), nexts, retain_graph=True)
    except _Stop:
        pass
    finally:
        hook.remove()
    if not taken:
        raise RuntimeError(f"torch's engine did not run {node.name()} in the thread that asked")
    return taken[0]


def _run_engine(
    outputs: Sequence[GradientEdge],
    grads: Sequence[Tensor],
    inputs: Sequence[GradientEdge],
    *,
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    # Not `torch.autograd.grad`: where gradients are given, that imports sympy, which takes half a
    # second of a process's first pass.
    return _engine_run_backward(
        tuple(outputs),
        tuple(grads),
        retain_graph,
        False,  # create_graph
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def saves_tensors(node: Node) -> bool:
    """Tell whether `node` saves tensors, so that it runs only once unless its graph is retained."""
    if issubclass(type(node), BackwardCFunction):
        try:
            return bool(cast(Any, node)._raw_saved_tensors)
        except RuntimeError:  # they have been freed
            return True
    return _has_saved_fields(type(node))


@functools.cache
def _has_saved_fields(kind: type[Node]) -> bool:
    return any(name.startswith("_raw_saved") for name in dir(kind))


def mark_freed(node: Node) -> None:
    """Remember that a pass without ``retain_graph`` stepped `node`."""
    global _any_freed
    _any_freed = True
    _metadata(node)[_FREED] = True


def check_not_freed(nodes: Iterable[Node]) -> None:
    """Raise RuntimeError, as torch does, if one of `nodes` was marked, in whatever context."""
    if _any_freed and any(_FREED in _metadata(node) for node in nodes):
        raise RuntimeError(FREED_TEXT)


def _metadata(node: Node) -> dict[str, Any]:
    # It lives with the node itself, not with what Python holds of it.  Torch's stubs have a method.
    return cast("dict[str, Any]", node.metadata)


def set_order(nodes: Sequence[Node]) -> None:
    """Have torch's engine run `nodes` in this order, where it is free to choose.

    Its own order goes by numbers that count per thread, so it changes from run to run where parts
    of a graph were made in different threads.  Older versions of torch cannot be told.
    """
    for number, node in enumerate(reversed(nodes)):
        if hasattr(node, "_set_sequence_nr"):
            node._set_sequence_nr(number)
