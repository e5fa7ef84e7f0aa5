"""What `backward` is called with, checked: torch's own rules for roots and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from zmq_autograd.autograd.functions import edge_of, is_differentiable
from zmq_autograd.engine.distributed_pass import Losses
from zmq_autograd.errors import ConfigurationError
from zmq_autograd.wire.limits import short


def losses_of(
    roots: Tensor | Sequence[Tensor],
    grad_tensors: Tensor | Sequence[Tensor | None] | None,
    inputs: Tensor | Sequence[Tensor] | None,
    *,
    create_graph: bool,
) -> Losses:
    """Return what a pass starts from.

    Raises:
        ConfigurationError: it cannot start from that.
    """
    if create_graph:
        raise ConfigurationError(
            "create_graph=True: gradients of gradients are not supported across workers"
        )
    tensors = _tensors("roots", roots)
    given = _grads(grad_tensors, len(tensors))
    edges, grads = [], []
    for root, grad in zip(tensors, given, strict=True):
        edges.append(_edge("root", root))
        grads.append(_grad(root, grad))
    wanted = None if inputs is None else _tensors("inputs", inputs)
    for tensor in wanted or ():
        _edge("input", tensor)
    return Losses(edges, grads, wanted)


def _tensors(what: str, given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = [given] if isinstance(given, Tensor) else given
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise ConfigurationError(f"{what}: expected a tensor or several, got {short(given)}")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ConfigurationError(f"{what}: expected tensors, got {short(tensor)}")
    return list(tensors)


def _grads(given: Tensor | Sequence[Tensor | None] | None, roots: int) -> list[Tensor | None]:
    if given is None:
        return [None] * roots
    grads = [given] if isinstance(given, Tensor) else given
    if not isinstance(grads, (list, tuple)):
        raise ConfigurationError(
            f"grad_tensors: expected a tensor, several or None, got {short(given)}"
        )
    if len(grads) != roots:
        raise ConfigurationError(
            f"grad_tensors: expected {roots}, one for each root, got {len(grads)}"
        )
    return list(grads)


def _edge(what: str, tensor: Tensor) -> GradientEdge:
    if not is_differentiable(tensor):
        raise ConfigurationError(
            f"{what}: expected a tensor that requires grad, got one of shape "
            f"{list(tensor.shape)} and {tensor.dtype} that does not require grad and has no "
            "grad_fn: somewhere on its way, here or on another worker, it was computed under "
            "torch.no_grad() or inference_mode(), detached, made of whole numbers, or of Python's"
        )
    return edge_of(tensor)


def _grad(root: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        if root.numel() != 1:
            raise ConfigurationError(
                "grad can be implicitly created only for scalar outputs: a root of shape "
                f"{list(root.shape)} needs its gradient in grad_tensors"
            )
        if root.dtype.is_complex:
            raise ConfigurationError(
                "grad can be implicitly created only for real scalar outputs, got "
                f"{root.dtype}: give it in grad_tensors"
            )
        with torch.inference_mode(mode=False):  # the graph cannot take in what is made in it
            return torch.ones_like(root)
    if not isinstance(grad, Tensor):
        raise ConfigurationError(f"grad_tensors: expected tensors or None, got {short(grad)}")
    if grad.shape != root.shape or grad.dtype.is_complex != root.dtype.is_complex:
        raise ConfigurationError(
            f"grad_tensors: expected shape {list(root.shape)} and {root.dtype}, got "
            f"{list(grad.shape)} and {grad.dtype}"
        )
    return grad.detach().to(root.dtype)
