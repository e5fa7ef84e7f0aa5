"""This package: contexts, nested calls and `Context.backward`."""

from __future__ import annotations

from time import perf_counter

from torch import Tensor

import zmq_autograd as za
from peers.members import Member, run_member
from peers.model import Model, loss_of
from peers.steps import Times


class ContextMember(Member):
    """Leaves the way back to the engine."""

    def __init__(self, worker: za.Worker) -> None:
        super().__init__(worker)
        worker.register(self.forward)

    def gradients(self) -> dict[Tensor, Tensor]:
        return za.current_context().gradients()

    async def forward(self, x: Tensor) -> Tensor:
        y = await za.compute(self.part.stage, x)
        return y if self.is_last else await self.following.call("forward", y)


class ThisPackage:
    def __init__(self, member: ContextMember) -> None:
        self.member = member

    async def prepare(self, model: Model, workers: int) -> None:
        await self.member.start(model, workers)

    async def step(self, x: Tensor, workers: int, use_gradients: bool) -> Times:
        start = perf_counter()
        async with self.member.worker.context() as ctx:
            loss = loss_of(await self.member.forward(x))
            forward = perf_counter()
            await ctx.backward(loss)
            if use_gradients:
                await self.member.use_gradients()
            backward = perf_counter()
        return Times(start, forward, backward, perf_counter())

    async def differences(self, x: Tensor, workers: int) -> list[float]:
        async with self.member.worker.context() as ctx:
            await ctx.backward(loss_of(await self.member.forward(x)))
            return await self.member.differences()


if __name__ == "__main__":
    run_member(ContextMember, ThisPackage)
