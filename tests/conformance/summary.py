"""What a run comes to: what failed and why, each area against its floor, and the last line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.conformance.left_out import LEFT_OUT
from tests.conformance.processes import Outcome, Report
from tests.conformance.suites import AREAS, FLOORS, Case

EXCERPT_LINES = 40
"""How much of a failed test's tracebacks is repeated; the whole is in its log."""


def summarise(reports: list[Report], left_out: list[Case], *, floors: bool) -> tuple[str, bool]:
    """Return the text of the summary, and whether all is well.

    Args:
        reports: of the tests that were run. One that skipped itself counts as left out.
        left_out: the tests that were not.
        floors: whether the areas' floors are to be reached: not by a part of the tests.
    """
    by_outcome = {outcome: [r for r in reports if r.outcome is outcome] for outcome in Outcome}
    failed = by_outcome[Outcome.FAILED]
    passed = Counter(report.case.area for report in by_outcome[Outcome.PASSED])
    not_run = [*left_out, *(report.case for report in by_outcome[Outcome.SKIPPED])]
    all_cases = Counter(case.area for case in [*not_run, *(r.case for r in reports if r in failed)])
    all_cases += passed
    lines = [_failure(report) for report in failed]
    lines += _areas(passed, all_cases, floors=floors)
    lines += _reasons(left_out)
    low = [area for area, floor in FLOORS.items() if floors and passed[area] < floor]
    if low:
        lines.append(f"below the floor: {', '.join(low)}")
    lines.append(f"{passed.total()} passed, {len(failed)} failed, {len(not_run)} left out")
    return "\n".join(lines), not failed and not low


def _failure(report: Report) -> str:
    excerpt = "\n".join(report.text.splitlines()[-EXCERPT_LINES:])
    return f"{'-' * 80}\n{report.case.name}\n{excerpt}\n"


def _areas(passed: Counter[str], every: Counter[str], *, floors: bool) -> Iterable[str]:
    for area in dict.fromkeys(AREAS.values()):
        if every[area]:
            floor = f", floor {FLOORS[area]}" if floors and area in FLOORS else ""
            yield f"{area}: {passed[area]} of {every[area]}{floor}"


def _reasons(left_out: list[Case]) -> Iterable[str]:
    reasons = Counter(LEFT_OUT[case.name][0].value for case in left_out)
    for reason, count in reasons.items():
        yield f"left out, {reason}: {count}"
