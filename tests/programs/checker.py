"""Draws programs, runs each in one process and twice on a fleet, and counts what they had."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, Self

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.programs.compare import check_equal, check_same
from tests.programs.features import FEATURES, features_of
from tests.programs.fleet import Fleet, open_fleet
from tests.programs.program import Program, all_passes, has_passes_in_any_order
from tests.programs.record import Node
from tests.programs.reference import run_in_one_process
from tests.programs.strategies import programs

LEAST_SHARE: Final = 0.05
"""Of the programs, each feature is in so many at least."""

LEAST_MANY: Final = 0.3
"""So many programs have `MANY` features or more."""

MANY: Final = 3

SETTLE_SECONDS: Final = 2.0
"""How long what a context has left may take to go."""


class Checker:
    """Checks programs, on workers that it starts and keeps until one goes wrong.

    Attributes:
        checked: how many programs were run.
        counts: how many of them had each feature.
        with_many: how many had `MANY` features or more.
    """

    def __init__(self, scheme: str) -> None:
        """Check on workers with endpoints of `scheme`: "memory" or "tcp"."""
        self.checked = 0
        self.counts: Counter[str] = Counter()
        self.with_many = 0
        self._scheme = scheme
        self._runner = asyncio.Runner()
        self._opened: AbstractAsyncContextManager[Fleet] | None = None
        self._fleet: Fleet | None = None
        # Of passes that raised: torch's engine lets go of them in the next pass of the same thread.
        self._nodes: list[Collection[Node]] = []
        self._unheard: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._runner.get_loop().set_exception_handler(lambda _, what: self._unheard.append(what))
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close_fleet()
        if exc is None:
            self._check_gone(self._nodes)
        tasks = asyncio.all_tasks(self._runner.get_loop())
        self._runner.close()
        if exc is None:
            assert not tasks, f"tasks left: {tasks}"
            assert not self._unheard, f"errors left unheard: {self._unheard}"

    def check(self, program: Program) -> None:
        """Check one program.

        Raises:
            AssertionError: the workers do not do what one process does.
            TimeoutError: they hang.
        """
        expected, frames = run_in_one_process(program)
        self._count(features_of(program, frames))
        frames.clear()
        try:
            first = self._runner.run(self._run(program))
            check_equal(program, expected, first)
            second = self._runner.run(self._run(program))
            if has_passes_in_any_order(program):
                check_equal(program, expected, second)
            else:
                check_same(program, first, second)
            nodes = [first.nodes, second.nodes]
            del first, second
            if any(one.fails for one in all_passes(program)):
                self._nodes += nodes
            else:
                self._check_gone(nodes)
        except BaseException:
            self._close_fleet()  # what is left of it is not for the next program
            raise

    def show_features(self) -> str:
        """Return how often each feature occurred."""
        lines = [f"{self.checked} programs, of which so many had:"]
        shares = [(name, self.counts[name]) for name in FEATURES]
        shares.append((f"{MANY} of these or more", self.with_many))
        lines += [f"  {name:36}{count / self.checked:7.1%}" for name, count in shares]
        return "\n".join(lines) + "\n"

    def check_features(self) -> None:
        """Check that no feature is rare."""
        rare = [n for n in FEATURES if self.counts[n] < LEAST_SHARE * self.checked]
        assert not rare, f"in less than {LEAST_SHARE:.0%} of the programs: {rare}"
        assert self.with_many >= LEAST_MANY * self.checked

    def _count(self, features: set[str]) -> None:
        assert features <= set(FEATURES)
        self.checked += 1
        self.counts.update(features)
        self.with_many += len(features) >= MANY

    async def _run(self, program: Program) -> Any:
        if self._fleet is None:
            self._opened = open_fleet(self._scheme)
            self._fleet = await self._opened.__aenter__()
        return await self._fleet.run(program)

    def _check_gone(self, nodes: Sequence[Collection[Node]]) -> None:
        """Check that nothing holds the graph of a context that was left."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while any(map(len, nodes)) and time.monotonic() < deadline:
            gc.collect()
            self._runner.run(asyncio.sleep(0))  # what was cancelled may not have ended yet
        left = sum(map(len, nodes))
        assert not left, f"{left} autograd nodes outlive their context"

    def _close_fleet(self) -> None:
        opened, self._opened, self._fleet = self._opened, None, None
        if opened is not None:
            self._runner.run(_leave(opened))


async def _leave(opened: AbstractAsyncContextManager[Fleet]) -> None:
    await opened.__aexit__(None, None, None)


def check_programs(
    check: Callable[[Program], None], count: int, *, seed: int = 0, shrinks: bool = True
) -> None:
    """Draw `count` programs and check each; the same ones for the same seed.

    Raises:
        AssertionError: as `check` raises it, for the smallest program found that fails.
    """

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrinks else (Phase.generate,),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(program=programs())
    def check_one(program: Program) -> None:
        check(program)

    check_one()
