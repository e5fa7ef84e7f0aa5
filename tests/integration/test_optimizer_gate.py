"""Steps come between the contexts that use their parameters, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint
from tests.integration.fleets import until

LR = 0.01


class Server:
    """Two layers of one network: what is computed of the second leads to the first as well.

    Attributes:
        net: the network; its layers' backward fails if their weights have changed.
        worker: offers it.
        updates: the gradients that trainers have applied, as they told.
    """

    def __init__(self, name: str = "server") -> None:
        self.net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        self.updates: list[Tensor] = []
        self.meeting = asyncio.Barrier(2)
        self.worker = za.Worker(name, listen=memory_endpoint())
        self.worker.register(self.net, "net", expose="module")
        self.worker.register(self.total, "total")
        self.worker.register(self.frozen, "frozen")
        self.worker.register(self.meet, "meet")
        self.worker.register(self.note, "note")
        self.worker.register(self.value, "value")

    def total(self, x: Tensor) -> Tensor:
        """Compute something that leads to all parameters."""
        output: Tensor = self.net(x)
        return output.sum()

    def frozen(self, x: Tensor) -> Tensor:
        """Compute something that leads to no parameter."""
        return x * 2

    async def meet(self) -> None:
        """Return when two have come."""
        await self.meeting.wait()

    def note(self) -> None:
        """Take note of the gradients of the current context."""
        context = za.current_context()
        assert context is not None
        gradients = context.gradients()
        self.updates.append(torch.cat([gradients[p].flatten() for p in self.net.parameters()]))

    def value(self) -> Tensor:
        """Return all parameters in one."""
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


@dataclass(frozen=True)
class Trainer:
    """A worker that trains the server's network.

    Attributes:
        worker: it.
        remote: the server as it sees it.
        net: the server's network.
        optimizer: of all its parameters.
    """

    worker: za.Worker
    remote: za.RemoteWorker
    net: za.RemoteModule
    optimizer: za.DistributedOptimizer

    async def loss(self, times: float = 1.0) -> Tensor:
        """Run a forward pass in the current context."""
        output: Tensor = await self.net(torch.full((2, 3), times, dtype=torch.float64))
        return output.square().sum()

    async def train(self, steps: int) -> None:
        """Train so many steps."""
        for number in range(steps):
            async with self.worker.context() as ctx:
                loss = await self.loss(0.1 * number)
                await self.remote.call("frozen", loss)
                await ctx.backward(loss)
                await self.remote.call("note", timeout=DEADLINE)
                await self.optimizer.step(ctx, timeout=DEADLINE)


@asynccontextmanager
async def trainer_of(server: Server, name: str) -> AsyncIterator[Trainer]:
    async with za.Worker(name) as worker:
        remote = await worker.connect(server.worker.endpoints[0], timeout=DEADLINE)
        net = await remote.module("net", timeout=DEADLINE)
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, net.parameters(), lr=LR)
        yield Trainer(worker, remote, net, optimizer)


@asynccontextmanager
async def training(*names: str) -> AsyncIterator[tuple[Server, list[Trainer]]]:
    """Run a server and trainers of these names."""
    async with AsyncExitStack() as stack:
        server = Server()
        await stack.enter_async_context(server.worker)
        yield server, [await stack.enter_async_context(trainer_of(server, name)) for name in names]


def apart(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Run `coroutine` in a task that is in none of this one's autograd contexts."""
    return asyncio.create_task(coroutine, context=contextvars.Context())


async def is_waiting(server: Server, step: asyncio.Task[Any]) -> bool:
    """Tell whether `step` waits for its turn on the server; wait until that is known."""
    gate = server.worker._running_node().contexts.gate
    await until(lambda: step.done() or gate._waiting)
    # What set it free would have let it go by the time that these are over.
    for _ in range(3):
        await asyncio.sleep(0)
    return not step.done()


