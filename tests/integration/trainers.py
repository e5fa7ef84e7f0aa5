"""Trainers of one server's network, and where they wait for each other there."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

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


async def is_waiting(worker: za.Worker, step: asyncio.Task[Any]) -> bool:
    """Tell whether `step` waits for its turn on `worker`; wait until that is known."""
    gate = worker._running_node().contexts.gate
    await until(lambda: step.done() or gate._waiting)
    # What set it free would have let it go by the time that these are over.
    for _ in range(3):
        await asyncio.sleep(0)
    return bool(gate._waiting)


async def are_held(worker: za.Worker, *requests: asyncio.Task[Any]) -> bool:
    """Tell whether `worker` holds all of `requests` back for a step; wait until that is known."""
    gate = worker._running_node().contexts.gate
    await until(
        lambda: any(each.done() for each in requests) or len(gate._opened._waiters) == len(requests)
    )
    return not any(each.done() for each in requests)


class Held:
    """Holds whoever comes until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()

    def hold(self) -> None:
        self.entered.set()
        assert self.gate.wait(DEADLINE)


def slow_sgd(held: Held) -> type[torch.optim.Optimizer]:
    """Return an optimizer's class that is held while parameters are 0, and makes them 1."""

    class SlowSGD(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            parameters = [p for group in self.param_groups for p in group["params"]]
            for parameter in parameters:
                parameter.zero_()
            held.hold()
            for parameter in parameters:
                parameter.fill_(1)

    return SlowSGD
