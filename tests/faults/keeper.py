"""A worker in a process of its own that keeps state for others, and trains with what they keep.

    keeper.py trainer --listen ENDPOINT --with ENDPOINT ENDPOINT

Prints what `learner` prints.  The trainer holds a module of the first of the others and an
optimizer of its parameters, makes values on the second in each step, and passes them around.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
from collections import Counter
from typing import Any, Final

import psutil
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.faults.learner import hooked, serve

STEP_SECONDS: Final = 20.0
"""What a step may take that is not meant to run out of time, and a worker to be there again."""

SHORT_SECONDS: Final = 0.05
"""What a call may take that is."""

FAILURES: Final = {
    0: "forward",
    10: "backward",
    20: "method",
    30: "optimizer",
    40: "state",
    50: "deadline",
}
"""By number of a step, modulo `FAILURE_PERIOD`: what fails in it, one step in ten."""

FAILURE_PERIOD: Final = 60

RATE: Final = 1e-3


class Scale(nn.Module):
    """A module that peers make for a step."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.register_buffer("ballast", torch.zeros(5_000))  # a leak of these is seen

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Wayward(torch.optim.SGD):
    """Stochastic gradient descent that fails if its group says so."""

    def __init__(self, params: Any, lr: float, fails: bool = False) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.setdefault("fails", fails)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.param_groups[0]["fails"]:
            raise ZeroDivisionError("in the optimizer")
        super().step()


class Keeper:
    """What each of them offers, and the trainer's state."""

    def __init__(self, worker: za.Worker, others: list[str]) -> None:
        self._worker = worker
        self._others = others
        self._net: za.RemoteModule | None = None
        self._optimizer: Any = None
        self._bias = nn.Parameter(torch.zeros(3))
        self._number = 0
        worker.register(nn.Linear(3, 3), "net", expose="module")
        worker.register(Scale, expose="module")
        worker.register(Wayward)
        for function in (
            self.through,
            self.pass_on,
            self.fetch,
            self.wait,
            self.step_many,
            self.number,
            self.let_go,
            self.resident_bytes,
        ):
            worker.register(function)

    # --- for others ------------------------------------------------------------------------------

    async def through(self, scale: za.RRef, x: Tensor, failing: str) -> Any:
        """Have another's module scale `x`, and double the result."""
        if failing == "forward":
            raise ZeroDivisionError("in forward")
        y = await scale.call("load_state_dict" if failing == "method" else "forward", x)
        return hooked(2 * y, _fail) if failing == "backward" else 2 * y

    async def pass_on(self, rref: za.RRef, endpoint: str) -> Any:
        """Have the worker at `endpoint` fetch a value of yet another one; return both RRefs."""
        other = await self._worker.connect(endpoint, timeout=STEP_SECONDS)
        value = await other.call("fetch", rref)
        return [rref, {"value": self._worker.rref(value)}]

    async def fetch(self, rref: za.RRef) -> Any:
        return await rref.to_here()

    async def wait(self, rref: za.RRef) -> None:
        """Hold an RRef, and never return."""
        await asyncio.Event().wait()

    async def number(self) -> int:
        """Return the number of the step that runs."""
        return self._number

    async def let_go(self) -> None:
        """Drop the module and the optimizer."""
        self._net = self._optimizer = None
        gc.collect()

    async def resident_bytes(self) -> int:
        """Return what this process takes in memory, without what is garbage."""
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    # --- training --------------------------------------------------------------------------------

    async def step_many(self, start: int, count: int) -> dict[str, int]:
        """Make so many steps from number `start`; return how many failed, by what did."""
        failed: Counter[str] = Counter()
        for self._number in range(start, start + count):
            failing = FAILURES.get(self._number % FAILURE_PERIOD, "")
            try:
                await self._step(self._number, failing)
            except za.WorkerLost:
                failed["lost"] += 1
            except (za.RemoteError, za.DeadlineExceeded, za.PartialStepError) as error:
                lost = isinstance(error, za.PartialStepError) and any(
                    isinstance(cause, za.WorkerLost) for cause in error.causes.values()
                )
                failed["lost" if lost else failing or f"nothing, but {error}"] += 1
        return dict(failed)

    async def _step(self, number: int, failing: str) -> None:
        first, second = [
            await self._worker.connect(endpoint, timeout=STEP_SECONDS) for endpoint in self._others
        ]
        net, optimizer = await self._held(first)
        factor = 2.0 + number % 3
        scale = await second.remote("Scale", factor)
        x = torch.full((1, 3), float(number % 7))
        async with self._worker.context() as ctx:
            y = await first.call("through", scale, await net(x) + self._bias, failing)
            await ctx.backward(y.sum())
            gradients = await net.gradients(ctx)
            assert torch.equal(gradients["weight"], 2 * factor * x.expand(3, 3))
            assert torch.equal(ctx.gradients()[self._bias], torch.full((3,), 2 * factor))
            optimizer.param_groups[0]["fails"] = failing == "optimizer"
            await optimizer.step(ctx)
        await self._pass_around(number, first)
        if number % 5 == 0:
            await self._use(scale, factor, failing)
        if failing == "deadline":
            await second.call("wait", scale, timeout=SHORT_SECONDS)

    async def _held(self, first: za.RemoteWorker) -> tuple[za.RemoteModule, Any]:
        """Return a module of `first` and an optimizer of its parameters and of one of our own."""
        if self._net is None or self._net.owner is not first:
            self._net = await first.module("net", timeout=STEP_SECONDS)
            parameters = [*self._net.parameters(), self._bias]
            self._optimizer = await za.DistributedOptimizer.create(Wayward, parameters, lr=RATE)
        return self._net, self._optimizer

    async def _pass_around(self, number: int, first: za.RemoteWorker) -> None:
        """Have a value that lives here travel by way of both others."""
        mine = self._worker.rref([torch.full((1_000,), float(number))])
        again, made = await first.call("pass_on", mine, self._others[1])
        assert again.is_owner
        (value,) = await made["value"].to_here()
        assert torch.equal(value, torch.full((1_000,), float(number)))

    async def _use(self, scale: za.RRef, factor: float, failing: str) -> None:
        """Use a module by its RRef."""
        module = await za.RemoteModule.from_rref(scale, timeout=STEP_SECONDS)
        state = await module.state_dict()
        assert state["factor"] == factor
        if failing == "state":
            state["other"] = state["ballast"]
        await module.load_state_dict(state)


def _fail(_: Tensor) -> None:
    raise ZeroDivisionError("in backward")


async def main() -> None:
    torch.set_num_threads(1)  # there are enough processes for the processors
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--with", nargs="*", default=[], dest="others", help="whom it trains with")
    arguments = parser.parse_args()
    worker = za.Worker(arguments.name, arguments.listen, drain=1.0)
    Keeper(worker, arguments.others)
    await serve(worker)


if __name__ == "__main__":
    asyncio.run(main())
