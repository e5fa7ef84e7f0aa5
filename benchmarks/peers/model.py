"""The model that is split: one stage in each process, the same numbers in all implementations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """What one stage computes.

    Attributes:
        batch: rows of the input.
        width: columns of it, and of whatever goes from stage to stage.
        layers: linear layers of a stage; with 0 it only multiplies its input by a parameter.
    """

    batch: int
    width: int
    layers: int


class Scale(nn.Module):
    """An elementwise product: next to nothing to compute for what it has to be sent."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def make_stage(model: Model, index: int) -> nn.Module:
    """Return the stage of process `index`, the trainer being 0."""
    torch.manual_seed(index)
    if model.layers == 0:
        return Scale(model.width)
    layers = [(nn.Linear(model.width, model.width), nn.Tanh()) for _ in range(model.layers)]
    return nn.Sequential(*(module for pair in layers for module in pair))


def make_input(model: Model) -> Tensor:
    torch.manual_seed(1000)
    return torch.rand(model.batch, model.width)


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


class Part:
    """One process's part of the model.

    Attributes:
        index: which stage it is, the trainer's being 0.
        workers: number of stages beyond the trainer's.
    """

    def __init__(self, model: Model, index: int, workers: int) -> None:
        self.model, self.index, self.workers = model, index, workers
        self.stage = make_stage(model, index)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.stage.parameters())

    def difference(self, gradients: Mapping[Tensor, Tensor]) -> float:
        """Return the largest difference from the gradients that one process computes.

        It is relative to the largest gradient; infinite where one is no number, or where there
        are others than there should be.
        """
        expected = reference(self.model, self.workers)[self.index]
        if set(gradients) != set(self.parameters):
            return float("inf")
        pairs = zip(self.parameters, expected, strict=True)
        each = [(gradients[p] - grad).abs().max() / grad.abs().max() for p, grad in pairs]
        worst = float(torch.stack(each).max())
        return float("inf") if math.isnan(worst) else worst


def reference(model: Model, workers: int) -> list[list[Tensor]]:
    """Return the gradients of every stage's parameters, computed here and in one graph."""
    stages = [make_stage(model, index) for index in range(workers + 1)]
    y = make_input(model)
    for stage in stages:
        y = stage(y)
    loss_of(y).backward()
    return [[p.grad for p in stage.parameters()] for stage in stages]
