"""torch.distributed.rpc over TensorPipe, calling a Python function that returns its input."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import deque
from time import perf_counter

import torch
import torch.distributed.rpc as rpc
from torch import Tensor

from peers.measure import answer_commands


def echo(tensor: Tensor) -> Tensor:
    return tensor


class TorchRpc:
    async def echo(self, tensor: Tensor) -> Tensor:
        return rpc.rpc_sync("server", echo, (tensor,))

    async def flood(self, tensor: Tensor, in_flight: int, until: float) -> int:
        futures = deque(rpc.rpc_async("server", echo, (tensor,)) for _ in range(in_flight))
        calls = 0
        while futures:
            futures.popleft().wait()
            calls += 1
            if perf_counter() < until:
                futures.append(rpc.rpc_async("server", echo, (tensor,)))
        return calls


def join(name: str, rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    # A file to meet at: no port has to be guessed free.
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{directory}/torch_rpc")
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


def main() -> None:
    role, directory = sys.argv[1:3]
    if role == "server":
        print("ready", flush=True)  # `init_rpc` returns only once the client is there
        join("server", 0, directory)
        threading.Event().wait()
    else:
        join("client", 1, directory)
        asyncio.run(answer_commands(TorchRpc()))
        os._exit(0)  # a shutdown would wait for the server, which is ended by a signal


if __name__ == "__main__":
    main()
