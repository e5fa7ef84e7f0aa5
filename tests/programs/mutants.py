"""Takes one part of the engine out at a time and shows that random programs notice.

``python -m tests.programs.mutants`` runs at most 200 programs on each mutant, and on none at all,
and fails if one survives.  What is put in a part's place is what a simpler engine would do there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor

from tests.programs.checker import Checker, check_programs
from zmq_autograd.autograd import stages
from zmq_autograd.autograd.functions import position_of, receive_of
from zmq_autograd.autograd.local_pass import Emission, LocalPass
from zmq_autograd.autograd.stages import Slot, Stage
from zmq_autograd.autograd.walk import Walk
from zmq_autograd.engine.distributed_pass import Awaited, Pass
from zmq_autograd.engine.passes import Passes

PROGRAMS: Final = 200


def _do_nothing(*args: Any) -> None:
    """Stand for what is taken out; a `Mock` would hold on to what it is called with."""


@contextmanager
def without_undefined_told() -> Iterator[None]:
    """Wait for each message's gradients, as torch's FAST mode does, whether they come or not."""
    with mock.patch.object(Pass, "_undefine", _do_nothing):
        yield


@contextmanager
def without_waiting_stages() -> Iterator[None]:
    """Run what gradients flow into as soon as some have come, and again when others do."""

    def run(self: LocalPass) -> list[Emission]:
        self._retain_graph = True  # what has run once may have to run again
        emissions = [one for stage in self._stages for one in self._run_stage(stage)]
        self._stages = [stage for stage in self._stages if stage.roots & self._unresolved]
        if not self._stages:
            self._finish()
        return emissions

    def received(self: LocalPass, number: int, grad: Tensor | None) -> Emission | None:
        node = self._graph.nodes[number]
        receive = receive_of(node)
        if receive is None:
            return None
        found, position = self._emissions[receive], position_of(node)
        if grad is not None:
            so_far = found[position]
            found[position] = grad if so_far is None else so_far + grad
        stage = next(stage for stage in self._stages if number in stage.sinks)
        self._receives[receive] -= not stage.roots & self._unresolved
        return None if self._receives[receive] else (receive, self._emissions.pop(receive))

    with (
        mock.patch.object(LocalPass, "run", run),
        mock.patch.object(LocalPass, "_received", received),
    ):
        yield


@contextmanager
def without_stages() -> Iterator[None]:
    """Run all of a worker's graph at once, when all its roots are resolved."""

    def reached(graph: Walk, roots: list[list[Slot]]) -> list[int]:
        everything = sum(1 << bit for bit, slots in enumerate(roots) if slots)
        return [everything] * len(graph.nodes)

    with mock.patch.object(stages, "_reached", reached):
        yield


@contextmanager
def without_stepping() -> Iterator[None]:
    """Have torch's engine capture what flows into the next stage, and stop there if it does."""
    find_sinks = stages._find_sinks
    captured_slots, call = LocalPass._captured_slots, LocalPass._call

    def find_own_sinks(graph: Walk, stage: Stage, needed: list[bool] | None) -> None:
        find_sinks(graph, stage, needed)
        called, may_be_shared = set(stage.called), stages._may_be_captured_in_parts
        stage.sinks = [n for n in stage.sinks if n in called or may_be_shared(graph.nodes[n])]

    def ways_out(self: LocalPass, stage: Stage) -> list[Slot]:
        inside = {*stage.called, *stage.sinks}
        nexts = (slot for number in stage.called for slot in self._graph.nexts[number])
        return list(dict.fromkeys(slot for slot in nexts if slot and slot[0] not in inside))

    def with_ways_out(self: LocalPass, stage: Stage) -> list[Slot]:
        return [*captured_slots(self, stage), *ways_out(self, stage)]

    def call_and_pass_on(self: LocalPass, stage: Stage) -> dict[Slot, Tensor]:
        found = call(self, stage)
        for slot in ways_out(self, stage):
            if slot in found:
                self._add(slot, ((stage.called[0], 0), found.pop(slot)))
        return found

    with (
        mock.patch.object(stages, "_find_stepped", _do_nothing),
        mock.patch.object(stages, "_find_sinks", find_own_sinks),
        mock.patch.object(LocalPass, "_captured_slots", with_ways_out),
        mock.patch.object(LocalPass, "_call", call_and_pass_on),
    ):
        yield


@contextmanager
def without_abort() -> Iterator[None]:
    """Tell of what went wrong only those who asked, who hear it in reply."""

    async def tell_nobody(*args: Any) -> Awaited:
        return Awaited()

    with mock.patch.object(Passes, "tell_aborted", tell_nobody):
        yield


MUTANTS: Final[dict[str, Callable[[], AbstractContextManager[None]]]] = {
    "undefined told": without_undefined_told,
    "staging: run as gradients come": without_waiting_stages,
    "staging: run all at once": without_stages,
    "stepping at nested boundaries": without_stepping,
    "abort": without_abort,
}


def find_failure(mutant: Callable[[], AbstractContextManager[None]]) -> tuple[int, str | None]:
    """Return how many programs were run on a mutant, and how the last one failed, if it did."""
    with mutant(), Checker("memory") as checker:
        try:
            check_programs(checker.check, PROGRAMS, shrinks=False)
        except Exception as error:  # noqa: BLE001  # however it shows, the mutant is noticed
            return checker.checked, _first_line_of(error)
        return checker.checked, None


def _first_line_of(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> int:
    """Show what becomes of each mutant; return the exit status."""
    torch.set_num_threads(1)
    is_good = True
    for name, mutant in {"nothing": nullcontext, **MUTANTS}.items():
        start = time.monotonic()
        programs, failure = find_failure(mutant)
        outcome = "none failed" if failure is None else f"the last failed: {failure[:90]}"
        seconds = time.monotonic() - start
        sys.stdout.write(f"without {name:32}{programs:4} programs, {seconds:3.0f} s, {outcome}\n")
        is_good &= (failure is None) == (name == "nothing")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
