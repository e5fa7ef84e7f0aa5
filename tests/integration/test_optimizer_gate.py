"""Steps come between the contexts that use their parameters, and what waits for what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE
from tests.integration.fleets import until
from tests.integration.trainers import (
    Held,
    Server,
    Trainer,
    apart,
    are_held,
    is_waiting,
    slow_sgd,
    training,
)
from zmq_autograd.engine import local_context
from zmq_autograd.engine.gate import Gate


@pytest.mark.parametrize("freeing", ["backward", "leaving", "step", "loss"])
async def test_a_step_waits_for_a_context_that_needs_its_parameters(freeing: str) -> None:
    async with training("reader", "stepper") as (server, (reader, stepper)):
        before = server.value()
        ctx = reader.worker.context()
        async with ctx:
            loss = await reader.loss()
            step = apart(stepper.train(1))
            assert await is_waiting(server.worker, step)
            assert torch.equal(server.value(), before)
            if freeing == "backward":
                await ctx.backward(loss)
            elif freeing == "step":
                await reader.optimizer.step(ctx)
            elif freeing == "loss":
                await reader.worker.close()
            if freeing != "leaving":
                await asyncio.wait_for(step, DEADLINE)
        await asyncio.wait_for(step, DEADLINE)
        assert not torch.equal(server.value(), before)


@pytest.mark.parametrize("freeing", ["pass", "pass from it", "letting go", "step"])
async def test_a_step_waits_for_a_result_that_is_kept_as_an_rref(freeing: str) -> None:
    async with (
        training("reader", "stepper") as (server, (reader, stepper)),
        reader.worker.context() as ctx,
    ):
        x = torch.ones(1, 3, dtype=torch.float64)
        rref: za.RRef | None = await reader.remote.remote("total", x)
        step = apart(stepper.train(1))
        assert await is_waiting(server.worker, step)
        match freeing:
            case "pass":
                assert rref is not None
                await ctx.backward(await rref.to_here())
            case "pass from it":
                assert rref is not None
                await ctx.backward(rref)
            case "letting go":
                rref = None
            case "step":
                await reader.optimizer.step(ctx)
        await asyncio.wait_for(step, DEADLINE)


async def test_a_step_waits_for_a_kept_result_whose_graph_no_pass_has_freed() -> None:
    async with (
        training("reader", "stepper") as (server, (reader, stepper)),
        reader.worker.context() as ctx,
    ):
        x = torch.ones(1, 3, dtype=torch.float64)
        rref = await reader.remote.remote("total", x)
        step = apart(stepper.train(1))
        await ctx.backward(await reader.loss())  # which was computed beside it
        assert await is_waiting(server.worker, step)
        total = await rref.to_here()
        await ctx.backward(total, retain_graph=True)
        assert await is_waiting(server.worker, step)
        await ctx.backward(total)
        await asyncio.wait_for(step, DEADLINE)


async def test_what_is_computed_after_a_step_counts_anew() -> None:
    async with (
        training("reader", "stepper") as (server, (reader, stepper)),
        reader.worker.context() as ctx,
    ):
        await reader.loss()
        await reader.optimizer.step(ctx)
        await apart(stepper.train(1))
        loss = await reader.loss()
        step = apart(stepper.train(1))
        assert await is_waiting(server.worker, step)
        await ctx.backward(loss)
        await asyncio.wait_for(step, DEADLINE)


async def test_a_step_does_not_wait_for_what_its_own_context_goes_on_to_compute() -> None:
    async with training("reader", "stepper") as (server, (reader, stepper)):

        async def train() -> None:
            async with stepper.worker.context() as ctx:
                await ctx.backward(await stepper.loss())
                step = asyncio.create_task(stepper.optimizer.step(ctx, timeout=DEADLINE))
                assert await is_waiting(server.worker, step)
                await stepper.loss()
                loss.set_result(None)
                await step

        loss: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with reader.worker.context():
            await reader.loss()
            training_step = apart(train())
            await asyncio.wait_for(loss, DEADLINE)
        await asyncio.wait_for(training_step, DEADLINE)


async def test_what_needs_no_parameter_holds_nothing_up() -> None:
    async with (
        training("evaluator", "stepper") as (_, (evaluator, stepper)),
        evaluator.worker.context(),
    ):
        with torch.no_grad():
            await evaluator.loss()
        await evaluator.remote.call("frozen", torch.ones(1, requires_grad=True))
        await asyncio.wait_for(apart(stepper.train(1)), DEADLINE)


async def test_a_step_of_other_parameters_overtakes_one_that_waits() -> None:
    async with training("reader", "held up", "free") as (server, (reader, held_up, free)):
        other = torch.ones(1, requires_grad=True)
        server.worker.register(lambda: server.worker.rref(other), "other")
        server.worker.register(lambda: other * 1, "times")
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.SGD, [*free.net.parameters(), await free.remote.call("other")]
        )

        async def train() -> None:
            async with free.worker.context() as ctx:
                await ctx.backward(await free.remote.call("times"))
                await optimizer.step(ctx, timeout=DEADLINE)

        async with reader.worker.context():
            await reader.loss()
            step = apart(held_up.train(1))
            assert await is_waiting(server.worker, step)
            await apart(train())
            assert not step.done()
            assert other.item() != 1
        await asyncio.wait_for(step, DEADLINE)


async def ask(trainer: Trainer, function: str, *args: Any) -> Any:
    """Call a function in a context that has read nothing yet."""
    async with trainer.worker.context():
        return await trainer.remote.call(function, *args)


@dataclass(frozen=True)
class Waiting:
    """A step that waits for a reader's context.

    Attributes:
        server: where it waits.
        reader: who holds it up, in this context.
        new: a trainer that has read nothing yet.
        ctx: the context that it waits for.
        loss: what the reader has computed in it.
        step: it.
    """

    server: Server
    reader: Trainer
    new: Trainer
    ctx: za.Context
    loss: Tensor
    step: asyncio.Task[None]


@asynccontextmanager
async def a_step_that_waits() -> AsyncIterator[Waiting]:
    async with (
        training("reader", "stepper", "new") as (server, (reader, stepper, new)),
        reader.worker.context() as ctx,
    ):
        loss = await reader.loss()
        step = apart(stepper.train(1))
        assert await is_waiting(server.worker, step)
        yield Waiting(server, reader, new, ctx, loss, step)


async def test_calls_of_new_contexts_are_held_back_until_a_step_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zmq_autograd.engine.gate.HELD_SECONDS", 3 * DEADLINE)
    async with a_step_that_waits() as waiting:
        server, reader, new = waiting.server, waiting.reader, waiting.new
        before = server.value()
        call = apart(ask(new, "value"))
        assert await are_held(server.worker, call)
        # Who reads already may need a call for just what the step waits for.
        await reader.remote.call("frozen", torch.ones(1), timeout=DEADLINE)
        assert not call.done()
        await waiting.ctx.backward(waiting.loss)
        assert not torch.equal(await asyncio.wait_for(call, DEADLINE), before)
        await waiting.step


async def test_calls_of_new_contexts_are_never_held_back_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zmq_autograd.engine.gate.HELD_SECONDS", 0.05)
    async with a_step_that_waits() as waiting:
        await asyncio.wait_for(apart(ask(waiting.new, "frozen", torch.ones(1))), DEADLINE)
        assert not waiting.step.done()
        await waiting.ctx.backward(waiting.loss)
        await asyncio.wait_for(waiting.step, DEADLINE)


async def test_a_step_that_does_not_get_its_turn_has_not_been_applied() -> None:
    async with training("evaluator", "stepper") as (server, (evaluator, stepper)):
        before = server.value()

        async def train(timeout: float) -> None:
            async with stepper.worker.context() as ctx:
                await ctx.backward(await stepper.loss())
                await stepper.optimizer.step(ctx, timeout=timeout)

        async with evaluator.worker.context():
            await evaluator.loss()
            with pytest.raises(za.DeadlineExceeded, match=r"not applied.*'evaluator'") as caught:
                await apart(train(0.2))
            assert "evaluator" in caught.value.workers
            assert torch.equal(server.value(), before)
        await train(DEADLINE)
        assert not torch.equal(server.value(), before)


async def test_a_step_whose_context_ends_before_its_turn_is_not_applied() -> None:
    async with (
        training("reader", "stepper") as (server, (reader, stepper)),
        reader.worker.context() as reading,
    ):
        loss = await reader.loss()
        before = server.value()
        ctx = stepper.worker.context()

        async def train() -> None:
            async with ctx:
                await ctx.backward(await stepper.loss())
                stepping.append(asyncio.create_task(stepper.optimizer.step(ctx, timeout=DEADLINE)))
                assert await is_waiting(server.worker, stepping[0])

        stepping: list[asyncio.Task[None]] = []
        await apart(train())
        await reading.backward(loss)
        with pytest.raises(za.ContextError, match="it has ended"):
            await stepping[0]
        assert torch.equal(server.value(), before)


async def test_a_step_that_is_cancelled_is_withdrawn() -> None:
    async with training("reader", "stepper") as (server, (reader, stepper)):
        before = server.value()
        async with reader.worker.context():
            await reader.loss()
            step = apart(stepper.train(1))
            assert await is_waiting(server.worker, step)
            step.cancel()
            await asyncio.wait([step])
            gate = server.worker._running_node().contexts.gate
            await until(lambda: not gate._waiting)
        assert torch.equal(server.value(), before)
        await stepper.train(1)


async def test_a_step_of_a_trainer_that_is_lost_is_withdrawn() -> None:
    async with training("reader", "lost", "next") as (server, (reader, lost, following)):
        before = server.value()
        gate = server.worker._running_node().contexts.gate
        async with reader.worker.context():
            await reader.loss()
            step = apart(lost.train(1))
            assert await is_waiting(server.worker, step)
            await lost.worker.close()
            await until(lambda: not gate._waiting)
            await asyncio.wait([step])
            assert isinstance(step.exception(), za.ZmqAutogradError)
        assert torch.equal(server.value(), before)
        await following.train(1)


# --- while a step runs ---------------------------------------------------------------------------


@asynccontextmanager
async def in_the_midst_of_a_step(
    server: Server, stepper: Trainer
) -> AsyncIterator[tuple[asyncio.Task[None], Held]]:
    """Run a block while a step runs, which ends once it is let go."""
    held = Held()
    kind = slow_sgd(held)
    server.worker.register(kind)
    slow = await za.DistributedOptimizer.create(kind, stepper.net.parameters())

    async def train() -> None:
        async with stepper.worker.context() as ctx:
            await ctx.backward(await stepper.loss())
            await slow.step(ctx, timeout=DEADLINE)

    step = asyncio.create_task(train())
    assert await asyncio.to_thread(held.entered.wait, DEADLINE)
    try:
        yield step, held
    finally:
        held.gate.set()
        await asyncio.wait([step])


@pytest.mark.parametrize("is_in_context", [True, False])
async def test_nobody_sees_the_midst_of_a_step(is_in_context: bool) -> None:
    async with (
        training("reader", "stepper") as (server, (reader, stepper)),
        in_the_midst_of_a_step(server, stepper) as (step, held),
        reader.worker.context() if is_in_context else nullcontext(),
    ):
        calls = [
            asyncio.create_task(reader.remote.call("value")),
            asyncio.create_task(reader.net.parameters()[0].rref.to_here()),
        ]
        assert await are_held(server.worker, *calls)
        held.gate.set()
        for value in await asyncio.gather(*calls):
            assert value.eq(1).all()
        await step


class Reader:
    """Reads the server's parameters, as the value of an RRef of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def read(self) -> Tensor:
        return self._server.value()


