"""How tests are run: forked, by a deadline, and with nothing left of them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

from tests.helpers import DEADLINE

ROOT = Path(__file__).parents[2]

# In a process of its own: this one has threads, and is not to be forked.
HEAD = """
import json, os, subprocess, sys, time, unittest
from pathlib import Path
from torch.testing._internal import common_distributed  # what takes its time to import
from tests.conformance.processes import run_cases
from tests.conformance.suites import Case
"""

PROGRAM = (
    HEAD
    + """
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
)

# Two tests at a time, of two processes each, one of which has replaced itself by another program.
ENDLESS = (
    HEAD
    + """
class It(unittest.TestCase):
    def test_one(self):
        fd = int(sys.argv[2])
        if os.fork():
            subprocess.run(["sh", "-c", f"echo -n 1 >&{fd}; sleep 60"], pass_fds=[fd])
        os.write(fd, b"1")
        time.sleep(60)

    test_other = test_one

cases = [Case("It", name, It) for name in ("test_one", "test_other")]
list(run_cases(cases, jobs=2, deadline=600.0, output=Path(sys.argv[1])))
"""
)


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


def test_no_test_outlives_the_killed_runner(tmp_path: Path) -> None:
    # It is held by every process, and so ends with the last of them.
    ending, held = os.pipe()
    with (
        open(ending, "rb", buffering=0) as pipe,
        subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(tmp_path), str(held)], cwd=ROOT, pass_fds=[held]
        ) as run,
    ):
        os.close(held)
        try:
            assert read(pipe, 4) == b"1111"
        finally:
            run.kill()
        assert read(pipe, 1) == b""


def read(pipe: IO[bytes], size: int) -> bytes:
    """Read `size` bytes, fewer at the end; fails if that takes too long."""
    found = b""
    while len(found) < size:
        assert select.select([pipe], [], [], 2 * DEADLINE)[0], f"nothing came after {found!r}"
        got = pipe.read(1)
        if not got:
            break
        found += got
    return found
