"""Runs tests in processes forked from this one, a few at a time, each by a deadline.

A test has a leader, forked from the warm process with a session of its own; PyTorch's
`MultiProcessTestCase` forks one process for each rank from there. What is left of the session when
the leader has ended, at the deadline, and when this process itself is killed, is killed too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
import unittest
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from tests.conformance.suites import Case

GRACE: Final = 15.0
"""Seconds between PyTorch's deadline, at which each rank says where it is, and ours."""

POLL: Final = 0.05
"""Seconds between two looks at the tests that are running."""


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Report:
    """How a test ended: `text` has the tracebacks, or why it was skipped."""

    case: Case
    outcome: Outcome
    seconds: float
    text: str


@dataclass(frozen=True)
class _Running:
    case: Case
    pid: int
    alive: int  # the end of a pipe; tests that began later have it too, and go first
    started: float
    log: Path
    report: Path


def run_cases(
    cases: Iterable[Case], *, jobs: int, deadline: float, output: Path
) -> Iterator[Report]:
    """Run `cases`, `jobs` at a time, and yield a report as each one ends.

    Args:
        cases: what to run.
        jobs: how many at a time.
        deadline: seconds that one test may take.
        output: a folder; what a test writes goes into a file there, named after the test.
    """
    waiting = list(reversed(list(cases)))
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(), deadline, output))
            time.sleep(POLL)
            for test in list(running):
                ended = os.waitpid(test.pid, os.WNOHANG)[0] == test.pid
                if ended or time.monotonic() - test.started > deadline:
                    running.remove(test)
                    _kill(test, ended=ended)
                    yield _report(test)
    finally:
        for test in running:
            _kill(test, ended=False)


def _start(case: Case, deadline: float, output: Path) -> _Running:
    log, report = output / f"{case.name}.log", output / f"{case.name}.json"
    report.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    watched, alive = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.close(alive)
            _die_with(watched)
            _lead(case, deadline - GRACE, log, report)
        finally:
            os._exit(1)  # 0 or 1, nobody looks: the report says it, or is missing
    os.close(watched)
    return _Running(case, pid, alive, time.monotonic(), log, report)


def _die_with(watched: int) -> None:
    """Have the kernel kill the session of this process once nobody holds that pipe's other end.

    That needs nothing to run here, and reaches all of it, whoever started what.
    """
    fcntl.fcntl(watched, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(watched, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):  # somebody holds it, who has nothing to say
        os.read(watched, 1)
        os.killpg(0, signal.SIGKILL)


def _kill(test: _Running, *, ended: bool) -> None:
    """Kill what is left of the test's session; `ended` says that its leader is gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(test.pid, signal.SIGKILL)
    if not ended:
        os.waitpid(test.pid, 0)
    os.close(test.alive)


def _report(test: _Running) -> Report:
    seconds = time.monotonic() - test.started
    try:
        outcome, text = json.loads(test.report.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        text = f"its leader said nothing within {seconds:.0f} s; see {test.log}"
        return Report(test.case, Outcome.FAILED, seconds, text)
    test.report.unlink()
    return Report(test.case, Outcome(outcome), seconds, text)


def _lead(case: Case, deadline: float, log: Path, report: Path) -> None:
    """Run `case` in this process, which was just forked for it."""
    with log.open("wb") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    outcome, text = _run(case, deadline)
    report.write_text(json.dumps([outcome.value, text]))


def _run(case: Case, deadline: float) -> tuple[Outcome, str]:
    from torch.testing._internal import common_distributed

    common_distributed.TIMEOUT_DEFAULT = int(deadline)
    common_distributed.TIMEOUT_OVERRIDE.clear()
    result = unittest.TestResult()
    case.test_class(case.test).run(result)
    sys.stdout.flush()
    sys.stderr.flush()
    if problems := [text for _, text in (*result.errors, *result.failures)]:
        return Outcome.FAILED, "\n".join(problems)
    if result.skipped:
        return Outcome.SKIPPED, result.skipped[0][1]
    if result.testsRun != 1:
        return Outcome.FAILED, f"{result.testsRun} tests were run"
    return Outcome.PASSED, ""
