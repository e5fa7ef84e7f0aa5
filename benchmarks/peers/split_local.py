"""One process that has all stages: plain torch, nothing to send."""

from __future__ import annotations

import asyncio
from time import perf_counter

from torch import Tensor

from peers.model import Model, Part, loss_of
from peers.steps import Times, answer_commands


class Local:
    async def prepare(self, model: Model, workers: int) -> None:
        self.parts = [Part(model, index, workers) for index in range(workers + 1)]

    async def step(self, x: Tensor, workers: int, use_gradients: bool) -> Times:
        start = perf_counter()
        y = x
        for part in self.parts:
            y = part.stage(y)
        loss = loss_of(y)
        forward = perf_counter()
        loss.backward()
        backward = perf_counter()
        self._gradients = [{p: p.grad for p in part.parameters} for part in self.parts]
        for part in self.parts:
            part.stage.zero_grad()
        return Times(start, forward, backward, perf_counter())

    async def differences(self, x: Tensor, workers: int) -> list[float]:
        await self.step(x, workers, False)
        pairs = zip(self.parts, self._gradients, strict=True)
        return [part.difference(gradients) for part, gradients in pairs]


if __name__ == "__main__":
    asyncio.run(answer_commands(Local()))
