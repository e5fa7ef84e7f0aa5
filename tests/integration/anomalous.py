"""A worker in a process of its own, whose stages go wrong in backward.

    python -m tests.integration.anomalous [anomaly | nan]

Torch's anomaly mode belongs to a process: here it is off, or on with ``anomaly``, or on and looking
for NaN with ``nan``.  Prints its endpoint, and leaves when its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import zmq_autograd as za


class Raising(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("no gradient of that")


def root(x: Tensor) -> Tensor:
    return x.sqrt()  # where NaN come from


def rooted(x: Tensor) -> Tensor:
    return root(x).sum()


def raising(x: Tensor) -> Any:
    return Raising.apply(x * 2)  # type: ignore[no-untyped-call]  # where it is refused


async def root_in_steps(x: Tensor) -> Tensor:
    y = await za.compute(root, x * 1)
    await asyncio.sleep(0)
    return y * 2


async def pass_on(function: str, x: Tensor) -> Any:
    """Call back to whoever called."""
    peer = za.current_peer()
    assert peer is not None
    return await peer.call(function, x)


async def own_pass(x: Tensor) -> None:
    """Run a pass of the caller's context from here."""
    context = za.current_context()
    assert context is not None
    await context.backward(root(x).sum())


def switch() -> list[bool]:
    return [torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()]


STAGES = (root, rooted, raising, root_in_steps, pass_on, own_pass, switch)


async def main(mode: str) -> None:
    torch.set_num_threads(1)
    if mode:
        torch.autograd.set_detect_anomaly(True, check_nan=mode == "nan")
    async with za.Worker("bob", listen="tcp://127.0.0.1:0") as worker:
        for stage in STAGES:
            worker.register(stage)
        print(worker.endpoints[0], flush=True)  # noqa: T201  # whoever started this waits for it
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main("".join(sys.argv[1:])))
