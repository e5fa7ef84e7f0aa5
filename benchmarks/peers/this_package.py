"""This package: `call` of a registered function that returns its input.

As `async def` the function runs on the server's event loop, as the others' echo does; as a plain
function it runs in a compute thread, which is what a function that computes should do.
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter

import torch
from torch import Tensor

import zmq_autograd as za
from peers.measure import answer_commands


class ZmqAutograd:
    def __init__(self, remote: za.RemoteWorker, function: str) -> None:
        self.call = remote.function(function)

    async def echo(self, tensor: Tensor) -> Tensor:
        return await self.call(tensor)

    async def flood(self, tensor: Tensor, in_flight: int, until: float) -> int:
        async def one_after_the_other() -> int:
            calls = 0
            while perf_counter() < until:
                await self.call(tensor)
                calls += 1
            return calls

        return sum(await asyncio.gather(*(one_after_the_other() for _ in range(in_flight))))


def make_server() -> za.Worker:
    worker = za.Worker("server", listen="tcp://127.0.0.1:0")

    @worker.register
    async def echo(tensor: Tensor) -> Tensor:
        return tensor

    @worker.register
    def echo_in_thread(tensor: Tensor) -> Tensor:
        return tensor

    return worker


async def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "server":
        async with make_server() as worker:
            print(f"ready {worker.endpoints[0]}", flush=True)
            await worker.serve_forever()
    else:
        endpoint, function = sys.argv[3:]
        async with za.Worker("client") as worker:
            await answer_commands(ZmqAutograd(await worker.connect(endpoint), function))


if __name__ == "__main__":
    asyncio.run(main())
