"""How tests are run: forked, by a deadline, and with nothing left of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]

# In a process of its own: this one has threads, and is not to be forked.
PROGRAM = """
import json, os, sys, time, unittest
from pathlib import Path
from torch.testing._internal import common_distributed  # what takes its time to import
from tests.conformance.processes import run_cases
from tests.conformance.suites import Case

class It(unittest.TestCase):
    def test_passes(self):
        pass

    def test_fails(self):
        self.assertEqual(1, 2)

    def test_skips(self):
        self.skipTest("no GPU")

    def test_dies(self):
        os._exit(0)

    def test_hangs(self):
        child = os.fork()
        if child:
            print(child, flush=True)
        time.sleep(60)

cases = [Case("It", name, It) for name in unittest.defaultTestLoader.getTestCaseNames(It)]
reports = list(run_cases(cases, jobs=2, deadline=5.0, output=Path(sys.argv[1])))
print(json.dumps({r.case.test: [r.outcome.value, r.text] for r in reports}))
"""


def test_every_end_of_a_test_is_told_and_none_outlives_it(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = json.loads(run.stdout)
    outcomes = {test: outcome for test, (outcome, _) in told.items()}
    assert outcomes == {
        "test_passes": "passed",
        "test_fails": "FAILED",
        "test_skips": "skipped",
        "test_dies": "FAILED",
        "test_hangs": "FAILED",
    }
    assert "1 != 2" in told["test_fails"][1]
    assert told["test_skips"][1] == "no GPU"
    assert "its leader said nothing" in told["test_dies"][1]
    child = int((tmp_path / "It.test_hangs.log").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
