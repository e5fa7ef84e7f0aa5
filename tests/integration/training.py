"""One model over two workers and in one process, for tests that compare optimizers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint


class Model:
    """Three linear layers and a scale; or what stands for them here of another worker's.

    Attributes:
        first: a module of the trainer's.
        second: a module of the server's.
        scale: a tensor of the server's, by which the output is multiplied.
        unused: another one, which is never used.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(4, 5, dtype=torch.float64)
        self.second = nn.Linear(5, 3, dtype=torch.float64)
        self.scale = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
        self.unused = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double())

    def parameters(self) -> list[Tensor]:
        """Return all of them, those of both workers mixed."""
        weight, bias = self.first.parameters()
        return [weight, *self.second.parameters(), self.scale, bias, self.unused]

    def tail(self, x: Tensor) -> Tensor:
        """Compute what the server does."""
        output: Tensor = self.second(x).tanh() @ self.scale
        return output


def batch(number: int) -> Tensor:
    """Return the input of one step."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def loss_of(output: Tensor) -> Tensor:
    loss: Tensor = (output - 1).square().mean()
    return loss


@dataclass(frozen=True)
class Setting:
    """A trainer and a server that have the model between them.

    Attributes:
        trainer: has the first layer.
        server: has the rest.
        remote: the server as the trainer sees it.
        model: the model itself, to look at.
        params: its parameters as the trainer has them, in the order of ``model.parameters()``.
    """

    trainer: za.Worker
    server: za.Worker
    remote: za.RemoteWorker
    model: Model
    params: list[Any]

    async def forward(self, number: int) -> Tensor:
        """Return the loss of one step."""
        hidden = self.model.first(batch(number))
        return loss_of(await self.remote.call("tail", hidden, timeout=DEADLINE))

    async def step(self, optimizer: za.DistributedOptimizer, number: int) -> float:
        """Train one step; return its loss."""
        async with self.trainer.context() as ctx:
            loss = await self.forward(number)
            await ctx.backward(loss)
            await optimizer.step(ctx, timeout=DEADLINE)
        return loss.item()


@asynccontextmanager
async def setting(*registered: Any) -> AsyncIterator[Setting]:
    """Run a trainer and a server; `registered` are classes that the server offers."""
    model = Model()
    server = za.Worker("server", listen=memory_endpoint())
    server.register(model.tail, "tail")
    server.register(model.second, "second", expose="module")
    server.register(lambda: (server.rref(model.scale), server.rref(model.unused)), "tensors")
    for kind in registered:
        server.register(kind)
    async with server, za.Worker("trainer") as trainer:
        remote = await trainer.connect(server.endpoints[0], timeout=DEADLINE)
        second = await remote.module("second")
        scale, unused = await remote.call("tensors")
        weight, bias = model.first.parameters()
        params = [weight, *second.parameters(), scale, bias, unused]
        yield Setting(trainer, server, remote, model, params)


class Reference:
    """The same training in one process, with torch alone."""

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        """Train with the optimizer that `make` makes of the parameters."""
        self.model = Model()
        self.optimizer = make(self.model.parameters())

    def backward(self, number: int) -> float:
        """Leave the gradients of one step in the parameters; return its loss."""
        self.optimizer.zero_grad()
        loss = loss_of(self.model.tail(self.model.first(batch(number))))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def step(self, number: int) -> float:
        """Train one step; return its loss."""
        loss = self.backward(number)
        self.optimizer.step()
        return loss

    def check(self, model: Model) -> None:
        """Raise AssertionError unless `model` has the same parameters, bit for bit."""
        for mine, other in zip(self.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other, mine, rtol=0, atol=0)


def check_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise AssertionError unless two state dicts of optimizers are the same, bit for bit."""
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert found["state"][number].keys() == state.keys()
        for key, value in state.items():
            other = found["state"][number][key]
            if isinstance(value, Tensor):
                torch.testing.assert_close(other, value, rtol=0, atol=0)
            else:
                assert other == value
                assert type(other) is type(value)
