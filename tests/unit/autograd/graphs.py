"""Random graphs of one worker: built with received tensors, and as one process would."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zmq_autograd.autograd.functions import ReceiveFunction

CONTEXT = 7
SHAPE = 3


class Cube(torch.autograd.Function):
    """A custom Function that counts how often its backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Counter[str]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.counts = counts
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.counts["cube"] += 1
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad, None


@dataclass
class Graph:
    """One graph.

    Attributes:
        leaves: its leaves; of a local graph, those in the place of received tensors come last.
        receives: where it received tensors.
        outputs: what gradients may flow into.
        counts: how often each hook and custom Function ran.
    """

    leaves: list[Tensor] = field(default_factory=list)
    receives: list[ReceiveFunction] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def build(seed: int, *, receives: bool) -> Graph:
    """Return the graph that `seed` stands for, with receive functions or with leaves instead."""
    rng = random.Random(seed)
    values = torch.Generator().manual_seed(seed)
    graph = Graph()
    tensors = []
    for number in range(rng.randint(1, 3) + rng.randint(0, 3)):
        tensor = torch.randn(SHAPE, dtype=torch.float64, generator=values).requires_grad_()
        is_leaf = number == 0 or rng.random() < 0.5
        if is_leaf or not receives:
            graph.leaves.append(tensor)
            # As if it had been computed elsewhere: hooks on it are on no leaf then.
            tensors.append(tensor if is_leaf else tensor * 1.0)
        else:
            receive = ReceiveFunction(number, None, CONTEXT)
            receive.attach([tensor])
            graph.receives.append(receive)
            tensors.append(tensor)
    for tensor in tensors:
        hook(graph, rng, tensor)
    for _ in range(rng.randint(1, 14)):
        a, b = rng.choice(tensors), rng.choice(tensors)
        tensors.append(rng.choice(OPERATIONS)(a, b, graph.counts))
        hook(graph, rng, tensors[-1])
    graph.outputs = [rng.choice(tensors) for _ in range(rng.randint(1, 4))]
    return graph


OPERATIONS: list[Callable[[Tensor, Tensor, Counter[str]], Tensor]] = [
    lambda a, b, counts: a + b,
    lambda a, b, counts: a * b,
    lambda a, b, counts: torch.sin(a),
    lambda a, b, counts: Cube.apply(a, counts),  # type: ignore[no-untyped-call]
    lambda a, b, counts: torch.stack([a, b, a]).sum(0),
    lambda a, b, counts: a.unbind(0)[0] * b,
]


def hook(graph: Graph, rng: random.Random, tensor: Tensor) -> None:
    """Put a hook, linear or not, on three tensors in ten."""
    if rng.random() < 0.3:
        name = f"hook {len(graph.counts)} {rng.random()}"
        graph.counts[name] = 0
        is_linear = rng.random() < 0.5

        def change(grad: Tensor) -> Tensor:
            graph.counts[name] += 1
            return 2 * grad if is_linear else grad * grad.abs()

        tensor.register_hook(change)  # type: ignore[no-untyped-call]
