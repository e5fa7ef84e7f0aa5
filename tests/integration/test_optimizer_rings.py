"""Trainers of the same networks train them together, and never wait for each other in a ring."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint
from tests.integration.fleets import running, until
from tests.integration.trainers import (
    LR,
    Server,
    Trainer,
    apart,
    is_waiting,
    trainer_of,
    training,
)


async def test_several_trainers_never_meet_a_changed_parameter() -> None:
    torch.manual_seed(0)
    async with training("a", "b", "c") as (server, trainers):
        start = server.value()
        await asyncio.gather(*(trainer.train(30) for trainer in trainers))
        expected = start - LR * torch.stack(server.updates).sum(0)
        assert len(server.updates) == 90
        torch.testing.assert_close(server.value(), expected, rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize("what", ["a retained graph", "a result that nothing uses"])
async def test_trainers_of_different_parts_do_not_wait_in_a_ring(what: str) -> None:
    """Each reads both parts and steps its own: the other one's owner hears of that, too."""
    first, second = Server("first"), Server("second")
    both = asyncio.Barrier(2)

    async def train(name: str, part: int) -> None:
        async with za.Worker(name) as worker:
            remotes = [await worker.connect(s.worker.endpoints[0]) for s in (first, second)]
            nets = [await remote.module("net", timeout=DEADLINE) for remote in remotes]
            sgd = torch.optim.SGD
            own = await za.DistributedOptimizer.create(sgd, nets[part].parameters(), lr=LR)

            async def forward() -> Tensor:
                result: Tensor = await nets[1](await nets[0](torch.ones(2, 3).double()))
                return result.sum()

            async with worker.context() as ctx:
                loss = await forward()
                if what == "a result that nothing uses":
                    await forward()
                await ctx.backward(loss, retain_graph=what == "a retained graph")
                await both.wait()
                await own.step(ctx, timeout=DEADLINE)
                await both.wait()  # in its context still

    async with first.worker, second.worker, asyncio.timeout(DEADLINE):
        await asyncio.gather(apart(train("a", 0)), apart(train("b", 1)))


async def test_word_of_a_step_goes_round_a_circle_of_workers_once() -> None:
    told: list[str] = []

    def listen(worker: za.Worker) -> None:
        async def forward(request: za.messages.ForwardRequest, peer: za.RemoteWorker) -> Any:
            if request.function == "za.done_reading":
                told.append(worker.name)
            return await worker.default_handler(request, peer)

        worker.handler(za.messages.ForwardRequest)(forward)

    leaf = torch.ones(1, requires_grad=True)
    sgd = await za.DistributedOptimizer.create(torch.optim.SGD, [leaf], lr=LR)
    async with running("one", "two", "three") as fleet:
        for worker in fleet.workers.values():
            listen(worker)
        async with fleet["one"].context() as ctx:
            way = await fleet.way("one", "two")
            assert await way.call("ask", ["three", "one"], "gradients") == []
            await ctx.backward(leaf.sum())
            await sgd.step(ctx)
            # Each tells its two neighbours, but not the one that it heard of it from.
            assert len(told) == 2 + 1 + 1
            assert {"two", "three"} <= set(told)


async def test_workers_that_a_trainer_has_not_met_hear_of_its_step_too() -> None:
    """The trainer calls the middle one, which calls the last: that has nothing to step."""
    middle, last = Server("middle"), Server("last")

    @middle.worker.register
    async def through(x: Tensor) -> Tensor:
        there = await middle.worker.connect(last.worker.endpoints[0])
        result: Tensor = await there.call("total", await za.compute(middle.net, x))
        return result

    async with (
        middle.worker,
        last.worker,
        trainer_of(middle, "near") as near,
        trainer_of(last, "far") as far,
        near.worker.context() as ctx,
    ):
        result = await near.remote.call("through", torch.ones(2, 3).double())
        await ctx.backward(result, retain_graph=True)
        waiting = apart(far.train(1))
        assert await is_waiting(last.worker, waiting)
        await near.optimizer.step(ctx, timeout=DEADLINE)
        await asyncio.wait_for(waiting, DEADLINE)
        # What is computed from then on counts anew, wherever it is.
        result = await near.remote.call("through", torch.ones(2, 3).double())
        waiting = apart(far.train(1))
        assert await is_waiting(last.worker, waiting)
        await ctx.backward(result)
        await asyncio.wait_for(waiting, DEADLINE)
