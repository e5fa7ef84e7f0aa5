"""The list of what is left out, and the page that tells of it."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.left_out import LEFT_OUT, SKIPPED, SUITES_LEFT_OUT
from tests.conformance.suites import AREAS, FAST, FLOORS

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def test_the_page_lists_what_is_left_out_and_why() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    listed = [line for line in lines if "Test.test_" in line]
    assert sorted(listed) == sorted(
        f"| {reason.value} | `{name}` | {remark} |" for name, (reason, remark) in LEFT_OUT.items()
    )
    assert all(name in PAGE.read_text() for name in {*SKIPPED, *SUITES_LEFT_OUT})


def test_every_suite_has_an_area_or_a_reason() -> None:
    assert not set(AREAS) & set(SUITES_LEFT_OUT)
    assert set(FLOORS) <= set(AREAS.values())
    assert {AREAS[name.split(".")[0]] for name in FAST} == set(AREAS.values())
