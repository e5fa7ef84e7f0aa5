"""Random distributed programs give what one process gives: gradients, hooks, and nothing left."""

from __future__ import annotations

import os
import sys
from typing import Final

import pytest

from tests.programs.checker import Checker, check_programs

PROGRAMS: Final = 300
"""Programs in every run of the tests."""

TCP_PROGRAMS: Final = 20
"""Programs over TCP: they are slower, and nothing but the transport differs."""

SOAK_PROGRAMS: Final = int(os.environ.get("ZA_PROGRAMS", "5000"))
BATCH: Final = 500

# What fails is made small first, which takes hypothesis minutes.
pytestmark = pytest.mark.timeout(600)


def test_programs_give_what_one_process_gives(capsys: pytest.CaptureFixture[str]) -> None:
    with Checker("memory") as checker:
        check_programs(checker.check, PROGRAMS)
    show(checker, capsys)
    checker.check_features()


def test_programs_give_the_same_over_tcp() -> None:
    with Checker("tcp") as checker:
        check_programs(checker.check, TCP_PROGRAMS, seed=1)
    assert checker.checked


@pytest.mark.soak
@pytest.mark.timeout(600 + SOAK_PROGRAMS)
def test_any_number_of_programs(capsys: pytest.CaptureFixture[str]) -> None:
    with Checker("memory") as checker:
        for batch in range(-(-SOAK_PROGRAMS // BATCH)):
            count = min(BATCH, SOAK_PROGRAMS - batch * BATCH)
            check_programs(checker.check, count, seed=2 + batch)
    show(checker, capsys)
    checker.check_features()


def show(checker: Checker, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write("\n" + checker.show_features())
