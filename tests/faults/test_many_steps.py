"""Many steps of training, one in twenty of which fails: nothing of them stays behind.

The trainer and two workers are processes of their own, each of which says what memory it takes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Final

import pytest

import zmq_autograd as za
from tests.faults.learner import FAILURE_PERIOD, FAILURES
from tests.faults.learners import contexts_of, learners
from tests.faults.vitals import say
from zmq_autograd.wire.limits import KIB

FEW_STEPS: Final = 300

MANY_STEPS: Final = 10_000

MEASURED_STEPS: Final = 8_000
"""The last ones, over which memory must not grow: before, allocators and caches fill."""

STEPS_PER_SAMPLE: Final = 100

MOST_BYTES_A_STEP: Final = KIB

SECONDS_PER_CALL: Final = 120.0


@dataclass(frozen=True)
class Training:
    """A trainer and those whom it trains with.

    Attributes:
        remotes: all of them, the trainer first.
    """

    remotes: list[za.RemoteWorker]

    async def steps(self, start: int, count: int) -> list[int]:
        """Make so many steps from number `start`; return how many of each kind failed."""
        counts: list[int] = await self.remotes[0].call(
            "step_many", start, count, timeout=SECONDS_PER_CALL
        )
        return counts

    async def resident_bytes(self) -> list[int]:
        """Return what memory each takes."""
        return [await remote.call("resident_bytes") for remote in self.remotes]

    async def check_nothing_left(self) -> None:
        """Raise AssertionError if one has a context."""
        for remote in self.remotes:
            assert await contexts_of(remote) == [], remote.name


@asynccontextmanager
async def training(folder: Path) -> AsyncIterator[Training]:
    with learners(folder, "trainer", "bob", "carol") as processes:
        async with za.Worker("test") as test:
            yield Training([await test.connect(each.endpoint) for each in processes])


def expected_failures(steps: int) -> list[int]:
    return [
        sum(number % FAILURE_PERIOD == failing for number in range(steps)) for failing in FAILURES
    ]


async def test_hundreds_of_steps_leave_no_context(tmp_path: Path) -> None:
    async with training(tmp_path) as all_three:
        started = time.monotonic()
        failures = await all_three.steps(0, FEW_STEPS)
        seconds = time.monotonic() - started
        say(f"{FEW_STEPS} steps in {seconds:.1f} s, failures of each kind: {failures}")
        assert failures == expected_failures(FEW_STEPS)
        await all_three.check_nothing_left()


@pytest.mark.soak
@pytest.mark.timeout(3000)
async def test_ten_thousand_steps_take_no_more_memory(tmp_path: Path) -> None:
    samples: list[list[int]] = []
    failures = [0] * len(FAILURES)
    started = time.monotonic()
    async with training(tmp_path) as all_three:
        for start in range(0, MANY_STEPS, STEPS_PER_SAMPLE):
            counts = await all_three.steps(start, STEPS_PER_SAMPLE)
            failures = [total + count for total, count in zip(failures, counts, strict=True)]
            samples.append(await all_three.resident_bytes())
        await all_three.check_nothing_left()
    seconds = time.monotonic() - started
    say(f"{MANY_STEPS} steps in {seconds:.0f} s, failures of each kind: {failures}")
    assert failures == expected_failures(MANY_STEPS)
    measured = samples[-MEASURED_STEPS // STEPS_PER_SAMPLE :]
    steps = [STEPS_PER_SAMPLE * index for index in range(len(measured))]
    slopes = [linear_regression(steps, column).slope for column in zip(*measured, strict=True)]
    for remote, slope in zip(all_three.remotes, slopes, strict=True):
        say(f"{remote.name}: {slope:.0f} bytes a step over the last {MEASURED_STEPS}")
    assert max(slopes) <= MOST_BYTES_A_STEP