async def test_several_trainers_never_meet_a_changed_parameter() -> None:
    torch.manual_seed(0)
    async with training("a", "b", "c") as (server, trainers):
        start = server.value()
        await asyncio.gather(*(trainer.train(30) for trainer in trainers))
        expected = start - LR * torch.stack(server.updates).sum(0)
        assert len(server.updates) == 90
        torch.testing.assert_close(server.value(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("freeing", ["backward", "leaving", "step", "loss"])
async def test_a_step_waits_for_a_context_that_needs_its_parameters(freeing: str) -> None:
    async with training("reader", "stepper") as (server, (reader, stepper)):
        before = server.value()
        ctx = reader.worker.context()
        async with ctx:
            loss = await reader.loss()
            step = apart(stepper.train(1))
            assert await is_waiting(server, step)
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
        assert await is_waiting(server, step)
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
        assert await is_waiting(server, step)
        total = await rref.to_here()
        await ctx.backward(total, retain_graph=True)
        assert await is_waiting(server, step)
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
        assert await is_waiting(server, step)
        await ctx.backward(loss)
        await asyncio.wait_for(step, DEADLINE)


async def test_a_step_does_not_wait_for_what_its_own_context_goes_on_to_compute() -> None:
    async with training("reader", "stepper") as (server, (reader, stepper)):

        async def train() -> None:
            async with stepper.worker.context() as ctx:
                await ctx.backward(await stepper.loss())
                step = asyncio.create_task(stepper.optimizer.step(ctx, timeout=DEADLINE))
                assert await is_waiting(server, step)
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
            assert await is_waiting(server, step)
            await apart(train())
            assert not step.done()
            assert other.item() != 1
        await asyncio.wait_for(step, DEADLINE)


async def test_calls_of_new_contexts_are_held_back_and_never_for_long() -> None:
    async with training("reader", "stepper", "new") as (server, (reader, stepper, new)):

        async def ask() -> float:
            started = time.monotonic()
            async with new.worker.context():
                await new.remote.call("frozen", torch.ones(1))
            return time.monotonic() - started

        async with reader.worker.context() as ctx:
            loss = await reader.loss()
            step = apart(stepper.train(1))
            assert await is_waiting(server, step)
            assert 0.9 < await apart(ask()) < 5
            assert not step.done()
            # Who reads already may need a call for just what the step waits for.
            started = time.monotonic()
            await reader.remote.call("frozen", torch.ones(1))
            assert time.monotonic() - started < 0.9
            await ctx.backward(loss)
            await asyncio.wait_for(step, DEADLINE)


async def test_a_call_that_is_held_back_goes_on_after_the_step() -> None:
    async with training("reader", "stepper", "new") as (server, (reader, stepper, new)):

        async def ask() -> Any:
            async with new.worker.context():
                return await new.remote.call("value")

        async with reader.worker.context() as ctx:
            loss = await reader.loss()
            step = apart(stepper.train(1))
            assert await is_waiting(server, step)
            before = server.value()
            started = time.monotonic()
            call = apart(ask())
            await ctx.backward(loss)
            # Whoever held out has the new values, long before a second has passed.
            assert not torch.equal(await asyncio.wait_for(call, DEADLINE), before)
            assert time.monotonic() - started < 0.9
            await step


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


async def test_a_step_that_is_cancelled_is_withdrawn() -> None:
    async with training("reader", "stepper") as (server, (reader, stepper)):
        before = server.value()
        async with reader.worker.context():
            await reader.loss()
            step = apart(stepper.train(1))
            assert await is_waiting(server, step)
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
            assert await is_waiting(server, step)
            await lost.worker.close()
            await until(lambda: not gate._waiting)
            await asyncio.wait([step])
            assert isinstance(step.exception(), za.ZmqAutogradError)
        assert torch.equal(server.value(), before)
        await following.train(1)


async def test_trainers_may_meet_between_backward_and_step() -> None:
    async def train(trainer: Trainer) -> None:
        async with trainer.worker.context() as ctx:
            loss = await trainer.loss()
            await trainer.remote.call("meet", timeout=DEADLINE)
            await ctx.backward(loss)
            await trainer.remote.call("meet", timeout=DEADLINE)
            await trainer.optimizer.step(ctx, timeout=DEADLINE)
            await trainer.remote.call("meet", timeout=DEADLINE)

    async with training("a", "b") as (_, trainers):
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*map(train, trainers))


async def test_a_call_that_waits_for_another_trainers_step_is_waited_for_as_long_as_told() -> None:
    async with training("early", "late") as (server, (early, late)):

        async def wait_for_early() -> None:
            async with late.worker.context():
                await late.remote.call("meet", timeout=DEADLINE)

        meeting = apart(wait_for_early())
        await until(lambda: server.meeting.n_waiting == 1)
        async with early.worker.context() as ctx, asyncio.timeout(DEADLINE):
            await ctx.backward(await early.loss())
            with pytest.raises(za.DeadlineExceeded, match="runs a call"):
                await early.optimizer.step(ctx, timeout=0.2)
            await early.remote.call("meet", timeout=DEADLINE)
            await early.optimizer.step(ctx, timeout=DEADLINE)
        await meeting


async def test_two_trainers_of_two_servers_do_not_wait_in_a_ring() -> None:
    async def train(worker: za.Worker, order: list[Server]) -> None:
        nets = []
        for server in order:
            remote = await worker.connect(server.worker.endpoints[0])
            nets.append(await remote.module("net", timeout=DEADLINE))
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.SGD, [p for net in nets for p in net.parameters()], lr=LR
        )
        for _ in range(10):
            async with worker.context() as ctx:
                x = torch.ones(2, 3, dtype=torch.float64)
                for net in nets:
                    x = await net(x)
                await ctx.backward(x.sum())
                await optimizer.step(ctx, timeout=DEADLINE)

    first, second = Server("first"), Server("second")
    async with first.worker, second.worker, za.Worker("a") as a, za.Worker("b") as b:
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(train(a, [first, second]), train(b, [second, first]))


