"""Clipping and state of DistributedOptimizer against torch's own in one process, bit for bit."""

from __future__ import annotations

import asyncio
import reprlib
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.integration.fleets import until
from tests.integration.training import Reference, check_state, setting

STEPS = 5


# --- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [2.0, 1, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 1e9])
async def test_gradients_are_clipped_as_in_one_process(max_norm: float, norm_type: float) -> None:
    reference = Reference(lambda params: torch.optim.SGD(params, lr=0.1))
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params, lr=0.1)
        for number in range(STEPS):
            reference.backward(number)
            expected = torch.nn.utils.clip_grad_norm_(
                reference.model.parameters(), max_norm, norm_type
            )
            reference.optimizer.step()
            async with there.trainer.context() as ctx:
                await ctx.backward(await there.forward(number))
                before = ctx.gradients()
                kept = {leaf: grad.clone() for leaf, grad in before.items()}
                total = await optimizer.clip_grad_norm(ctx, max_norm, norm_type)
                assert all(torch.equal(before[leaf], kept[leaf]) for leaf in kept)
                await optimizer.step(ctx)
            torch.testing.assert_close(total, expected, rtol=0, atol=0)
            assert total.shape == ()
            reference.check(there.model)


async def test_gradients_of_several_dtypes_are_clipped_as_in_one_process() -> None:
    """Torch takes the norms by dtype, not in the order of the parameters: here it shows."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64) * 10
    generator = torch.Generator().manual_seed(9)
    leaves = [torch.ones(7, dtype=dtype, requires_grad=True) for dtype in dtypes]
    factors = torch.rand(len(leaves), generator=generator, dtype=torch.float64)
    loss = torch.stack(
        [(leaf.abs() * factor).sum().double() for leaf, factor in zip(leaves, factors, strict=True)]
    ).sum()
    async with za.Worker("trainer") as trainer:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, leaves, lr=1.0)
        async with trainer.context() as ctx:
            await ctx.backward(loss, retain_graph=True)
            total = await optimizer.clip_grad_norm(ctx, 0.7)
            clipped = ctx.gradients()
    loss.backward()  # type: ignore[no-untyped-call]
    expected = torch.nn.utils.clip_grad_norm_(leaves, 0.7)
    torch.testing.assert_close(total, expected, rtol=0, atol=0)
    for leaf in leaves:
        torch.testing.assert_close(clipped[leaf], leaf.grad, rtol=0, atol=0)


async def test_a_norm_that_is_not_finite_may_be_refused() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params)
        async with there.trainer.context() as ctx:
            await ctx.backward(await there.forward(0) * torch.inf)
            before = ctx.gradients()
            with pytest.raises(RuntimeError, match="non-finite"):
                await optimizer.clip_grad_norm(ctx, 1.0, error_if_nonfinite=True)
            assert all(ctx.gradients()[leaf] is grad for leaf, grad in before.items())
            assert (await optimizer.clip_grad_norm(ctx, 1.0)).isnan()


async def test_there_may_be_nothing_to_clip() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params)
        async with there.trainer.context() as ctx:
            assert await optimizer.clip_grad_norm(ctx, 1.0) == 0


# --- state ---------------------------------------------------------------------------------------


async def test_a_state_goes_to_one_process_and_back() -> None:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, amsgrad=True)

    reference = Reference(make)
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.Adam, there.params, amsgrad=True
        )
        await there.step(optimizer, 0)
        # From several workers into one process ...
        reference.step(0)
        reference.optimizer = make(reference.model.parameters())
        reference.optimizer.load_state_dict(await optimizer.state_dict())
        reference.optimizer.param_groups[0]["lr"] = 0.05
        reference.step(1)
        # ... and back, into a new one.
        optimizer = await za.DistributedOptimizer.create(torch.optim.Adam, there.params)
        before = [p.detach().clone() for p in reference.model.parameters()]
        with torch.no_grad():
            for mine, value in zip(there.model.parameters(), before, strict=True):
                mine.copy_(value)
        state = reference.optimizer.state_dict()
        await optimizer.load_state_dict(state)
        check_state(await optimizer.state_dict(), state)
        assert optimizer.param_groups[0]["lr"] == 0.05
        assert await there.step(optimizer, 2) == reference.step(2)
        reference.check(there.model)


async def test_a_state_that_is_larger_than_a_message_travels_in_several() -> None:
    leaves = [torch.ones(50_000, requires_grad=True) for _ in range(6)]
    limits = za.Limits(message_bytes=400_000)
    server = za.Worker("server", listen="memory://large-state", limits=limits)
    server.register(lambda: [server.rref(leaf) for leaf in leaves], "tensors")
    server.register(lambda: sum(leaf.sum() for leaf in leaves), "total")
    async with server, za.Worker("trainer", limits=limits) as trainer:
        remote = await trainer.connect(server.endpoints[0])
        rrefs = await remote.call("tensors")
        optimizer = await za.DistributedOptimizer.create(torch.optim.Adam, rrefs)
        async with trainer.context() as ctx:
            await ctx.backward(await remote.call("total"))
            await optimizer.step(ctx)
        state = await optimizer.state_dict()
        assert len(state["state"]) == 6
        for of_parameter in state["state"].values():
            of_parameter["exp_avg"].fill_(7.0)
        await optimizer.load_state_dict(state)
        check_state(await optimizer.state_dict(), state)
        # Those who ask at once get one each, whole.
        for found in await asyncio.gather(optimizer.state_dict(), optimizer.state_dict()):
            check_state(found, state)
        # Neither side keeps anything of them: there are the leaves and the optimizer.
        await until(lambda: server.status()["rrefs"]["owned"] == len(leaves) + 1)


async def test_a_state_of_other_groups_is_refused() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.Adam, there.params)
        other = torch.optim.Adam([torch.zeros(1)]).state_dict()
        with pytest.raises(za.ConfigurationError, match=r"groups of \[6\] parameters, got \[1\]"):
            await optimizer.load_state_dict(other)


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        {"state": {}},
        {"state": None, "param_groups": []},
        {"state": {}, "param_groups": None},
        {"state": {}, "param_groups": [3]},
        {"state": {}, "param_groups": [{"params": 1}]},
    ],
)
async def test_what_is_no_state_is_refused(state: Any) -> None:
    leaf = torch.ones(1, requires_grad=True)
    async with za.Worker("alone"):
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, [leaf])
        with pytest.raises(za.ConfigurationError) as raised:
            await optimizer.load_state_dict(state)
    assert str(raised.value).startswith("load_state_dict: expected a dict with 'state' and")
    assert str(raised.value).endswith(f", got {reprlib.repr(state)}")


async def test_hooks_of_the_optimizer_run() -> None:
    said: list[str] = []
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params)
        start = there.model.scale.detach().clone()
        optimizer.register_step_pre_hook(
            lambda *_: said.append(f"before {torch.equal(there.model.scale, start)}")
        )
        optimizer.register_step_post_hook(
            lambda *_: said.append(f"after {torch.equal(there.model.scale, start)}")
        )
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
        optimizer.register_load_state_dict_pre_hook(
            lambda _, state: said.append(str(state["more"]))
        )
        await there.step(optimizer, 0)
        await optimizer.load_state_dict(await optimizer.state_dict())
    assert said == ["before True", "after False", "1"]
