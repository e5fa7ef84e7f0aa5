"""Leaf accumulators: what torch runs where a gradient reaches a leaf.

Gradients of a pass are found without them, so that nothing of it is visible before it is complete.
Then each leaf's accumulator runs once, on the pass's gradient: accumulate and post-accumulate hooks
see in ``.grad`` what they would in one process, and may change it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, distributed
from torch.autograd import Function

from zmq_autograd.autograd.stages import has_tensor_hooks

_GRADS_SWAPPED: Final = threading.Lock()
"""Held while ``.grad`` of leaves is not what their users put there: contexts share leaves."""

QUICK_TENSORS: Final = 32
"""Leaves whose accumulators run in about the time that it takes to hand them to a thread."""

QUICK_ELEMENTS: Final = 64 * 1024
"""Elements of their gradients, likewise."""


class _Deliver(Function):
    """Gives its inputs gradients that nobody else holds, so that torch need not copy them."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.grads = grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        grads = tuple(ctx.grads)
        ctx.grads.clear()
        return (None, *grads)


def added(total: Tensor, grad: Tensor) -> Tensor:
    """Return a sum of which either may be sparse: torch adds a sparse one to a dense one only."""
    is_reversed = total.layout is not torch.strided and grad.layout is torch.strided
    return grad + total if is_reversed else total + grad


def is_quick(grads: dict[Tensor, Tensor]) -> bool:
    """Tell whether `accumulated` takes less than to hand it to a thread, as far as can be seen."""
    # Torch does not show the hooks of DistributedDataParallel, which wait for other processes.
    return (
        not (distributed.is_available() and distributed.is_initialized())
        and not _GRADS_SWAPPED.locked()
        and len(grads) <= QUICK_TENSORS
        and sum(grad.numel() for grad in grads.values()) <= QUICK_ELEMENTS
        and not any(leaf._post_accumulate_grad_hooks or has_tensor_hooks(leaf) for leaf in grads)
    )


def accumulated(grads: dict[Tensor, Tensor], *, into_grad: bool) -> dict[Tensor, Tensor]:
    """Run the accumulators of leaves on `grads`, which is used up; return what they make of it.

    Args:
        grads: by leaf, and by other tensors, which have no accumulator.
        into_grad: add those of leaves to their ``.grad`` too.

    Raises:
        BaseException: whatever a hook raises; every ``.grad`` is as it was.
    """
    # A leaf that was frozen meanwhile has no accumulator: torch passes it over.
    for frozen in [tensor for tensor in grads if not tensor.requires_grad]:
        del grads[frozen]
    leaves = [tensor for tensor in grads if tensor.is_leaf]
    with _GRADS_SWAPPED, torch.inference_mode(mode=False), torch.autocast("cpu", enabled=False):
        before = [(leaf, leaf.grad) for leaf in leaves]
        try:
            _run_accumulators(leaves, grads)
            found = {leaf: leaf.grad for leaf in leaves if leaf.grad is not None}
            # What is no leaf's may be the memory of another gradient, or of the caller's.
            found |= {tensor: grad.clone() for tensor, grad in grads.items()}
        finally:
            for leaf, grad in before:
                _set_grad(leaf, grad)
        if into_grad:
            for leaf in leaves:
                if (grad := found.get(leaf)) is not None:
                    _set_grad(leaf, grad.clone() if leaf.grad is None else added(leaf.grad, grad))
    return found


@contextmanager
def grads_swapped(grads: Mapping[Tensor, Tensor | None]) -> Iterator[None]:
    """Have `grads` in ``.grad`` of their leaves while a block runs; then each is as it was."""
    with _GRADS_SWAPPED:
        before = [(leaf, leaf.grad) for leaf in grads]
        try:
            for leaf, grad in grads.items():
                _set_grad(leaf, grad)
            yield
        finally:
            for leaf, grad in before:
                _set_grad(leaf, grad)


def _set_grad(leaf: Tensor, grad: Tensor | None) -> None:
    # Torch's accumulators put a dense gradient into a sparse leaf; from elsewhere it refuses one.
    if grad is not None and leaf.is_sparse and not grad.is_sparse:
        grad = grad.to_sparse()
    leaf.grad = grad


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements of a strided tensor fill its memory, in whatever order."""
    return steps_of(torch.empty_like(tensor, device="meta")) == steps_of(tensor)


def steps_of(tensor: Tensor) -> list[int]:
    """Return the strides that tell where an element is: those of single elements do not."""
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _laid_out(grad: Tensor, leaf: Tensor) -> Tensor:
    """Return a copy of a gradient with the strides that torch gives it.

    By its "gradient layout contract" these are the leaf's, if its elements fill its memory without
    gaps; else it is contiguous.
    """
    if grad.layout is not torch.strided or leaf.layout is not torch.strided:
        return grad.clone()
    if not is_dense(leaf):
        return grad.clone(memory_format=torch.contiguous_format)
    return grad.new_empty_strided(leaf.shape, leaf.stride()).copy_(grad)


def _run_accumulators(leaves: list[Tensor], grads: dict[Tensor, Tensor]) -> None:
    """Leave in ``.grad`` of `leaves` their gradients out of `grads`."""
    for leaf in leaves:
        leaf.grad = None
    # A leaf's tensor hooks ran when its gradient was found.  Its accumulator would run them again,
    # so here is done what that does besides.
    for leaf in filter(has_tensor_hooks, leaves):
        _set_grad(leaf, _laid_out(grads.pop(leaf), leaf))
        with torch.no_grad():
            for hook in list((leaf._post_accumulate_grad_hooks or {}).values()):
                hook(leaf)
    plain = [leaf for leaf in leaves if leaf in grads]
    if plain:
        given = [grads.pop(leaf) for leaf in plain]
        times = Counter(map(id, given))
        # Held meanwhile, a gradient of several leaves is copied for each of them, as in torch.
        held = [grad for grad in given if times[id(grad)] > 1]
        with torch.enable_grad():
            delivery = _Deliver.apply(given, *plain)  # type: ignore[no-untyped-call]
        torch.autograd.backward(delivery)
        held.clear()