async def test_steps_of_several_optimizers_in_any_order_do_not_wait_in_a_ring() -> None:
    async with training("a", "b") as (_, trainers):

        async def train(trainer: Trainer, *, is_reversed: bool) -> None:
            layers = [trainer.net.parameters()[:2], trainer.net.parameters()[2:]]
            optimizers = [
                await za.DistributedOptimizer.create(torch.optim.SGD, layer, lr=LR)
                for layer in (reversed(layers) if is_reversed else layers)
            ]
            for _ in range(10):
                async with trainer.worker.context() as ctx:
                    loss = await trainer.loss()
                    await ctx.backward(loss, retain_graph=True)
                    for optimizer in optimizers:
                        await optimizer.step(ctx, timeout=DEADLINE)

        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(train(t, is_reversed=bool(n)) for n, t in enumerate(trainers)))


class Learner:
    """Trains its own network in the calls that it serves, one at a time."""

    def __init__(self) -> None:
        self.net = nn.Linear(3, 3).double()
        self.optimizer: za.DistributedOptimizer | None = None
        self.steps = 0

    async def learn(self, x: Tensor) -> None:
        context = za.current_context()
        assert context is not None
        if self.optimizer is None:
            self.optimizer = await za.DistributedOptimizer.create(
                torch.optim.SGD, self.net.parameters(), lr=LR
            )
        loss = (await za.compute(self.net, x)).square().sum()
        await context.backward(loss)
        await self.optimizer.step(context, timeout=DEADLINE)
        self.steps += 1


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_an_object_may_step_its_own_network_while_others_wait_for_it(
    concurrency: int,
) -> None:
    learner = Learner()
    worker = za.Worker("server", listen=memory_endpoint())
    worker.register(learner, "learner", expose=("learn",), concurrency=concurrency)

    async def ask(trainer: za.Worker) -> None:
        remote = await trainer.connect(worker.endpoints[0])
        for _ in range(10):
            async with trainer.context():
                await remote.call(
                    "learner.learn", torch.ones(1, 3, dtype=torch.float64), timeout=DEADLINE
                )

    async with worker, za.Worker("a") as a, za.Worker("b") as b, za.Worker("c") as c:
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*map(ask, (a, b, c)))
    assert learner.steps == 30


async def test_tasks_of_one_worker_train_one_network_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    async with za.Worker("alone") as worker:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, net.parameters(), lr=LR)

        async def train() -> None:
            for _ in range(20):
                async with worker.context() as ctx:
                    output = await za.compute(net, torch.ones(2, 3, dtype=torch.float64))
                    await ctx.backward(output.square().sum())
                    await optimizer.step(ctx, timeout=DEADLINE)

        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(train() for _ in range(4)))


# --- while a step runs ---------------------------------------------------------------------------


class Slow(torch.optim.SGD):
    """Begins a step and ends it when it is told to."""

    begun = threading.Event()
    may_end = threading.Event()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.zero_()
        self.begun.set()
        assert self.may_end.wait(DEADLINE)
        for parameter in parameters:
            parameter.fill_(1.0)


@pytest.mark.parametrize("is_in_context", [True, False])
async def test_nobody_sees_the_midst_of_a_step(is_in_context: bool) -> None:
    Slow.begun.clear()
    Slow.may_end.clear()
    async with training("reader", "stepper") as (server, (reader, stepper)):
        server.worker.register(Slow)
        slow = await za.DistributedOptimizer.create(Slow, stepper.net.parameters())

        async def train() -> None:
            async with stepper.worker.context() as ctx:
                await ctx.backward(await stepper.loss())
                await slow.step(ctx, timeout=DEADLINE)

        step = asyncio.create_task(train())
        assert await asyncio.to_thread(Slow.begun.wait, DEADLINE)
        async with reader.worker.context() if is_in_context else nullcontext():
            calls = {
                asyncio.create_task(reader.remote.call("value")),
                asyncio.create_task(reader.net.parameters()[0].rref.to_here()),
            }
            _, waiting = await asyncio.wait(calls, timeout=0.2)
            assert waiting == calls
            Slow.may_end.set()
            for value in await asyncio.gather(*calls):
                assert value.eq(1).all()
        await step


async def test_a_step_that_is_cancelled_while_it_runs_ends_first() -> None:
    Slow.begun.clear()
    Slow.may_end.clear()
    async with training("reader", "stepper") as (server, (reader, stepper)):
        server.worker.register(Slow)
        slow = await za.DistributedOptimizer.create(Slow, stepper.net.parameters())

        async def train() -> None:
            async with stepper.worker.context() as ctx:
                await ctx.backward(await stepper.loss())
                await slow.step(ctx, timeout=DEADLINE)

        step = asyncio.create_task(train())
        assert await asyncio.to_thread(Slow.begun.wait, DEADLINE)
        step.cancel()
        await asyncio.wait([step])
        async with reader.worker.context():
            call = asyncio.create_task(reader.remote.call("value"))
            assert not (await asyncio.wait([call], timeout=0.2))[0]
            Slow.may_end.set()
            assert (await call).eq(1).all()
