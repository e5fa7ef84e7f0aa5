"""pyzmq's own asyncio layer, DEALER to ROUTER: what asyncio programs get without this package."""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter

import torch
import zmq
import zmq.asyncio
from torch import Tensor

from peers.measure import answer_commands
from peers.plain_pyzmq import COPY_BELOW, HEADER


class PyzmqAsyncio:
    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.connect(endpoint)

    async def send(self, tensor: Tensor) -> None:
        frames = [HEADER, memoryview(tensor.numpy())]
        await self.socket.send_multipart(frames, copy=tensor.nbytes < COPY_BELOW)

    async def receive(self) -> Tensor:
        _, body = await self.socket.recv_multipart(copy=False)
        return torch.frombuffer(body.buffer, dtype=torch.float64)

    async def echo(self, tensor: Tensor) -> Tensor:
        await self.send(tensor)
        return await self.receive()

    async def flood(self, tensor: Tensor, in_flight: int, until: float) -> int:
        for _ in range(in_flight):
            await self.send(tensor)
        calls = 0
        while perf_counter() < until:
            await self.receive()
            await self.send(tensor)
            calls += 1
        for _ in range(in_flight):
            await self.receive()
        return calls + in_flight


async def serve() -> None:
    socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"ready tcp://127.0.0.1:{port}", flush=True)
    while True:
        frames = await socket.recv_multipart(copy=False)
        await socket.send_multipart(frames, copy=len(frames[-1]) < COPY_BELOW)


async def main() -> None:
    if sys.argv[1] == "server":
        await serve()
    else:
        await answer_commands(PyzmqAsyncio(sys.argv[3]))


if __name__ == "__main__":
    asyncio.run(main())
