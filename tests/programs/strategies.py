"""Draws random programs.

Every step is written where it can run: on registers that are there, slots that were kept on that
worker before, passes over graph that no pass has freed.  What is drawn first, and small, is simple,
so that a failing program shrinks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from hypothesis import strategies as st

from tests.programs.drafts import Budget, Draft, Symbol
from tests.programs.functions import HOOKS
from tests.programs.local import BINARY, IN_PLACE, SAVING_NOTHING, UNARY
from tests.programs.passes import write_backward
from tests.programs.program import (
    WORKERS,
    Binary,
    Call,
    Collect,
    Constant,
    Custom,
    Detach,
    Finish,
    Gather,
    Halves,
    Hook,
    InPlace,
    Keep,
    Leaf,
    Load,
    Mix,
    Outcome,
    Program,
    Start,
    Step,
    Unary,
    UseLeaf,
    leaf_site,
)

T = TypeVar("T")

MAX_CALLS: Final = 14
"""Calls of one program."""

MAX_DEPTH: Final = 4
"""Calls that may lead to one another."""

OUTCOMES: Final = (Outcome.TENSORS,) * 7 + (Outcome.NONE, Outcome.NUMBER, Outcome.FAILURE)
FAILURES: Final = (0,) * 10 + (1, 2)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program."""
    trainers = 1 if draw(st.integers(0, 9)) < 7 else 2
    leaves = tuple(draw(st.lists(_leaves, min_size=2, max_size=6)))
    numbers = itertools.count()
    bodies = []
    for trainer in range(trainers):
        budget = Budget(MAX_CALLS // trainers, trainers == 1, numbers)
        bodies.append(Author(draw, leaves, budget).write_trainer(trainer))
    return Program(draw(st.integers(0, 999)), leaves, tuple(bodies))


_leaves: Final = st.builds(
    Leaf,
    worker=st.integers(0, len(WORKERS) - 1),
    hook=st.sampled_from((None, None, None, *HOOKS)),
    counts=st.booleans(),
)


class Author:
    """Writes what one trainer does."""

    def __init__(self, draw: st.DrawFn, leaves: tuple[Leaf, ...], budget: Budget) -> None:
        """Write with what `draw` draws."""
        self._draw = draw
        self._leaves = leaves
        self._budget = budget
        self._leaf_symbols = [Symbol(requires_grad=True, is_leaf=True) for _ in leaves]
        for number, (leaf, symbol) in enumerate(zip(leaves, self._leaf_symbols, strict=True)):
            # With two trainers a fault there would be one in the other's passes.
            if leaf.hook is not None and budget.has_one_trainer:
                budget.add_site(symbol, leaf_site(number))

    def write_trainer(self, trainer: int) -> tuple[Step, ...]:
        """Return what the trainer does."""
        draft = Draft(trainer, None, 0, no_grad=False, is_alone=True, is_repeated=False, slots={})
        for _ in range(self._between(1, 3)):
            self._write_steps(draft, self._between(2, 6))
            self.call(draft)
        self._write_steps(draft, self._between(1, 4))
        self._finish_all(draft)
        self.mix(draft)
        write_backward(self._draw, draft, self._budget)
        return tuple(draft.steps)

    # --- bodies ----------------------------------------------------------------------------------

    def _write_steps(self, draft: Draft, steps: int) -> None:
        if not draft.registers:
            self.leaf(draft) or self.constant(draft)
        for _ in range(steps):
            write = self._choose(_CHOICES)
            if not write(self, draft):
                self.binary(draft)

    def _finish_all(self, draft: Draft) -> None:
        for number in list(draft.started):
            self._finish(draft, number)

    def _write_call(
        self, draft: Draft, *, is_plain: bool = False, is_started: bool = False
    ) -> tuple[Call, list[Symbol]] | None:
        """Return a call, which is not yet one of the steps of `draft`, and what it returns.

        Args:
            draft: who makes it.
            is_plain: the body that makes it does nothing else meanwhile.
            is_started: that body makes it by `Start`.
        """
        if self._budget.calls == 0 or draft.depth == MAX_DEPTH:
            return None
        self._budget.calls -= 1
        number = next(self._budget.numbers)
        back = draft.caller is not None and self._is_one_in(4)
        away = self._choose((1, 2, 3, 1, 2, 3, 1, 2, 3, 0))
        worker = draft.caller if back else (draft.worker + away) % len(WORKERS)
        assert worker is not None
        args = tuple(self._pick(draft) for _ in range(self._between(1, 3)))
        if self._is_one_in(6):
            args = (*args, args[0])
        outcome = self._choose(OUTCOMES)
        failures = 0 if is_started else self._choose(FAILURES)
        # A trainer is no handler: between its steps its modes would leak into others.
        no_grad = is_plain and draft.caller is not None and self._is_one_in(5)
        callee = Draft(
            worker,
            draft.worker,
            draft.depth + 1,
            draft.no_grad or no_grad,
            draft.is_alone,
            draft.is_repeated or failures > 0,
            draft.slots,
            registers=self._receive([draft.registers[register] for register in args]),
        )
        self._write_steps(callee, self._between(1, 6))
        if not draft.is_alone and self._is_one_in(2):
            self.backward(callee)
        self._finish_all(callee)
        returns = tuple(self._pick(callee) for _ in range(self._between(1, 3)))
        sent = [callee.registers[register] for register in returns]
        call = Call(
            number,
            worker,
            args,
            tuple(callee.steps),
            returns,
            outcome,
            failures,
            no_grad,
            self._is_one_in(2),
        )
        return call, self._receive(sent) if outcome is Outcome.TENSORS else []

    def _receive(self, sent: list[Symbol]) -> list[Symbol]:
        """Return what arrives where `sent` is sent in one message."""
        copies = {
            symbol: Symbol(symbol.saving, symbol.certain, symbol.requires_grad, is_fresh=True)
            for symbol in sent
        }
        return [copies[symbol] for symbol in sent]

    # --- steps that reach other workers ----------------------------------------------------------

    def call(self, draft: Draft) -> bool:
        written = self._write_call(draft, is_plain=True)
        if written is None:
            return False
        call, results = written
        draft.steps.append(call)
        draft.registers += results
        return True

    def gather(self, draft: Draft) -> bool:
        written = []
        kept: dict[int, tuple[int, Symbol]] = {}
        is_alone, slots = draft.is_alone, draft.slots
        draft.is_alone = False
        for _ in range(self._between(2, 3)):
            draft.slots = dict(slots)  # what one of them keeps may come too late for another
            one = self._write_call(draft)
            written += [] if one is None else [one]
            kept.update(draft.slots)
        draft.is_alone, draft.slots = is_alone, slots
        slots.update(kept)
        if not written:
            return False
        draft.steps.append(Gather(tuple(call for call, _ in written)))
        for _, results in written:
            draft.registers += results
        return True

    def start(self, draft: Draft) -> bool:
        written = self._write_call(draft, is_started=True)
        if written is None:
            return False
        call, results = written
        draft.steps.append(Start(call))
        draft.started[call.number] = results
        if self._is_one_in(3):
            self.backward(draft)
        return True

    def finish(self, draft: Draft) -> bool:
        if not draft.started:
            return False
        self._finish(draft, self._choose(tuple(draft.started)))
        return True

    def _finish(self, draft: Draft, number: int) -> None:
        cancels = self._is_one_in(2)
        draft.steps.append(Finish(number, cancels))
        results = draft.started.pop(number)
        draft.registers += [] if cancels else results

    def backward(self, draft: Draft) -> bool:
        return write_backward(self._draw, draft, self._budget)

    def collect(self, draft: Draft) -> bool:
        if not draft.is_alone:  # others may run passes meanwhile
            return False
        draft.steps.append(Collect())
        return True

    # --- steps of one worker ---------------------------------------------------------------------

    def leaf(self, draft: Draft) -> bool:
        here = [n for n, leaf in enumerate(self._leaves) if leaf.worker == draft.worker]
        if not here:
            return False
        leaf = self._choose(here)
        draft.steps.append(UseLeaf(leaf))
        draft.registers.append(self._leaf_symbols[leaf])
        return True

    def constant(self, draft: Draft) -> bool:
        draft.steps.append(Constant(self._between(0, 99)))
        draft.registers.append(Symbol())
        return True

    def unary(self, draft: Draft) -> bool:
        a = self._pick(draft)
        kind = self._choose(tuple(UNARY))
        draft.steps.append(Unary(kind, a))
        self._append(draft, a, saves=kind not in SAVING_NOTHING)
        return True

    def binary(self, draft: Draft) -> bool:
        a, b = self._pick(draft), self._pick(draft)
        kind = self._choose(tuple(BINARY))
        draft.steps.append(Binary(kind, a, b))
        self._append(draft, a, b, saves=kind not in SAVING_NOTHING)
        return True

    def mix(self, draft: Draft) -> bool:
        registers = tuple(n for n in range(len(draft.registers)) if self._is_one_in(2))
        if not registers:
            return False
        draft.steps.append(Mix(registers))
        self._append(draft, *registers, saves=True)
        return True

    def halves(self, draft: Draft) -> bool:
        a = self._pick(draft)
        draft.steps.append(Halves(a))
        self._append(draft, a, saves=False)
        self._append(draft, a, saves=False)
        return True

    def custom(self, draft: Draft) -> bool:
        kind = self._choose(("gate", "gate", "pair", "pair", "pair", "block"))
        a, b, site = self._pick(draft), self._pick(draft), next(self._budget.numbers)
        draft.steps.append(Custom(kind, a, b, site))
        outputs = [self._append(draft, a, b, saves=False)]
        if kind == "pair":
            outputs.append(self._append(draft, a, b, saves=False))
            outputs[0].certain = draft.registers[a].certain  # it has nothing to do with `b`
        elif kind == "block":
            outputs[0].certain = frozenset()
        for output in outputs:
            if output.requires_grad:
                output.saving |= frozenset() if kind == "block" else {site}
                self._budget.add_site(output, site)
        return True

    def detach(self, draft: Draft) -> bool:
        a = self._pick(draft)
        draft.steps.append(Detach(a))
        draft.registers[a].is_fresh = False  # they share memory
        draft.registers.append(Symbol())
        return True

    def in_place(self, draft: Draft) -> bool:
        fresh = [n for n, symbol in enumerate(draft.registers) if symbol.is_fresh]
        if not fresh:
            return False
        a, b = self._choose(fresh), self._pick(draft)
        kind = self._choose(IN_PLACE)
        draft.steps.append(InPlace(kind, a, b))
        changed, other = draft.registers[a], draft.registers[b]
        changed.is_fresh = False
        if draft.no_grad:
            return True
        if kind == "add_" and other.requires_grad:
            changed.saving |= other.saving
            changed.certain |= other.certain
            changed.requires_grad = True
        elif kind != "add_" and changed.requires_grad:
            self._budget.add_saving(changed)
        return True

    def hook(self, draft: Draft) -> bool:
        a, site = self._pick(draft), next(self._budget.numbers)
        symbol = draft.registers[a]
        # Elsewhere a pass of somebody else may come to the hook, or not.
        is_alone = draft.is_alone and (self._budget.has_one_trainer or not symbol.is_leaf)
        if not symbol.requires_grad or not (is_alone or symbol.is_fresh):
            return False
        draft.steps.append(Hook(self._choose(tuple(HOOKS)), a, site))
        self._budget.add_site(symbol, site)
        return True

    def keep(self, draft: Draft) -> bool:
        a, slot = self._pick(draft), next(self._budget.numbers)
        draft.steps.append(Keep(a, slot))
        symbol = draft.registers[a]
        symbol.is_fresh = False
        draft.slots[slot] = (draft.worker, symbol)
        return True

    def load(self, draft: Draft) -> bool:
        slots = [slot for slot, (worker, _) in draft.slots.items() if worker == draft.worker]
        if not slots:
            return False
        slot = self._choose(slots[::-1])
        draft.steps.append(Load(slot))
        draft.registers.append(draft.slots[slot][1])
        return True

    def _append(self, draft: Draft, *registers: int, saves: bool) -> Symbol:
        """Append what a step makes of `registers`, saving tensors for backward or not."""
        used = [draft.registers[register] for register in registers]
        made = Symbol()
        for symbol in used:
            symbol.is_fresh = False
        if not draft.no_grad and any(symbol.requires_grad for symbol in used):
            made.requires_grad = True
            made.saving = frozenset[int]().union(*(symbol.saving for symbol in used))
            made.certain = frozenset[int]().union(*(symbol.certain for symbol in used))
            if saves:
                self._budget.add_saving(made)
        draft.registers.append(made)
        return made

    # --- draws -----------------------------------------------------------------------------------

    def _pick(self, draft: Draft) -> int:
        """Return a register, rather one of the latest."""
        last = len(draft.registers) - 1
        return last - self._between(0, min(last, 3) if self._is_one_in(2) else last)

    def _between(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def _is_one_in(self, number: int) -> bool:
        return self._between(1, number) == number

    def _choose(self, items: Sequence[T]) -> T:
        return self._draw(st.sampled_from(items))


_CHOICES: Final[tuple[Callable[[Author, Draft], bool], ...]] = (
    *(Author.unary,) * 2,
    *(Author.binary,) * 4,
    Author.mix,
    *(Author.leaf,) * 3,
    *(Author.call,) * 9,
    *(Author.custom,) * 3,
    *(Author.hook,) * 3,
    *(Author.keep,) * 3,
    *(Author.load,) * 4,
    *(Author.gather,) * 2,
    *(Author.start,) * 2,
    Author.finish,
    *(Author.in_place,) * 2,
    Author.halves,
    Author.detach,
    Author.constant,
    *(Author.backward,) * 2,
    Author.collect,
)
"""What a step may be, the simplest first."""
