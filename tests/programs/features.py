"""Which features a program has: what it says, and what its run in one process shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from torch import Tensor

from tests.programs.functions import NONLINEAR
from tests.programs.local import Frame
from tests.programs.program import (
    Backward,
    Call,
    Custom,
    Finish,
    Gather,
    Hook,
    InPlace,
    Keep,
    Load,
    Outcome,
    Pass,
    Program,
    Start,
    Step,
    UseLeaf,
    all_calls,
    all_steps,
    calls_in,
    passes_in,
    registers_made_by,
    registers_read_by,
)
from tests.programs.reference import tag_of, tag_within

FEATURES: Final = (
    "nested call",
    "call back to the caller",
    "call to itself",
    "calls at once",
    "call under way in a pass",
    "state kept between calls",
    "shared subgraph",
    "tied leaf",
    "unused result",
    "outputs of which some are unused",
    "detached result",
    "missing result",
    "failed call",
    "retried call",
    "cancelled call",
    "call under no_grad",
    "computed in threads",
    "same tensor twice in a message",
    "received tensor changed in place",
    "several roots",
    "gradients of roots",
    "several passes",
    "graph retained for another pass",
    "disjoint passes",
    "passes asked for at once",
    "pass from a called worker",
    "passes from several workers at once",
    "fault in backward",
    "fault, then repeated",
    "pass over freed graph",
    "hook on a leaf",
    "hook on a received tensor",
    "hook on another tensor",
    "linear hook",
    "non-linear hook",
    "accumulate hook",
    "custom Function",
    "gradient undefined by a Function",
    "two trainers",
)
"""All features, in the order in which they are shown."""


def features_of(program: Program, frames: dict[str, Frame]) -> set[str]:
    """Return the features that `program` has; `frames` are its bodies as run in one process."""
    found = {"two trainers"} if len(program.trainers) > 1 else set()
    for trainer, body in enumerate(program.trainers):
        found.update(_in_trainer(body))
        bodies = _Bodies(frames)
        bodies.visit(tag_of(trainer), body, args=0, caller=None)
        found |= bodies.found
        for leaf in bodies.leaves:
            found.update(_of_leaf(program, leaf))
    return found


def _in_trainer(body: tuple[Step, ...]) -> Iterator[str]:
    """Yield what the program of one trainer says as a whole."""
    calls = list(all_calls(body))
    passes = list(passes_in(body))
    for call in calls:
        yield from _of_call(call)
        if any(isinstance(step, Backward) for step in call.body):
            yield "pass from a called worker"
        if any(calls_in(call.body)):
            yield "nested call"
    for step in all_steps(body):
        yield from _of_step(step)
    yield from _of_passes(passes)


def _of_call(call: Call) -> Iterator[str]:
    if call.outcome in (Outcome.NONE, Outcome.NUMBER):
        yield "missing result"
    if call.outcome is Outcome.FAILURE:
        yield "failed call"
    elif call.failures:
        yield "retried call"
    if call.no_grad:
        yield "call under no_grad"
    if call.in_threads:
        yield "computed in threads"


def _of_step(step: Step) -> Iterator[str]:
    match step:
        case Gather():
            yield "calls at once"
            if sum(any(passes_in(call.body)) for call in step.calls) > 1:
                yield "passes from several workers at once"
        case Finish(cancels=True):
            yield "cancelled call"
        case InPlace():
            yield "received tensor changed in place"
        case Hook():
            yield "non-linear hook" if step.kind in NONLINEAR else "linear hook"
        case Custom():
            yield "custom Function"
            if step.kind == "block":
                yield "gradient undefined by a Function"
        case Backward() if len(step.passes) > 1:
            yield "passes asked for at once"
        case _:
            return


def _of_passes(passes: list[Pass]) -> Iterator[str]:
    done = [one for one in passes if not one.fails]
    if any(one.fault is not None for one in passes):
        yield "fault in backward"
    if any(one.meets_freed for one in passes):
        yield "pass over freed graph"
    if any(one.fault is not None and one.retain_graph for one in passes):
        yield "fault, then repeated"
    if len(done) > 1:
        yield "several passes"
    if any(one.retain_graph for one in done[:-1]):
        yield "graph retained for another pass"
    if sum(not one.retain_graph for one in done) > 1:
        yield "disjoint passes"
    if any(len(one.roots) > 1 for one in done):
        yield "several roots"
    if any(not root.is_sum for one in done for root in one.roots):
        yield "gradients of roots"


def _of_leaf(program: Program, leaf: int) -> Iterator[str]:
    if program.leaves[leaf].counts:
        yield "accumulate hook"
    kind = program.leaves[leaf].hook
    if kind is not None:
        yield "hook on a leaf"
        yield "non-linear hook" if kind in NONLINEAR else "linear hook"


class _Bodies:
    """Walks the bodies of one trainer with the tensors that they had."""

    def __init__(self, frames: dict[str, Frame]) -> None:
        self._frames = frames
        self._kept_by: dict[int, str] = {}  # by slot, the tag of the body
        self._messages_with: Counter[int] = Counter()  # by id of the tensor
        self._user_of: dict[int, str] = {}  # by leaf, the tag of a body
        self.found: set[str] = set()
        self.leaves: set[int] = set()

    def visit(self, tag: str, body: tuple[Step, ...], args: int, caller: int | None) -> None:
        frame = self._frames[tag]
        read = {register for step in body for register in registers_read_by(step)}
        received = set(range(args))
        started: dict[int, Call] = {}
        at = args
        for step in body:
            self._visit_step(frame, step, received, is_waiting=bool(started))
            for call in calls_in((step,)):
                self._visit_call(frame, call, caller)
            if isinstance(step, Start):
                started[step.call.number] = step.call
                continue
            answered = list(calls_in((step,)))
            if isinstance(step, Finish):
                call = started.pop(step.number)
                answered = [] if step.cancels else [call]
            for call in answered:
                results = range(at, at + registers_made_by(call))
                received |= set(results)
                self._visit_results(frame, results, read)
                at += len(results)
            at += 0 if answered else registers_made_by(step)

    def _visit_step(
        self, frame: Frame, step: Step, received: set[int], *, is_waiting: bool
    ) -> None:
        match step:
            case Backward() if is_waiting:
                self.found.add("call under way in a pass")
            case Hook() if frame.registers[step.a].is_leaf:
                self.found.add("hook on a leaf")
            case Hook():
                is_received = step.a in received
                self.found.add(f"hook on {'a received' if is_received else 'another'} tensor")
            case Keep():
                self._kept_by[step.slot] = frame.tag
            case Load() if self._kept_by[step.slot] != frame.tag:
                self.found.add("state kept between calls")
            case UseLeaf():
                self.leaves.add(step.leaf)
                if self._user_of.setdefault(step.leaf, frame.tag) != frame.tag:
                    self.found.add("tied leaf")
            case _:
                return

    def _visit_call(self, frame: Frame, call: Call, caller: int | None) -> None:
        tag = tag_within(frame.tag, call, call.failures)
        if call.worker == caller:
            self.found.add("call back to the caller")
        if call.worker == frame.worker:
            self.found.add("call to itself")
        self._visit_message(frame.get(call.args))
        self.visit(tag, call.body, len(call.args), frame.worker)
        if call.outcome is Outcome.TENSORS:
            sent = self._frames[tag].get(call.returns)
            self._visit_message(sent)
            if _needs_grad(frame.get(call.args)) and not all(t.requires_grad for t in sent):
                self.found.add("detached result")

    def _visit_message(self, tensors: list[Tensor]) -> None:
        by_id = {id(tensor): tensor for tensor in tensors}
        if len(by_id) < len(tensors):
            self.found.add("same tensor twice in a message")
        self._messages_with.update(key for key, t in by_id.items() if t.grad_fn is not None)
        if self._messages_with and self._messages_with.most_common(1)[0][1] > 1:
            self.found.add("shared subgraph")

    def _visit_results(self, frame: Frame, results: range, read: set[int]) -> None:
        used = [r for r in results if r in read]
        unused = [r for r in results if r not in read]
        if _needs_grad(frame.get(unused)):
            self.found.add("unused result")
            if _needs_grad(frame.get(used)):
                self.found.add("outputs of which some are unused")


def _needs_grad(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
