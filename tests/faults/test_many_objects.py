"""Many steps with values, modules and optimizers that live elsewhere: nothing of them stays behind.

The trainer and two workers are processes of their own.  One step in ten fails on purpose; in the
long run one of the workers is killed ten times, too, and another one takes its place.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import linear_regression
from typing import Any, Final

import pytest

import zmq_autograd as za
from tests.faults.keeper import FAILURE_PERIOD, FAILURES
from tests.faults.victims import DEADLINE_SECONDS, Victim
from tests.faults.vitals import say
from zmq_autograd.wire.limits import KIB

FEW_STEPS: Final = 200

MANY_STEPS: Final = 10_000

MEASURED_STEPS: Final = 8_000
"""The last ones, over which memory must not grow: before, allocators and caches fill."""

STEPS_PER_SAMPLE: Final = 100

STEPS_PER_KILL: Final = 1_000

MOST_KILLS: Final = 10
"""How often carol is killed until a step fails by that: one between two calls strikes nothing."""

MOST_BYTES_A_STEP: Final = KIB

SECONDS_PER_CALL: Final = 300.0

NOTHING: Final = {"owned": 0, "forks": 0, "held": 0, "pending": 0}


class Keeper(Victim):
    """A worker in a process of its own that keeps state for others."""

    MODULE = "tests.faults.keeper"


class Training:
    """A trainer, bob, whose module it trains, and carol, who may be killed."""

    def __init__(self, worker: za.Worker, folder: Path) -> None:
        self._worker = worker
        self._endpoints = {name: f"ipc://{folder}/{name}" for name in ("trainer", "bob", "carol")}
        self._processes: dict[str, Keeper] = {}

    async def start(self, name: str) -> None:
        options = []
        if name == "trainer":
            options = ["--with", self._endpoints["bob"], self._endpoints["carol"]]
        self._processes[name] = Keeper(name, *options, listen=self._endpoints[name])
        await asyncio.to_thread(self._processes[name].started)

    async def remote(self, name: str) -> za.RemoteWorker:
        return await self._worker.connect(self._endpoints[name], timeout=DEADLINE_SECONDS)

    async def steps(self, start: int, count: int) -> Counter[str]:
        """Make so many steps from number `start`; return how many failed, by what did."""
        trainer = await self.remote("trainer")
        return Counter(await trainer.call("step_many", start, count, timeout=SECONDS_PER_CALL))

    async def steps_with_a_loss(self, start: int, count: int) -> Counter[str]:
        """Do the same, and kill carol in the midst."""
        steps = asyncio.create_task(self.steps(start, count))
        trainer = await self.remote("trainer")
        while await trainer.call("number") < start + count // 2:
            await asyncio.sleep(0.01)
        self._processes["carol"].kill()
        await asyncio.to_thread(self._processes["carol"].close)
        await self.start("carol")
        return await steps

    async def left(self) -> list[dict[str, Any]]:
        """Return how many contexts and RRefs each has."""
        found = []
        for name in self._endpoints:
            reply = await (await self.remote(name)).request(za.messages.Status())
            assert isinstance(reply, za.messages.StatusResponse)
            found.append({**reply.status["rrefs"], "contexts": len(reply.status["contexts"])})
        return found

    async def check_left(self, trainer: dict[str, int], bob: dict[str, int]) -> None:
        """Wait until the trainer and bob have this of RRefs and nobody anything else."""
        expected = [{**each, "contexts": 0} for each in (trainer, bob, NOTHING)]
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while await self.left() != expected:
                    await self.resident_bytes()  # which collects garbage
        except TimeoutError:
            pytest.fail(f"expected {expected}, got {await self.left()}")

    async def resident_bytes(self) -> list[int]:
        """Return what memory the trainer, bob and carol take."""
        return [await (await self.remote(name)).call("resident_bytes") for name in self._endpoints]

    def close(self) -> None:
        for process in self._processes.values():
            process.close()


@asynccontextmanager
async def training(folder: Path) -> AsyncIterator[Training]:
    async with za.Worker("test") as test:
        all_three = Training(test, folder)
        try:
            for name in ("trainer", "bob", "carol"):
                await all_three.start(name)
            yield all_three
        finally:
            await asyncio.to_thread(all_three.close)


# What stays while the trainer trains: RRefs to two parameters and to their optimizer.
HOLDING: Final = {**NOTHING, "held": 3}
OWNING: Final = {**NOTHING, "owned": 3, "forks": 3}


def expected_failures(steps: int) -> dict[str, int]:
    return {
        failing: sum(number % FAILURE_PERIOD == remainder for number in range(steps))
        for remainder, failing in FAILURES.items()
    }


def check_failures(failures: Counter[str], steps: int) -> None:
    """Raise AssertionError unless those steps failed that were to, or that a loss struck."""
    lost = failures.pop("lost", 0)
    expected = Counter(expected_failures(steps))
    assert failures <= expected, failures
    assert (expected - failures).total() <= lost


async def test_hundreds_of_steps_leave_nothing(tmp_path: Path) -> None:
    async with training(tmp_path) as all_three:
        started = time.monotonic()
        failures = await all_three.steps(0, FEW_STEPS)
        say(f"{FEW_STEPS} steps in {time.monotonic() - started:.1f} s, failures: {failures}")
        assert failures == expected_failures(FEW_STEPS)
        await all_three.check_left(HOLDING, OWNING)
        for kill in range(MOST_KILLS):
            start = FEW_STEPS + kill * FAILURE_PERIOD
            failures = await all_three.steps_with_a_loss(start, FAILURE_PERIOD)
            has_struck = failures["lost"] > 0
            check_failures(failures, FAILURE_PERIOD)
            await all_three.check_left(HOLDING, OWNING)
            if has_struck:
                break
        else:
            pytest.fail(f"none of {MOST_KILLS} kills struck a step")
        await (await all_three.remote("trainer")).call("let_go")
        await all_three.check_left(NOTHING, NOTHING)


@pytest.mark.soak
@pytest.mark.timeout(3000)
async def test_ten_thousand_steps_take_no_more_memory(tmp_path: Path) -> None:
    samples: list[list[int]] = []
    failures: Counter[str] = Counter()
    started = time.monotonic()
    async with training(tmp_path) as all_three:
        for start in range(0, MANY_STEPS, STEPS_PER_SAMPLE):
            has_loss = start % STEPS_PER_KILL == STEPS_PER_KILL // 2
            steps = all_three.steps_with_a_loss if has_loss else all_three.steps
            failures += await steps(start, STEPS_PER_SAMPLE)
            await all_three.check_left(HOLDING, OWNING)
            samples.append(await all_three.resident_bytes())
        await (await all_three.remote("trainer")).call("let_go")
        await all_three.check_left(NOTHING, NOTHING)
    say(f"{MANY_STEPS} steps in {time.monotonic() - started:.0f} s, failures: {failures}")
    assert failures["lost"] >= MANY_STEPS // STEPS_PER_KILL // 2  # see MOST_KILLS
    check_failures(failures, MANY_STEPS)
    measured = samples[-MEASURED_STEPS // STEPS_PER_SAMPLE :]
    steps_made = [STEPS_PER_SAMPLE * index for index in range(len(measured))]
    # Not carol, who never lives for long.
    trainer, bob, _ = zip(*measured, strict=True)
    slopes = [linear_regression(steps_made, column).slope for column in (trainer, bob)]
    for name, slope in zip(("trainer", "bob"), slopes, strict=True):
        say(f"{name}: {slope:.0f} bytes a step over the last {MEASURED_STEPS}")
    assert max(slopes) <= MOST_BYTES_A_STEP
