"""The same program in one process and across two workers, to compare what each finds.

A program gets `call`, which runs a function of `FUNCTIONS` here or on the other worker, and a leaf;
it returns its loss.  All numbers are small whole ones, so that the order of sums changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import Pair

Call = Callable[..., Awaitable[Any]]
Program = Callable[[Call, Tensor], Awaitable[Any]]


@dataclass(frozen=True)
class Found:
    """The gradients of the program's leaf, and of the one that the functions share."""

    near: Tensor | None
    far: Tensor | None

    def check(self, expected: Found) -> None:
        """Raise AssertionError unless these are the gradients that are expected."""
        for grad, right in ((self.near, expected.near), (self.far, expected.far)):
            assert (grad is None) == (right is None), f"expected {expected}, found {self}"
            if grad is not None and right is not None:
                torch.testing.assert_close(grad, right, rtol=0, atol=0)


def near_leaf(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a new leaf for the program."""
    return torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype).requires_grad_()


def far_leaf(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a new leaf for the functions."""
    return torch.nn.Parameter(torch.tensor([2, 1, 3], dtype=dtype))


def scale(w: Tensor, x: Tensor, times: int = 1) -> Tensor:
    return x * w * times


def scale_in_place(w: Tensor, x: Tensor) -> Tensor:
    return x.mul_(w).add_(1)


def product(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return x * y * w


def is_same(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Add one to `x` and return the sum of both, which is another one if they are the same."""
    x = x.add_(1)
    return (x + y) * w


def in_containers(w: Tensor, tree: dict[str, Any], *, more: list[Any]) -> dict[str, Any]:
    first, (second,) = tree["a"]
    total = first * w + second * tree["b"]["c"] + more[0] * more[1]
    return {"out": [total, (total * w, "text", None)], "twice": {"again": total}}


def several(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what requires grad and what does not, the argument itself and the shared leaf."""
    return x * w, x.detach() * 2, x, w


def shared(w: Tensor) -> Tensor:
    return w


def argmax(w: Tensor, x: Tensor) -> Tensor:
    return (x * w).argmax()


def add_all(w: Tensor, xs: list[Tensor]) -> Tensor:
    return torch.stack([x.sum() for x in xs]).sum() * w.sum()


def enabling(w: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return x * w


def matrix_product(w: Tensor, x: Tensor) -> Tensor:
    return x @ torch.stack([w, 2 * w, w - 1])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        scale,
        scale_in_place,
        product,
        is_same,
        in_containers,
        several,
        shared,
        argmax,
        add_all,
        enabling,
        matrix_product,
    )
}


async def in_one_process(program: Program, x: Tensor, w: Tensor) -> Found:
    """Run `program` with functions called here, and torch's own backward."""

    async def call(function: str, *args: Any, **kwargs: Any) -> Any:
        return FUNCTIONS[function](w, *args, **kwargs)

    loss = await program(call, x)
    loss.sum().backward()
    return Found(x.grad, w.grad)


def offer(worker: za.Worker, w: Tensor) -> None:
    """Offer the functions on `worker`, with `w` for the leaf that they share."""
    for name, function in FUNCTIONS.items():
        worker.register(partial(function, w), name)
    worker.register(partial(gradient_of, w), "gradient")


def gradient_of(leaf: Tensor) -> Tensor | None:
    """Return the gradient of `leaf` in the current context."""
    context = za.current_context()
    assert context is not None
    return context.gradients().get(leaf)


async def across(pair: Pair, program: Program, x: Tensor, w: Tensor) -> Found:
    """Run `program` with functions called on bob, and our backward."""
    offer(pair.bob, w)
    async with pair.alice.context() as ctx:
        loss = await program(pair.remote_bob.call, x)
        await ctx.backward(loss.sum())
        found = Found(ctx.gradients().get(x), await pair.remote_bob.call("gradient"))
        assert set(ctx.gradients()) <= {x}
    assert x.grad is None
    assert w.grad is None
    assert not pair.alice.status()["contexts"]
    assert not pair.bob.status()["contexts"]
    return found


def on_gradient(tensor: Any, hook: Callable[[Tensor], Tensor | None]) -> None:
    """Run `hook` on the gradient of `tensor`: it is typed here, but not in torch."""
    tensor.register_hook(hook)


def on_accumulation(leaf: Any, hook: Callable[[Tensor], None]) -> None:
    """Run `hook` on `leaf` once its gradient is accumulated."""
    leaf.register_post_accumulate_grad_hook(hook)


def some(grad: Tensor | None) -> Tensor:
    """Return `grad`, which is there."""
    assert grad is not None
    return grad
