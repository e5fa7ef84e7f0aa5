"""Runs a random program in one process: a call is a function call, a pass is torch's own backward.

What differs between a function and a worker is that a worker gets copies: what is sent is cloned,
each tensor of a message once.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import torch
from torch import Tensor

from tests.programs.local import Frame, Run, root_of
from tests.programs.program import (
    Backward,
    Call,
    Collect,
    Finish,
    Gather,
    Outcome,
    Pass,
    Program,
    Root,
    Start,
    Step,
)
from tests.programs.record import FAULT, FREED, Record


def run_in_one_process(program: Program) -> tuple[Record, dict[str, Frame]]:
    """Run `program`, one trainer after the other; return what was seen, and the bodies by tag."""
    run = Run(program)
    frames: dict[str, Frame] = {}
    for trainer, body in enumerate(program.trainers):
        context = OneProcess(run, trainer)
        context.run_trainer(body)
        frames |= context.frames
    return run.record, frames


def tag_of(trainer: int) -> str:
    """Return the tag of a trainer's own body."""
    return f"trainer {trainer}"


def tag_within(tag: str, call: Call, attempt: int) -> str:
    """Return the tag of the body that `call`, made by the body `tag`, runs that time."""
    return f"{tag}/{call.number}.{attempt}"


class OneProcess:
    """One trainer's context, in one process.

    Attributes:
        frames: every body that has run, by its tag.
    """

    def __init__(self, run: Run, trainer: int) -> None:
        """Make a context in which nothing has run."""
        self._run = run
        self._trainer = trainer
        self._gradients: list[Tensor | None] = [None] * len(run.leaves)
        self.frames: dict[str, Frame] = {}
        self._started: dict[tuple[str, int], list[Tensor]] = {}

    def run_trainer(self, body: tuple[Step, ...]) -> None:
        """Run a trainer's own body."""
        frame = Frame(self._trainer, self._trainer, tag_of(self._trainer))
        self._run_body(frame, body)
        self._collect(frame)

    def _run_body(self, frame: Frame, body: tuple[Step, ...]) -> None:
        self.frames[frame.tag] = frame
        for step in body:
            match step:
                case Call():
                    frame.registers += self._call(frame, step)
                case Gather():
                    for call in step.calls:
                        frame.registers += self._call(frame, call)
                case Start():
                    self._started[frame.tag, step.call.number] = self._call(frame, step.call)
                case Finish():
                    results = self._started.pop((frame.tag, step.number))
                    frame.registers += [] if step.cancels else results
                case Backward():
                    for one in step.passes:
                        self._run_pass(frame, one)
                case Collect():
                    self._collect(frame)
                case _:
                    self._run.step(frame, step)

    def _call(self, frame: Frame, call: Call) -> list[Tensor]:
        for attempt in count():
            callee = Frame(call.worker, self._trainer, tag_within(frame.tag, call, attempt))
            callee.registers = _received(frame.get(call.args))
            with torch.set_grad_enabled(torch.is_grad_enabled() and not call.no_grad):
                self._run_body(callee, call.body)
            if attempt == call.failures:
                break
        return _received(callee.get(call.returns)) if call.outcome is Outcome.TENSORS else []

    def _run_pass(self, frame: Frame, one: Pass) -> None:
        for leaf in self._run.leaves:
            leaf.grad = None
        if one.fails:
            self._run_failing_pass(frame, one)
            return
        roots, grads = roots_of(frame, one.roots)
        torch.autograd.backward(roots, grads, retain_graph=one.retain_graph)
        for index, leaf in enumerate(self._run.leaves):
            self._gradients[index] = _sum(self._gradients[index], leaf.grad)

    def _run_failing_pass(self, frame: Frame, one: Pass) -> None:
        """Show that the pass raises; it leaves nothing, as one that is aborted."""
        record = self._run.record
        counts = record.counts()
        roots, grads = roots_of(frame, one.roots)
        text = FREED if one.meets_freed else FAULT
        error: RuntimeError | None = None
        with record.switched_on(one.fault):
            try:
                torch.autograd.backward(roots, grads, retain_graph=one.retain_graph)
            except RuntimeError as raised:
                error = raised
        assert text in str(error)
        del error  # and what it holds on to
        record.cut({key: counts.get(key, 0) for key in record.counts()})

    def _collect(self, frame: Frame) -> None:
        self._run.record.collected[frame.tag].append(tuple(self._gradients))


def roots_of(frame: Frame, roots: Iterable[Root]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the roots of a pass, and their gradients."""
    pairs = [root_of(frame, root) for root in roots]
    return [tensor for tensor, _ in pairs], [grad for _, grad in pairs]


def _received(tensors: list[Tensor]) -> list[Tensor]:
    """Return what arrives where `tensors` are sent in one message, whatever the grad mode is."""
    with torch.enable_grad():
        copies = {id(tensor): tensor.clone() for tensor in tensors}
    return [copies[id(tensor)] for tensor in tensors]


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad
