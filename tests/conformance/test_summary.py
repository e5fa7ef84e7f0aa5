"""What the runner says of a run: when it fails, and its last line."""

from __future__ import annotations

import unittest

import pytest

from tests.conformance.left_out import LEFT_OUT
from tests.conformance.processes import Outcome, Report
from tests.conformance.suites import FLOORS, Case
from tests.conformance.summary import summarise


def report(name: str, outcome: Outcome, text: str = "") -> Report:
    suite, test = name.split(".")
    return Report(Case(suite, test, unittest.TestCase), outcome, 1.0, text)


def passed_optimizer_tests(number: int) -> list[Report]:
    return [report(f"DistOptimizerTest.test_{n}", Outcome.PASSED) for n in range(number)]


def test_the_last_line_counts_every_test() -> None:
    suite, test = next(iter(LEFT_OUT)).split(".")
    left_out = [Case(suite, test, unittest.TestCase)]
    reports = [*passed_optimizer_tests(2), report("RpcTest.test_skipped", Outcome.SKIPPED)]
    text, is_well = summarise(reports, left_out, floors=False)
    assert text.splitlines()[-1] == "2 passed, 0 failed, 2 left out"
    assert is_well


def test_one_failure_is_told_and_fails_the_run() -> None:
    failed = report("RpcTest.test_add", Outcome.FAILED, "Traceback: it is 3")
    text, is_well = summarise([*passed_optimizer_tests(1), failed], [], floors=False)
    assert "RpcTest.test_add\nTraceback: it is 3" in text
    assert text.splitlines()[-1] == "1 passed, 1 failed, 0 left out"
    assert not is_well


@pytest.mark.parametrize("missing", [0, 1])
def test_an_area_below_its_floor_fails_a_whole_run(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for area in set(FLOORS) - {"optimizer"}:
        monkeypatch.delitem(FLOORS, area)
    text, is_well = summarise(
        passed_optimizer_tests(FLOORS["optimizer"] - missing), [], floors=True
    )
    assert is_well is (missing == 0)
    assert ("below the floor: optimizer" in text) is (missing == 1)
