"""Hooks of every kind run in a pass across workers as in one process: as often, on the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from tests.integration.twins import Call, far_leaf, near_leaf, on_accumulation, on_gradient, some
from zmq_autograd import blocking

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory: what travels is the same over the other transports."""
    async with connected() as pair:
        yield pair


class Log:
    """What hooks saw."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def tensor(self, name: str, change: Callable[[Tensor], Tensor] | None = None) -> Any:
        """Return a tensor hook, which may change the gradient."""

        def hook(grad: Tensor) -> Tensor | None:
            self.seen.append((name, grad.tolist()))
            return None if change is None else change(grad)

        return hook

    def node(self, name: str) -> Any:
        """Return a hook of a node, to run before it or after."""

        def hook(*grads: tuple[Tensor | None, ...]) -> None:
            listed = [[None if grad is None else grad.tolist() for grad in g] for g in grads]
            self.seen.append((name, listed))

        return hook

    def leaf(self, name: str) -> Any:
        """Return a post-accumulate hook."""

        def hook(leaf: Tensor) -> None:
            self.seen.append((name, None if leaf.grad is None else leaf.grad.tolist()))

        return hook

    def sorted(self) -> list[tuple[str, Any]]:
        """Return all of it in an order that does not tell which worker was faster."""
        return sorted(self.seen, key=repr)


class Model:
    """Functions that share a leaf with hooks, on results with hooks."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.w = far_leaf()
        on_gradient(self.w, log.tensor("w", clipped))
        on_accumulation(self.w, log.leaf("w accumulated"))
        # Hooks on the accumulator's node run for a leaf without tensor hooks only.
        self.v = far_leaf()
        on_accumulation(self.v, log.leaf("v accumulated"))
        self._accumulator = accumulator_of(self.v)
        self._accumulator.register_prehook(log.node("before v"))
        self._accumulator.register_hook(log.node("after v"))

    def scale(self, x: Tensor) -> Tensor:
        on_gradient(x, self.log.tensor("argument", clipped))
        y = x * self.w
        on_gradient(y, self.log.tensor("inside", clipped))
        grad_fn = y.grad_fn
        assert grad_fn is not None
        grad_fn.register_prehook(self.log.node("before product"))
        grad_fn.register_hook(self.log.node("after product"))
        return y + self.v


def clipped(grad: Tensor) -> Tensor:
    """Not linear: of parts of a sum it gives another result than of the sum."""
    return grad.clamp(-20, 20)


def accumulator_of(leaf: Tensor) -> Any:
    return get_gradient_edge(leaf).node


async def train(call: Call, log: Log, x: Tensor) -> Any:
    """Use the function three times, once on its own result, and all results."""
    on_gradient(x, log.tensor("x", clipped))
    on_accumulation(x, log.leaf("x accumulated"))
    inner = 2 * x
    on_gradient(inner, log.tensor("inner", clipped))
    first = await call("scale", inner)
    on_gradient(first, log.tensor("first result", clipped))
    second = await call("scale", first + x)
    third = await call("scale", inner)
    on_gradient(third, log.tensor("third result"))
    return (first * second + third).sum()


async def test_hooks_of_every_kind_run_as_in_one_process(two: Pair) -> None:
    here, local, x = Log(), near_leaf(), near_leaf()
    model = Model(here)

    async def call(function: str, argument: Tensor) -> Tensor:
        # What is received is not the tensor that was sent: its hooks are its own.
        return model.scale(argument.view_as(argument)).clone()

    (await train(call, here, local)).backward()

    there = Log()
    far = Model(there)
    two.bob.register(far.scale)
    two.bob.register(lambda: of_current().gradients()[far.w], "gradient")
    async with two.alice.context() as ctx:
        await ctx.backward(await train(two.remote_bob.call, there, x))
        assert torch.equal(ctx.gradients()[x], some(local.grad))
        assert torch.equal(await two.remote_bob.call("gradient"), some(model.w.grad))
    assert there.sorted() == here.sorted()
    counts = [name for name, _ in there.seen]
    assert counts.count("inside") == 3
    assert counts.count("w") == counts.count("w accumulated") == counts.count("after v") == 1


