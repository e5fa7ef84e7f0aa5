"""Parameters that are not contiguous: fused optimizers go by where elements lie in memory."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import memory_endpoint


def doubled(weight: Tensor) -> None:
    """Have the gradient of `weight` doubled by a hook."""
    weight.register_hook(lambda grad: 2 * grad)  # type: ignore[no-untyped-call]


class Twin:
    """One module on a worker, and one like it here, both trained in the same way.

    Attributes:
        there: as its worker has it.
        here: the other.
        theirs: the optimizer of the first.
        ours: that of the second.
    """

    def __init__(
        self, module: nn.Conv2d, alice: za.Worker, remote: za.RemoteModule, theirs: Any
    ) -> None:
        self.there, self.here = module, copy.deepcopy(module)
        self.theirs: za.DistributedOptimizer = theirs
        self.ours = torch.optim.Adam(self.here.parameters(), lr=0.1, fused=True)
        self._alice, self._remote = alice, remote

    async def step(self, number: int) -> None:
        """Train a step and compare."""
        x = torch.full((2, 3, 4, 4), 0.1 * number) + torch.arange(4.0)
        self.ours.zero_grad()
        self.here(x).square().sum().backward()
        self.ours.step()
        async with self._alice.context() as ctx:
            await ctx.backward((await self._remote(x)).square().sum())
            await self.theirs.step(ctx)
        for one, other in zip(self.there.parameters(), self.here.parameters(), strict=True):
            assert torch.equal(one, other)


@asynccontextmanager
async def twin(
    change: Callable[[Tensor], Any] = lambda _: None,
    kind: type[torch.optim.Optimizer] = torch.optim.Adam,
) -> AsyncIterator[Twin]:
    """Have modules with a weight in channels-last memory, changed by `change`."""
    module = nn.Conv2d(3, 3, 2)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bob = za.Worker("bob", listen=memory_endpoint())
    bob.register(module, "module", expose="module")
    bob.register(Own)
    async with bob, za.Worker("alice") as alice:
        remote = await (await alice.connect(bob.endpoints[0])).module("module")
        params = remote.parameters()
        adam = await za.DistributedOptimizer.create(kind, params, lr=0.1, fused=True)
        both = Twin(module, alice, remote, adam)
        for each in (both.here, both.there):
            change(each.weight)
        yield both


async def test_a_state_that_has_travelled_lies_as_its_parameter_does() -> None:
    async with twin() as both:
        for number in range(4):
            await both.step(number)
            await both.theirs.load_state_dict(await both.theirs.state_dict())


async def test_the_gradient_of_a_leaf_with_a_hook_lies_as_the_leaf_does() -> None:
    async with twin(doubled) as both:
        for number in range(2):
            await both.step(number)


async def test_a_parameter_that_overlaps_itself_is_not_stepped_through() -> None:
    overlapping = torch.zeros(1, 3).expand(100_000, 3).requires_grad_()
    async with za.Worker("alice") as alice:
        adam = await za.DistributedOptimizer.create(torch.optim.Adam, [overlapping], fused=True)
        async with alice.context() as ctx:
            await ctx.backward(overlapping.sum())
            with pytest.raises(za.ConfigurationError, match="whose elements fill their memory"):
                await adam.step(ctx)


class Own(torch.optim.Adam):
    """A class of somebody's own, which torch's kernels run for all the same."""


@pytest.mark.parametrize("kind", [torch.optim.Adam, Own])
@pytest.mark.parametrize("state", [torch.zeros(1), torch.zeros(()), torch.zeros(3, 3, 4), 0.5])
@pytest.mark.parametrize("is_fused_later", [False, True])
async def test_a_state_of_another_shape_is_not_stepped_with(
    kind: type[torch.optim.Optimizer], state: Any, is_fused_later: bool
) -> None:
    async with twin(kind=kind) as both:
        await both.step(1)
        wrong = await both.theirs.state_dict()
        wrong["state"][0]["exp_avg"] = state
        wrong["param_groups"][0]["fused"] = not is_fused_later
        await both.theirs.load_state_dict(wrong)
        both.theirs.param_groups[0]["fused"] = True
        before = both.there.weight.detach().clone()
        with pytest.raises(
            za.RemoteError, match=r"laid out as its parameter of shape \[3, 3, 2, 2\]"
        ):
            await both.step(2)
        assert torch.equal(both.there.weight, before)
