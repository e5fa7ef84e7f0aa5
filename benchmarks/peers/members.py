"""A chain of processes over this package: what is the same with the engine and by hand."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

import zmq_autograd as za
from peers.model import Model, Part
from peers.steps import Trainer, answer_commands


class Member:
    """One process of the chain: its part of the model, and the next process if there is one."""

    part: Part
    following: za.RemoteWorker

    def __init__(self, worker: za.Worker) -> None:
        self.worker = worker
        for function in (self.link, self.prepare, self.use_gradients, self.differences):
            worker.register(function)

    @property
    def is_last(self) -> bool:
        return self.part.index == self.part.workers

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients that the last pass left in this process."""
        raise NotImplementedError

    async def link(self, endpoints: list[str]) -> None:
        """Connect each process to the next one."""
        if endpoints:
            self.following = await self.worker.connect(endpoints[0])
            await self.following.call("link", endpoints[1:])

    async def start(self, model: Model, workers: int) -> None:
        """Give each process its part, this one being the trainer."""
        await self.prepare(astuple(model), 0, workers)

    async def prepare(self, model: tuple[int, ...], index: int, workers: int) -> None:
        self.part = Part(Model(*model), index, workers)
        if not self.is_last:
            await self.following.call("prepare", model, index + 1, workers)

    async def use_gradients(self) -> int:
        count = len(self.gradients())
        return count if self.is_last else count + await self.following.call("use_gradients")

    async def differences(self) -> list[float]:
        own = [self.part.difference(self.gradients())]
        return own if self.is_last else own + await self.following.call("differences")


def run_member(
    make_member: Callable[[za.Worker], Any], make_trainer: Callable[[Any], Trainer]
) -> None:
    """Be the process that the command line says: a worker of the chain, or its trainer."""
    torch.set_num_threads(1)
    role, arguments = sys.argv[1], sys.argv[3:]
    if role == "worker":
        asyncio.run(_serve(make_member, f"member{arguments[1]}"))
    else:
        asyncio.run(_train(make_member, make_trainer, arguments[1:]))


async def _serve(make_member: Callable[[za.Worker], Any], name: str) -> None:
    async with za.Worker(name, listen="tcp://127.0.0.1:0") as worker:
        make_member(worker)
        print(f"ready {worker.endpoints[0]}", flush=True)
        await worker.serve_forever()


async def _train(
    make_member: Callable[[za.Worker], Any],
    make_trainer: Callable[[Any], Trainer],
    endpoints: list[str],
) -> None:
    async with za.Worker("trainer") as worker:
        member = make_member(worker)
        await member.link(endpoints)
        await answer_commands(make_trainer(member))