async def test_the_owner_sees_no_midst_of_a_step_by_its_own_rrefs_either() -> None:
    async with (
        training("reader", "stepper") as (server, (_, stepper)),
        in_the_midst_of_a_step(server, stepper) as (step, held),
    ):
        server.worker.register(Reader, expose=("read",))
        server.worker.register(nn.Sequential, expose="module")
        own = [
            asyncio.create_task(server.worker.rref(Reader(server)).call("read")),
            asyncio.create_task(server.worker.rref(server.net).call("state_dict")),
        ]
        assert await are_held(server.worker, *own)
        held.gate.set()
        value, state = await asyncio.gather(*own)
        assert value.eq(1).all()
        assert all(parameter.eq(1).all() for parameter in state.values())
        await step


async def test_who_takes_states_lets_a_step_come_to_its_turn() -> None:
    gate = Gate("server", [])
    leaf = torch.ones(1, requires_grad=True)
    order: list[str] = []

    async def take_state(name: str, may_end: asyncio.Event) -> None:
        async with gate.without_steps():
            order.append(name)
            await may_end.wait()

    async with za.Worker("server") as worker, worker.context() as ctx:
        first_may_end, done = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(take_state("first", first_may_end))
        await until(lambda: order)

        async def step() -> None:
            async with gate.step(local_context(ctx), frozenset([leaf]), None):
                order.append("step")

        stepping = asyncio.create_task(step())
        await until(lambda: gate._waiting)
        done.set()
        second = asyncio.create_task(take_state("second", done))
        for _ in range(5):
            await asyncio.sleep(0)
        first_may_end.set()
        await asyncio.gather(first, stepping, second)
    assert order == ["first", "step", "second"]


async def test_a_step_that_is_cancelled_while_it_runs_ends_first() -> None:
    async with (
        training("reader", "stepper") as (server, (reader, stepper)),
        in_the_midst_of_a_step(server, stepper) as (step, held),
    ):
        step.cancel()
        await asyncio.wait([step])
        async with reader.worker.context():
            call = asyncio.create_task(reader.remote.call("value"))
            assert await are_held(server.worker, call)
            held.gate.set()
            assert (await call).eq(1).all()
