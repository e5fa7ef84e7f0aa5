"""PyTorch's own tests: a few of every area are run here, all of them by `make conformance`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_part_of_pytorchs_own_tests_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.conformance.run", "--fast", "--output", str(tmp_path)]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].endswith("passed, 0 failed, 0 left out")
