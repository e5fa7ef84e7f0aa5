"""What both interpreters share: one run's leaves, slots and record, and the steps of one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor

from tests.programs import functions
from tests.programs.program import (
    Binary,
    Constant,
    Custom,
    Detach,
    Halves,
    Hook,
    InPlace,
    Keep,
    Load,
    LocalStep,
    Mix,
    Program,
    Root,
    Unary,
    UseLeaf,
    leaf_site,
)
from tests.programs.record import LEAF_ACCUMULATED, LEAF_HOOK, Record

SIZE: Final = 4
"""Elements of each tensor."""

UNARY: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "sin": torch.sin,
    "tanh": torch.tanh,
    "scale": lambda a: a * -0.7,
    "flip": lambda a: a.flip(0),
}
BINARY: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "add": torch.add,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b.tanh(),
}
SAVING_NOTHING: Final = frozenset(("flip", "add", "sub"))
"""Kinds whose nodes save no tensors, so that they may run again in a pass that freed others."""

IN_PLACE: Final = ("mul_", "tanh_", "add_")


@dataclass
class Frame:
    """A body that is being run.

    Attributes:
        worker: who runs it.
        trainer: whose context it is in.
        tag: tells it from every other body of the run, repetitions included.
        registers: its tensors so far.
    """

    worker: int
    trainer: int
    tag: str
    registers: list[Tensor] = field(default_factory=list)

    def get(self, registers: Iterable[int]) -> list[Tensor]:
        """Return the tensors in `registers`."""
        return [self.registers[register] for register in registers]


class Run:
    """One run of a program: fresh leaves, empty slots, nothing recorded."""

    def __init__(self, program: Program) -> None:
        """Make the leaves and register their hooks."""
        self.program = program
        self.record = Record()
        self.slots: dict[tuple[int, int], Tensor] = {}
        generator = torch.Generator().manual_seed(program.seed)
        self.leaves = [
            torch.randn(SIZE, dtype=torch.float64, generator=generator).requires_grad_()
            for _ in program.leaves
        ]
        for index, (leaf, tensor) in enumerate(zip(program.leaves, self.leaves, strict=True)):
            if leaf.hook is not None:
                key = (LEAF_HOOK, leaf_site(index))
                functions.add_hook(tensor, leaf.hook, self.record, key)
            if leaf.counts:
                # No fault is at this site: what an accumulate hook raises does not undo the pass.
                key = (LEAF_ACCUMULATED, leaf_site(len(self.leaves) + index))
                functions.count_accumulations(tensor, self.record, key)

    def step(self, frame: Frame, step: LocalStep) -> None:
        """Run one step in `frame`."""
        _STEPS[type(step)](self, frame, step)


def root_of(frame: Frame, root: Root) -> tuple[Tensor, Tensor | None]:
    """Return a root of a pass and its gradient, which a sum has none of."""
    tensor = frame.registers[root.register]
    if root.is_sum:
        return tensor.sum(), None
    return tensor, _constant(root.register)


def _constant(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, dtype=torch.float64, generator=generator)


def _use_leaf(run: Run, frame: Frame, step: UseLeaf) -> None:
    frame.registers.append(run.leaves[step.leaf])


def _make_constant(run: Run, frame: Frame, step: Constant) -> None:
    frame.registers.append(_constant(step.seed))


def _unary(run: Run, frame: Frame, step: Unary) -> None:
    frame.registers.append(UNARY[step.kind](frame.registers[step.a]))


def _binary(run: Run, frame: Frame, step: Binary) -> None:
    frame.registers.append(BINARY[step.kind](frame.registers[step.a], frame.registers[step.b]))


def _mix(run: Run, frame: Frame, step: Mix) -> None:
    terms = frame.get(step.registers)
    total = torch.zeros(SIZE, dtype=torch.float64)
    for number, term in enumerate(terms):
        total = total + term * (1 + 0.1 * number)
    frame.registers.append(total)


def _halves(run: Run, frame: Frame, step: Halves) -> None:
    first, second = frame.registers[step.a].chunk(2)
    frame.registers += [first.repeat(2), second.repeat(2)]


def _custom(run: Run, frame: Frame, step: Custom) -> None:
    a, b = frame.get((step.a, step.b))
    frame.registers += functions.apply(step.kind, run.record, (frame.tag, step.site), a, b)


def _detach(run: Run, frame: Frame, step: Detach) -> None:
    frame.registers.append(frame.registers[step.a].detach())


def _in_place(run: Run, frame: Frame, step: InPlace) -> None:
    a, b = frame.get((step.a, step.b))
    if step.kind == "mul_":
        a.mul_(1.5)
    elif step.kind == "tanh_":
        a.tanh_()
    else:
        a.add_(b)


def _hook(run: Run, frame: Frame, step: Hook) -> None:
    tensor = frame.registers[step.a]
    if tensor.requires_grad:
        functions.add_hook(tensor, step.kind, run.record, (frame.tag, step.site))


def _keep(run: Run, frame: Frame, step: Keep) -> None:
    run.slots[frame.trainer, step.slot] = frame.registers[step.a]


def _load(run: Run, frame: Frame, step: Load) -> None:
    frame.registers.append(run.slots[frame.trainer, step.slot])


_STEPS: Final = cast(
    dict[type[LocalStep], Callable[[Run, Frame, Any], None]],
    {
        UseLeaf: _use_leaf,
        Constant: _make_constant,
        Unary: _unary,
        Binary: _binary,
        Mix: _mix,
        Halves: _halves,
        Custom: _custom,
        Detach: _detach,
        InPlace: _in_place,
        Hook: _hook,
        Keep: _keep,
        Load: _load,
    },
)
