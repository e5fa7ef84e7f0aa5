"""torch.distributed.rpc and torch.distributed.autograd over TensorPipe, with their defaults."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from dataclasses import astuple
from time import perf_counter

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch import Tensor

from peers.model import Model, Part, loss_of
from peers.steps import Times, answer_commands

parts: list[Part] = []


def name(index: int) -> str:
    return f"member{index}"


def prepare(model: tuple[int, ...], index: int, workers: int) -> None:
    parts[:] = [Part(Model(*model), index, workers)]
    if index < workers:
        rpc.rpc_sync(name(index + 1), prepare, (model, index + 1, workers))


def forward(x: Tensor) -> Tensor:
    (part,) = parts
    y = part.stage(x)
    return rpc.rpc_sync(name(part.index + 1), forward, (y,)) if part.index < part.workers else y


def use_gradients(context_id: int) -> int:
    (part,) = parts
    count = len(dist_autograd.get_gradients(context_id))
    if part.index < part.workers:
        count += rpc.rpc_sync(name(part.index + 1), use_gradients, (context_id,))
    return count


def differences(context_id: int) -> list[float]:
    (part,) = parts
    own = [part.difference(dist_autograd.get_gradients(context_id))]
    if part.index < part.workers:
        own += rpc.rpc_sync(name(part.index + 1), differences, (context_id,))
    return own


class Torch:
    async def prepare(self, model: Model, workers: int) -> None:
        prepare(astuple(model), 0, workers)

    async def step(self, x: Tensor, workers: int, use: bool) -> Times:
        start = perf_counter()
        with dist_autograd.context() as context_id:
            loss = loss_of(forward(x))
            called = perf_counter()
            dist_autograd.backward(context_id, [loss])
            if use:
                use_gradients(context_id)
            done = perf_counter()
        return Times(start, called, done, perf_counter())

    async def differences(self, x: Tensor, workers: int) -> list[float]:
        with dist_autograd.context() as context_id:
            dist_autograd.backward(context_id, [loss_of(forward(x))])
            return differences(context_id)


def join(index: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    # A file to meet at: no port has to be guessed free.
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{directory}/split_torch")
    rpc.init_rpc(name(index), rank=index, world_size=world_size, rpc_backend_options=options)


def main() -> None:
    role, directory, size = sys.argv[1:4]
    if role == "worker":
        print("ready", flush=True)  # `init_rpc` returns only once all are there
        join(int(sys.argv[4]), int(size) + 1, directory)
        threading.Event().wait()
    else:
        join(0, int(size) + 1, directory)
        asyncio.run(answer_commands(Torch()))
        os._exit(0)  # a shutdown would wait for the workers, which are ended by a signal


if __name__ == "__main__":
    main()
