"""The custom Functions and hooks of random programs: they record what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tests.programs.record import Key, Record

HOOKS: Final[dict[str, Callable[[Tensor], Tensor | None]]] = {
    "look": lambda grad: None,
    "double": lambda grad: grad * 2,
    "clamp": lambda grad: grad.clamp(-0.5, 0.5),
    "square": lambda grad: grad * grad.abs().clamp(max=2),
}
"""What tensor hooks do; the last two give another sum if they are called with parts of it."""

NONLINEAR: Final = frozenset(("clamp", "square"))


def add_hook(tensor: Tensor, kind: str, record: Record, key: Key) -> None:
    """Register a tensor hook, which records what it is called with.

    Where a gradient is undefined torch calls hooks with None, and zmq_autograd does not run the
    node: what a hook does with None is not compared.
    """
    change = HOOKS[kind]

    def hook(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        record.see(key, grad)
        return change(grad)

    tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def count_accumulations(leaf: Tensor, record: Record, key: Key) -> None:
    """Register a post-accumulate hook, which records the gradient that it finds."""

    def accumulated(leaf: Tensor) -> None:
        if leaf.grad is not None:
            record.see(key, leaf.grad)

    leaf.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]


class _Recorded(torch.autograd.Function):
    """A Function that records its backward once per pass, unless nothing flows into it."""

    @classmethod
    def begin(cls, ctx: Any, record: Record, key: Key) -> None:
        ctx.set_materialize_grads(False)
        ctx.record, ctx.key, ctx.node = record, key, record.new_node()

    @classmethod
    def is_reached(cls, ctx: Any, *grads: Tensor | None) -> bool:
        defined = [grad for grad in grads if grad is not None]
        if defined:
            ctx.record.see(ctx.key, torch.cat(defined))
        return bool(defined)


class Gate(_Recorded):
    """``a * tanh(b)``."""

    @staticmethod
    def forward(ctx: Any, record: Record, key: Key, a: Tensor, b: Tensor) -> Tensor:
        Gate.begin(ctx, record, key)
        ctx.save_for_backward(a, b)
        return a * b.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if not Gate.is_reached(ctx, grad) or grad is None:
            return None, None, None, None
        a, b = ctx.saved_tensors
        return None, None, grad * b.tanh(), grad * a * (1 - b.tanh() ** 2)


class Pair(_Recorded):
    """``sin(a)`` and ``a + 0.5 * b``: two outputs, of which one may be unused."""

    @staticmethod
    def forward(ctx: Any, record: Record, key: Key, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        Pair.begin(ctx, record, key)
        ctx.save_for_backward(a)
        return a.sin(), a + 0.5 * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first, second = grads
        Pair.is_reached(ctx, first, second)
        (a,) = ctx.saved_tensors
        grad_a = None if first is None else first * a.cos()
        if second is None:
            return None, None, grad_a, None
        return None, None, second if grad_a is None else grad_a + second, second * 0.5


class Block(_Recorded):
    """``a + b``, whose gradients are undefined, as is only known when it runs."""

    @staticmethod
    def forward(ctx: Any, record: Record, key: Key, a: Tensor, b: Tensor) -> Tensor:
        Block.begin(ctx, record, key)
        return a + b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        Block.is_reached(ctx, *grads)
        return None, None, None, None


def apply(kind: str, record: Record, key: Key, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Apply the custom Function of that kind."""
    function = {"gate": Gate, "pair": Pair, "block": Block}[kind]
    outputs = function.apply(record, key, a, b)  # type: ignore[no-untyped-call]
    return outputs if isinstance(outputs, tuple) else (outputs,)
