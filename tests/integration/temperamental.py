"""An optimizer that fails as it is told, and a trainer with two servers that have it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint


class Temperamental(torch.optim.Optimizer):
    """Subtracts the gradient, or fails in the way that a group says."""

    def __init__(self, params: Any, mood: str = "well") -> None:
        super().__init__(params, {"mood": mood})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.step_one(parameter, group["mood"])
            if group["mood"] == "cannot tell":
                group["note"] = object()
            if group["mood"] == "replaces":
                group["weights"] = [torch.ones(2)]

    def step_one(self, parameter: Tensor, mood: str) -> None:
        if mood == "raises before":
            raise ValueError("not today")
        if mood == "changes data and raises":
            parameter.data.add_(1)
            raise ValueError("not today")
        if parameter.grad is not None:
            parameter.sub_(parameter.grad)
        if mood == "adds state and raises":
            self.state[parameter]["count"] = 1
        if mood == "changes state and raises":
            self.state[parameter].setdefault("sum", torch.zeros(())).add_(1)
        if mood == "exits":
            raise SystemExit(3)
        if mood not in ("well", "cannot tell", "replaces"):
            raise ValueError("not today")


@dataclass(frozen=True)
class Setting:
    """A trainer with a parameter, and two servers, each with one.

    Attributes:
        trainer: the trainer.
        servers: the servers.
        remotes: the servers as the trainer sees them.
        values: the parameters: the trainer's, and those of the servers.
        params: the same as the trainer has them.
    """

    trainer: za.Worker
    servers: list[za.Worker]
    remotes: list[za.RemoteWorker]
    values: list[Tensor]
    params: list[Any]

    async def optimizer(self, *moods: str) -> za.DistributedOptimizer:
        """Return an optimizer of all parameters, each in a group of its own."""
        groups = [
            {"params": [given], "mood": mood}
            for given, mood in zip(self.params, moods, strict=True)
        ]
        return await za.DistributedOptimizer.create(Temperamental, groups)

    async def backward(self, ctx: za.Context) -> None:
        """Leave a gradient of one for each parameter."""
        products = [await remote.call("times", torch.ones(())) for remote in self.remotes]
        await ctx.backward(sum(products, self.values[0]))

    async def step(self, optimizer: za.DistributedOptimizer, timeout: float = DEADLINE) -> None:
        """Take one step."""
        async with self.trainer.context() as ctx:
            await self.backward(ctx)
            await optimizer.step(ctx, timeout=timeout)

    @property
    def now(self) -> list[float]:
        """The values of the parameters, 5 at first; each step takes 1."""
        return [value.item() for value in self.values]


def offer(worker: za.Worker, value: Tensor) -> None:
    def times(x: Tensor) -> Tensor:
        return value * x

    worker.register(times)
    worker.register(Temperamental)
    worker.register(lambda: worker.rref(value), "value")


@asynccontextmanager
async def setting() -> AsyncIterator[Setting]:
    values = [torch.tensor(5.0, requires_grad=True) for _ in range(3)]
    servers = [za.Worker(name, listen=memory_endpoint()) for name in ("good", "bad")]
    for server, value in zip(servers, values[1:], strict=True):
        offer(server, value)
    good, bad = servers
    async with good, bad, za.Worker("trainer") as trainer:
        remotes = [await trainer.connect(server.endpoints[0]) for server in servers]
        rrefs = [await remote.call("value") for remote in remotes]
        yield Setting(trainer, servers, remotes, values, [values[0], *rrefs])
