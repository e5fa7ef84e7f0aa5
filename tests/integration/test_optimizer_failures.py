"""A step that does not succeed everywhere says who applied it, who did not, and who is unknown."""

from __future__ import annotations

import asyncio
import contextvars
import time

import pytest
import torch

import zmq_autograd as za
from tests.faults.victims import running_victim
from tests.helpers import DEADLINE, memory_endpoint
from tests.integration.temperamental import Temperamental, setting


async def test_a_step_that_succeeds_raises_nothing() -> None:
    async with setting() as there:
        await there.step(await there.optimizer("well", "well", "well"))
        assert there.now == [4, 4, 4]


async def test_who_raises_before_anything_has_changed_has_not_applied_it() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "raises before")
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        error = caught.value
        assert there.now == [4, 4, 5]
        assert (error.applied, error.not_applied, error.unknown) == (
            ("trainer", "good"),
            ("bad",),
            (),
        )
        cause = error.causes["bad"]
        assert isinstance(cause, za.RemoteError)
        assert (cause.type_name, cause.message, cause.worker) == ("ValueError", "not today", "bad")
        assert "in step_one" in (cause.traceback or "")
        assert error.__cause__ is cause
        assert error.worker == "bad"
        text = str(error)
        assert (
            "; applied: 'trainer', 'good'; not applied: 'bad' (RemoteError: ValueError on" in text
        )
        optimizer.param_groups[2]["mood"] = "well"
        await there.step(optimizer)
        assert there.now == [3, 3, 4]


@pytest.mark.parametrize(
    "mood",
    ["raises after", "adds state and raises", "changes state and raises", "exits"],
)
async def test_who_raises_in_the_midst_is_unknown(mood: str) -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", mood)
        with pytest.raises(
            za.PartialStepError, match="not known whether it was applied: 'bad'"
        ) as caught:
            await there.step(optimizer)
        error = caught.value
        assert (error.applied, error.not_applied, error.unknown) == (
            ("trainer", "good"),
            (),
            ("bad",),
        )
        assert there.now == [4, 4, 4]


async def test_what_goes_past_torchs_version_counters_is_seen_too() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "changes data and raises")
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        assert caught.value.unknown == ("bad",)


async def test_state_alone_may_have_changed() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "adds state and raises")
        async with there.trainer.context() as ctx:
            with pytest.raises(za.PartialStepError) as caught:
                await optimizer.step(ctx)  # without a gradient
        assert caught.value.unknown == ("bad",)
        assert there.now == [5, 5, 5]


async def test_this_side_may_be_the_one_that_fails() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("raises before", "well", "well")
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        error = caught.value
        assert (error.applied, error.not_applied) == (("good", "bad"), ("trainer",))
        assert type(error.causes["trainer"]) is ValueError
        assert there.now == [5, 4, 4]


async def test_where_nothing_was_applied_the_first_cause_is_raised() -> None:
    async with setting() as there:
        optimizer = await there.optimizer(*["raises before"] * 3)
        with pytest.raises(ValueError, match="not today"):
            await there.step(optimizer)
        assert there.now == [5, 5, 5]


async def test_owners_whose_outcome_cannot_travel_are_unknown() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "cannot tell")  # of which each has some
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        assert (caught.value.applied, caught.value.unknown) == (("trainer",), ("good", "bad"))
        assert there.now == [4, 4, 4]


async def test_hyperparameters_may_be_tensors_in_lists() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("replaces", "well", "replaces")
        for _ in range(2):
            await there.step(optimizer)
        assert there.now == [3, 3, 3]
        for group in optimizer.param_groups[::2]:
            assert torch.equal(group["weights"][0], torch.ones(2))


async def test_one_owner_that_raised_in_the_midst_is_a_partial_step() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(
            Temperamental, [there.params[2]], mood="raises after"
        )
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        assert (caught.value.applied, caught.value.unknown) == ((), ("bad",))


