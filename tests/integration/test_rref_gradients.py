"""Gradients flow through RRefs, and passes are run from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair
from tests.integration.counters import offer_counter
from tests.integration.fleets import running


async def test_gradients_flow_through_rrefs_as_in_one_process() -> None:
    weight = torch.tensor([3.0, -1.0], requires_grad=True)

    async with running("alice", "bob", "carol") as fleet:
        fleet["bob"].register(lambda x: torch.tanh(weight * x), "stage")
        fleet["bob"].register(lambda: weight, "weight")

        @fleet["carol"].register
        async def product(left: za.RRef, right: za.RRef) -> Tensor:
            a, b = await left.to_here(), await right.to_here()
            return await za.compute(torch.mul, a, b)

        bob, carol = await fleet.way("alice", "bob"), await fleet.way("alice", "carol")
        x = torch.tensor([0.5, 2.0], requires_grad=True)
        async with fleet["alice"].context() as ctx:
            hidden = await bob.remote("stage", x)
            parameter = await bob.remote("weight")
            kept = await carol.remote("product", hidden, parameter)
            loss = (await kept.to_here() + await hidden.to_here()).sum()
            await ctx.backward(loss)
            mine = ctx.gradients()[x]
            (its,) = await bob.call("gradients")
        y = torch.tensor([0.5, 2.0], requires_grad=True)
        h = torch.tanh(weight * y)
        expected = torch.autograd.grad((h * weight + h).sum(), [y, weight])
        assert torch.equal(mine, expected[0])
        assert torch.equal(its, expected[1])


async def test_a_pass_is_run_from_an_rref_by_its_owner() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    async with running("alice", "bob", "carol") as fleet:
        fleet["bob"].register(lambda x: weight * x * x, "stage")

        @fleet["carol"].register
        async def on_bob(x: Tensor) -> za.RRef:
            return await (await fleet.way("carol", "bob")).remote("stage", x)

        carol = await fleet.way("alice", "carol")
        x = torch.tensor(2.0, requires_grad=True)
        async with fleet["alice"].context() as ctx:
            loss = await carol.call("on_bob", x)  # alice has never met bob in this context
            await ctx.backward(loss, retain_graph=True)
            assert ctx.gradients() == {x: torch.tensor(12.0)}
            await ctx.backward(loss)
            assert ctx.gradients() == {x: torch.tensor(24.0)}
            assert (await carol.call("ask", ["bob"], "gradients")) == [torch.tensor(8.0)]


async def test_backward_from_an_rref_says_what_is_wrong(pair: Pair) -> None:
    offer_counter(pair.bob)
    pair.bob.register(lambda x: x.detach(), "detached")
    rref = await pair.remote_bob.remote("Counter")
    async with pair.alice.context() as ctx:
        x = torch.ones((), requires_grad=True)
        await pair.remote_bob.call("detached", x)
        with pytest.raises(za.RemoteError, match="expected a tensor or several"):
            await ctx.backward(rref)
        cut = await pair.remote_bob.remote("detached", x)
        with pytest.raises(za.RemoteError, match="does not require grad"):
            await ctx.backward(cut)
        with pytest.raises(za.ConfigurationError, match="from an RRef: expected no grad_tensors"):
            await ctx.backward(cut, torch.ones(()))


async def test_backward_from_another_workers_own_rref_says_so(pair: Pair) -> None:
    """Two workers may live in one process, where nothing keeps their objects apart."""
    w = torch.ones((), requires_grad=True)
    kept: list[za.RRef] = []

    @pair.bob.register
    def keep(x: Tensor) -> None:
        kept.append(pair.bob.rref(w * x))

    async with pair.alice.context() as ctx:
        await pair.remote_bob.call("keep", torch.ones((), requires_grad=True))
        with pytest.raises(za.ContextError, match="is held by worker 'bob', not by this one"):
            await ctx.backward(kept[0])


async def test_backward_from_an_rref_adds_to_grad_where_asked(pair: Pair) -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    pair.bob.register(lambda x: weight * x, "stage")
    x = torch.tensor(2.0, requires_grad=True)
    async with pair.alice.context() as ctx:
        await ctx.backward(await pair.remote_bob.remote("stage", x), accumulate_grad=True)
    assert (weight.grad, x.grad) == (torch.tensor(2.0), torch.tensor(3.0))


async def test_an_rref_that_is_never_fetched_costs_a_pass_nothing(pair: Pair) -> None:
    pair.bob.register(lambda x: x * 2, "stage")
    x = torch.tensor(2.0, requires_grad=True)
    async with pair.alice.context() as ctx:
        unused = await pair.remote_bob.remote("stage", x)
        await ctx.backward(await pair.remote_bob.call("stage", x), timeout=DEADLINE)
        assert ctx.gradients() == {x: torch.tensor(2.0)}
        del unused
