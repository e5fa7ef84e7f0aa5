"""`python -m tests.conformance.run`: runs PyTorch's own tests over `zmq_autograd.compat`.

The last line says how many passed, failed and were left out; the exit status is 0 if none failed
and no area is below its floor.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.conformance import aliases
from tests.conformance.left_out import LEFT_OUT, SKIPPED
from tests.conformance.processes import Outcome, Report, run_cases
from tests.conformance.suites import FAST, compose
from tests.conformance.summary import summarise

OUTPUT: Final = Path("output/conformance")
"""Where the output of each test goes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests that `argv` selects and return the exit status."""
    options = _options(argv)
    # Before torch is imported: threads of its pool would not be there after a fork.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTORCH_PRINT_REPRO_ON_FAILURE"] = "0"
    ours = options.on == "zmq_autograd"
    if ours:
        aliases.install()
    cases = compose(variants=ours)
    if ours:
        from tests.conformance import allowed  # late: it imports what is aliased

        allowed.allow({case.test_class for case in cases})
        aliases.check(allowed.MODULES)
    selected = [case for case in cases if options.k in case.name]
    if options.fast:
        selected = [case for case in selected if case.name in FAST]
    left_out = [case for case in selected if ours and case.name in LEFT_OUT]
    to_run = [case for case in selected if case not in left_out]
    options.output.mkdir(parents=True, exist_ok=True)
    reports = []
    for report in run_cases(
        to_run, jobs=options.jobs, deadline=options.deadline, output=options.output
    ):
        _say(f"{report.outcome.value:8}{report.seconds:6.1f} s  {report.case.name}")
        reports.append(_strict(report) if ours else report)
    text, well = summarise(reports, left_out, floors=len(selected) == len(cases))
    _say(text)
    return 0 if well else 1


def _strict(report: Report) -> Report:
    """Take a test that skips itself, and does not do so on TensorPipe, for a failed one."""
    if report.outcome is not Outcome.SKIPPED or report.case.name in SKIPPED:
        return report
    text = f"it skips itself, but is not in the list: {report.text}"
    return replace(report, outcome=Outcome.FAILED, text=text)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.run")
    parser.add_argument("--fast", action="store_true", help="run a few tests of every area")
    parser.add_argument("-k", default="", metavar="TEXT", help="only tests with TEXT in their name")
    parser.add_argument(
        "--on",
        choices=("zmq_autograd", "torch"),
        default="zmq_autograd",
        help="what to test; torch: its own TensorPipe, to compare with",
    )
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds for one test")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for what tests write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
