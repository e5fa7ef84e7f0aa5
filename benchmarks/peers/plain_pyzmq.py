"""pyzmq alone, DEALER to ROUTER, blocking sockets: the same bytes and nothing around them."""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter

import torch
import zmq
from torch import Tensor

from peers.measure import answer_commands

HEADER = b"echo"
COPY_BELOW = 64 * 1024  # handing small buffers over without a copy costs more than the copy


class PlainPyzmq:
    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.connect(endpoint)

    def send(self, tensor: Tensor) -> None:
        self.socket.send(HEADER, zmq.SNDMORE)
        self.socket.send(memoryview(tensor.numpy()), copy=tensor.nbytes < COPY_BELOW)

    def receive(self) -> Tensor:
        self.socket.recv()
        return torch.frombuffer(self.socket.recv(copy=False).buffer, dtype=torch.float64)

    async def echo(self, tensor: Tensor) -> Tensor:
        self.send(tensor)
        return self.receive()

    async def flood(self, tensor: Tensor, in_flight: int, until: float) -> int:
        for _ in range(in_flight):
            self.send(tensor)
        calls = 0
        while perf_counter() < until:
            self.receive()
            self.send(tensor)
            calls += 1
        for _ in range(in_flight):
            self.receive()
        return calls + in_flight


def serve() -> None:
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"ready tcp://127.0.0.1:{port}", flush=True)
    while True:
        identity, header, body = socket.recv(), socket.recv(), socket.recv(copy=False)
        socket.send(identity, zmq.SNDMORE)
        socket.send(header, zmq.SNDMORE)
        socket.send(body, copy=len(body) < COPY_BELOW)


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve()
    else:
        asyncio.run(answer_commands(PlainPyzmq(sys.argv[3])))
