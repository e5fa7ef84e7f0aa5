"""This package's calls alone: gradients sent back by calls that the program makes itself.

What it does is right for one pass over a chain, and for nothing else: no contexts, no other shapes
of program, nobody is told of a failure.  It is what the engine is measured against: the same
tensors over the same wire, without bookkeeping.
"""

from __future__ import annotations

from time import perf_counter

from torch import Tensor

import zmq_autograd as za
from peers.members import Member, run_member
from peers.model import Model, loss_of
from peers.steps import Times


class HandMember(Member):
    """Keeps from `forward` what it needs in `backward`."""

    def __init__(self, worker: za.Worker) -> None:
        super().__init__(worker)
        worker.register(self.forward)
        worker.register(self.backward)

    def gradients(self) -> dict[Tensor, Tensor]:
        return {p: p.grad for p in self.part.parameters}

    async def forward(self, x: Tensor) -> Tensor:
        self.part.stage.zero_grad()
        self.x = x.requires_grad_(self.part.index > 0)
        self.y = await za.compute(self.part.stage, self.x)
        y = self.y.detach()
        return y if self.is_last else await self.following.call("forward", y)

    async def backward(self, grad: Tensor) -> Tensor | None:
        if not self.is_last:
            grad = await self.following.call("backward", grad)
        await za.compute(self.y.backward, grad)
        return self.x.grad


class ByHand:
    def __init__(self, member: HandMember) -> None:
        self.member = member

    async def prepare(self, model: Model, workers: int) -> None:
        await self.member.start(model, workers)

    async def step(self, x: Tensor, workers: int, use_gradients: bool) -> Times:
        start = perf_counter()
        y = (await self.member.forward(x)).requires_grad_()
        loss = loss_of(y)
        forward = perf_counter()
        loss.backward()
        await self.member.backward(y.grad)
        if use_gradients:
            await self.member.use_gradients()
        backward = perf_counter()
        return Times(start, forward, backward, backward)

    async def differences(self, x: Tensor, workers: int) -> list[float]:
        await self.step(x, workers, False)
        return await self.member.differences()


if __name__ == "__main__":
    run_member(HandMember, ByHand)
