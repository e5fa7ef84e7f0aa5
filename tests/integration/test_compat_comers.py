"""A dynamic group: workers come and go, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 60.0

Comer = subprocess.Popen[str]


@pytest.fixture
def come(tmp_path: Path) -> Iterator[Callable[[str, int], Comer]]:
    """Start workers, and end those that are left."""
    comers: list[Comer] = []

    def start(name: str, rank: int) -> Comer:
        command = [sys.executable, "-m", "tests.integration.compat_comer", name, str(rank)]
        comers.append(
            subprocess.Popen(
                [*command, str(tmp_path / "store")],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert heard(comers[-1]) == "here"
        return comers[-1]

    yield start
    for comer in comers:
        comer.kill()
        comer.communicate()


def heard(comer: Comer) -> str:
    """Return the next line that a worker says."""
    assert comer.stdout is not None
    return comer.stdout.readline().strip()


def asked_to_call(comer: Comer, name: str) -> str:
    """Have a worker call another; return the result."""
    assert comer.stdin is not None
    comer.stdin.write(f"{name}\n")
    comer.stdin.flush()
    return heard(comer)


def leave(comer: Comer) -> None:
    """Have a worker leave."""
    comer.communicate(timeout=SECONDS)
    assert comer.returncode == 0


def test_a_worker_that_comes_back_is_reached_by_its_name(
    come: Callable[[str, int], Comer],
) -> None:
    stays, goes = come("stays", 0), come("goes", 1)
    assert asked_to_call(stays, "goes") == "3"
    leave(goes)
    back = come("goes", 1)  # another process, on another port
    assert asked_to_call(stays, "goes") == "3"
    assert asked_to_call(back, "stays") == "3"
    leave(back)
    leave(stays)
