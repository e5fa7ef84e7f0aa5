"""What all implementations of a split training step share: the trainer's command loop and clock."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from peers.model import Model, make_input

WARM_UP_STEPS = 3
LEAST_STEPS = 3


@dataclass(frozen=True)
class Times:
    """When the parts of one step were over.

    Attributes:
        start: before anything.
        forward: the loss is there.
        backward: `backward` has returned, and gradients were used where that is asked for.
        end: the context is left.
    """

    start: float
    forward: float
    backward: float
    end: float


class Trainer(Protocol):
    async def prepare(self, model: Model, workers: int) -> None:
        """Give the trainer and its chain of `workers` their stages."""

    async def step(self, x: Tensor, workers: int, use_gradients: bool) -> Times:
        """Train one step; with `use_gradients` every worker is asked to read its gradients."""

    async def differences(self, x: Tensor, workers: int) -> list[float]:
        """Take a step, and compare the gradients in each process with those of a single one."""


async def measure(trainer: Trainer, x: Tensor, command: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of a step and its parts, in seconds."""
    times: list[Times] = []
    end = perf_counter() + command["seconds"]
    while len(times) < LEAST_STEPS or perf_counter() < end:
        times.append(await trainer.step(x, command["workers"], command["use_gradients"]))
    return {
        "step": statistics.median(t.end - t.start for t in times),
        "forward": statistics.median(t.forward - t.start for t in times),
        "backward": statistics.median(t.backward - t.forward for t in times),
        "leave": statistics.median(t.end - t.backward for t in times),
        "steps": len(times),
    }


async def answer_commands(trainer: Trainer) -> None:
    """Measure or check what standard input asks for, until it ends."""
    torch.set_num_threads(1)
    prepared = None
    # Read in a thread: between commands the trainer's loop goes on, as a program's would.
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        model, workers = Model(**command["model"]), command["workers"]
        if (model, workers) != prepared:
            await trainer.prepare(model, workers)
            prepared = (model, workers)
            x = make_input(model)
        if command["check"]:
            result: dict[str, Any] = {"differences": await trainer.differences(x, workers)}
        else:
            for _ in range(WARM_UP_STEPS):
                await trainer.step(x, workers, command["use_gradients"])
            gc.collect()
            result = await measure(trainer, x, command)
        print(json.dumps(result), flush=True)