async def test_who_did_not_get_its_turn_has_not_applied_it() -> None:
    async with setting() as there, za.Worker("reader") as reader:
        bad = await reader.connect(there.servers[1].endpoints[0])
        optimizer = await there.optimizer("well", "well", "well")
        async with reader.context():
            await bad.call("times", torch.ones(()))
            with pytest.raises(za.PartialStepError) as caught:
                await asyncio.create_task(there.step(optimizer, 0.2), context=contextvars.Context())
        error = caught.value
        assert (error.applied, error.not_applied) == (("trainer", "good"), ("bad",))
        assert isinstance(error.causes["bad"], za.DeadlineExceeded)
        assert there.now == [4, 4, 5]
        await there.step(optimizer)
        assert there.now == [3, 3, 4]


async def test_who_was_lost_before_has_not_applied_it() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "well")
        async with there.trainer.context() as ctx:
            await there.backward(ctx)
            await there.servers[1].close()
            with pytest.raises(za.PartialStepError) as caught:
                await optimizer.step(ctx)
        error = caught.value
        assert (error.applied, error.not_applied) == (("trainer", "good"), ("bad",))
        assert isinstance(error.causes["bad"], za.WorkerLost)
        assert there.now == [4, 4, 5]


async def test_hyperparameters_that_cannot_travel_change_nothing_there() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "well")
        optimizer.param_groups[1]["more"] = object()
        with pytest.raises(za.PartialStepError, match="cannot travel") as caught:
            await there.step(optimizer)
        assert caught.value.not_applied == ("good", "bad")
        assert there.now == [4, 5, 5]


async def test_a_context_that_was_lost_on_its_way_is_not_taken_for_one_without_gradients() -> None:
    """The owner was reached by way of a worker that is gone: its gradients went with that."""
    async with setting() as there, za.Worker("between", listen=memory_endpoint()) as between:
        way = await between.connect(there.servers[1].endpoints[0])
        between.register(lambda x: way.call("times", x), "times")
        remote = await there.trainer.connect(between.endpoints[0])
        optimizer = await za.DistributedOptimizer.create(Temperamental, there.params[1:])
        async with there.trainer.context() as ctx:
            await ctx.backward(
                await remote.call("times", torch.ones(()))
                + await there.remotes[0].call("times", torch.ones(()))
            )
            await between.close()
            with pytest.raises(za.PartialStepError) as caught:
                await optimizer.step(ctx)
        assert (caught.value.applied, caught.value.not_applied) == (("good",), ("bad",))
        assert isinstance(caught.value.causes["bad"], za.WorkerLost)
        assert there.now == [5, 4, 5]


async def test_a_context_finds_its_gradients_whichever_way_it_went() -> None:
    async with setting() as there, za.Worker("between", listen=memory_endpoint()) as between:
        way = await between.connect(there.servers[1].endpoints[0])
        between.register(lambda x: way.call("times", x), "times")
        remote = await there.trainer.connect(between.endpoints[0])
        optimizer = await za.DistributedOptimizer.create(Temperamental, [there.params[2]])
        async with there.trainer.context() as ctx:
            await ctx.backward(await remote.call("times", torch.ones(())))
            assert await optimizer.clip_grad_norm(ctx, 10.0) == 1
            await optimizer.step(ctx)
        assert there.now == [5, 5, 4]


@pytest.mark.parametrize("fate", ["killed", "frozen"])
async def test_who_falls_silent_in_a_step_is_unknown(fate: str) -> None:
    mine = torch.tensor(5.0, requires_grad=True)
    async with running_victim("victim") as victim, za.Worker("trainer") as trainer:
        remote = await trainer.connect(victim.endpoint, timeout=DEADLINE)
        theirs = await remote.remote("double", torch.ones(2))
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, [mine, theirs], lr=1.0)
        async with trainer.context() as ctx:
            await ctx.backward(mine * 1)
            victim.freeze()
            started = time.monotonic()
            step = asyncio.create_task(optimizer.step(ctx, timeout=0.5))
            if fate == "killed":
                await asyncio.sleep(0)
                victim.kill()
            with pytest.raises(za.PartialStepError) as caught:
                await step
            if fate == "frozen":
                victim.thaw()
        assert time.monotonic() - started < DEADLINE
        error = caught.value
        assert (error.applied, error.not_applied, error.unknown) == (("trainer",), (), ("victim",))
        kind = za.WorkerLost if fate == "killed" else za.DeadlineExceeded
        assert isinstance(error.causes["victim"], kind)
        assert mine.item() == 4