def of_current() -> za.Context:
    context = za.current_context()
    assert context is not None
    return context


async def test_accumulate_hooks_see_one_pass_at_a_time_and_no_other_grad(two: Pair) -> None:
    two.bob.register(lambda x: 2 * x, "double")
    log, x = Log(), near_leaf()
    x.grad = torch.full((2, 3), 100.0)
    on_accumulation(x, log.leaf("accumulated"))
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("double", x)).sum()
        for _ in range(2):
            await ctx.backward(loss, retain_graph=True)
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 4.0))
    assert log.seen == [("accumulated", [[2.0] * 3] * 2)] * 2
    assert torch.equal(x.grad, torch.full((2, 3), 100.0))


async def test_an_accumulate_hook_may_change_what_is_found(two: Pair) -> None:
    def halve(leaf: Tensor) -> None:
        leaf.grad = some(leaf.grad) / 2

    two.bob.register(lambda x: 2 * x, "double")
    x = near_leaf()
    on_accumulation(x, halve)
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("double", x)).sum())
        assert torch.equal(ctx.gradients()[x], torch.ones(2, 3))


async def test_hooks_of_what_nothing_flows_through_do_not_run(two: Pair) -> None:
    log, unused = Log(), far_leaf()
    on_gradient(unused, log.tensor("unused"))
    on_accumulation(unused, log.leaf("unused"))

    @two.bob.register
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * unused
        on_gradient(y, log.tensor("inside"))
        return 2 * x, y

    x = near_leaf()
    async with two.alice.context() as ctx:
        used, other = await two.remote_bob.call("both", x)
        on_gradient(other, log.tensor("other"))
        await ctx.backward(used.sum())
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 2.0))
    assert not log.seen


async def test_retain_grad_keeps_the_gradients_of_inner_and_received_tensors(two: Pair) -> None:
    two.bob.register(lambda x: 3 * x, "triple")
    x = near_leaf()
    async with two.alice.context() as ctx:
        inner = 2 * x
        inner.retain_grad()
        received = await two.remote_bob.call("triple", inner)
        received.retain_grad()
        await ctx.backward((received * inner).sum())
        assert torch.equal(some(received.grad), inner)
        assert torch.equal(some(inner.grad), 6 * inner)
        assert torch.equal(ctx.gradients()[x], 12 * inner)


async def test_hooks_are_in_the_context_of_their_worker(two: Pair) -> None:
    seen: dict[str, za.Context | None] = {}

    def look(name: str) -> Any:
        return lambda *_: seen.update({name: za.current_context()})

    @two.bob.register
    def double(x: Tensor) -> Tensor:
        seen["call"] = za.current_context()
        on_gradient(x, look("argument"))
        return 2 * x

    x = near_leaf()
    on_gradient(x, look("x"))
    on_accumulation(x, look("x accumulated"))
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("double", x)
        on_gradient(y, look("result"))
        await ctx.backward(y.sum())
        assert seen["result"] is seen["x"] is seen["x accumulated"] is ctx
        assert seen["argument"] is seen["call"]


async def test_hooks_of_one_pass_may_call_one_after_another(two: Pair) -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    two.bob.register(lambda x: 3 * x, "triple")
    two.bob.register(lambda: weight, "weight")  # its reply is on the graph
    remote_bob = blocking.of(two.remote_bob, asyncio.get_running_loop())
    seen: list[Tensor] = []
    x = near_leaf()
    async with two.alice.context() as ctx:
        inner = 2 * x
        received = await two.remote_bob.call("triple", inner)
        # They run in two computations: the second once the gradient has come back.
        for tensor in (received, inner):
            on_gradient(tensor, lambda _: seen.append(remote_bob.call("weight")))
        await ctx.backward(received.sum(), timeout=DEADLINE)
        assert len(seen) == 2
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 6.0))
