"""A module's state is taken and set between an optimizer's steps, whoever asks for either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import torch
from torch import nn

import zmq_autograd as za
from tests.helpers import Pair, connected
from tests.integration.fleets import until
from tests.integration.test_module import check_same, exposed
from tests.integration.trainers import Held, are_held, is_waiting, slow_sgd

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory: what travels is the same over the other transports."""
    async with connected() as pair:
        yield pair


async def stepping(pair: Pair, net: za.RemoteModule, kind: type[torch.optim.Optimizer]) -> None:
    """Step with the gradients of one pass."""
    optimizer = await za.DistributedOptimizer.create(kind, net.parameters(), lr=1.0)
    async with pair.alice.context() as ctx:
        await ctx.backward((await net(torch.ones(1, 2))).sum())
        await optimizer.step(ctx)


async def take(net: za.RemoteModule) -> Any:
    return await net.state_dict()


async def load(net: za.RemoteModule) -> Any:
    return await net.load_state_dict({"weight": torch.full((2, 2), 5.0), "bias": torch.zeros(2)})


async def convert(net: za.RemoteModule) -> Any:
    return await net.to(torch.float64)


@pytest.mark.parametrize("use", [take, load, convert])
async def test_state_waits_for_a_step_that_runs(
    two: Pair, use: Callable[[za.RemoteModule], Awaitable[Any]]
) -> None:
    held = Held()
    kind = slow_sgd(held)
    two.bob.register(kind)
    module = nn.Linear(2, 2)
    net = await exposed(two, module)
    step = asyncio.ensure_future(stepping(two, net, kind))
    await until(held.entered.is_set)
    asked = asyncio.ensure_future(use(net))
    assert await are_held(two.bob, asked)
    held.gate.set()
    found = await asked
    await step
    if use is take:
        check_same(found, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    elif use is load:
        check_same(module.state_dict(), {"weight": torch.full((2, 2), 5.0), "bias": torch.zeros(2)})
    else:
        assert {p.dtype for p in module.parameters()} == {torch.float64}


async def test_a_step_waits_until_a_state_has_been_taken(two: Pair) -> None:
    held = Held()
    module: Any = nn.Linear(2, 2)
    module.register_state_dict_post_hook(lambda *_: held.hold())
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    net = await exposed(two, module)
    optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, net.parameters(), lr=1.0)
    async with two.alice.context() as ctx:
        await ctx.backward((await net(torch.ones(1, 2))).sum())
        asked = asyncio.ensure_future(net.state_dict())
        await until(held.entered.is_set)
        step = asyncio.ensure_future(optimizer.step(ctx))
        assert await is_waiting(two.bob, step)
        check_same(dict(module.named_parameters()), before)
        held.gate.set()
        check_same(await asked, before)
        await step
    expected = {"weight": before["weight"] - 1, "bias": before["bias"] - 1}
    check_same({name: p.detach() for name, p in module.named_parameters()}, expected)


async def test_a_backward_through_what_was_loaded_meanwhile_fails(two: Pair) -> None:
    net = await exposed(two, nn.Linear(2, 2))
    async with two.alice.context() as ctx:
        y = await net(torch.ones(1, 2, requires_grad=True))
        await net.load_state_dict(nn.Linear(2, 2).state_dict())
        with pytest.raises(za.RemoteError, match="modified by an inplace operation"):
            await ctx.backward(y.sum())
        assert await net.gradients(ctx) == {}
