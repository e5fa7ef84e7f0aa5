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
Come = Callable[..., Comer]


@pytest.fixture
def come(tmp_path: Path) -> Iterator[Come]:
    """Start workers, and end those that are left."""
    comers: list[Comer] = []

    def start(name: str, rank: int, says: str = "here") -> Comer:
        command = [sys.executable, "-m", "tests.integration.compat_comer", name, str(rank)]
        comers.append(
            subprocess.Popen(
                [*command, str(tmp_path / "store")],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert heard(comers[-1]) == says
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


def test_a_worker_that_comes_back_is_reached_by_its_name(come: Come) -> None:
    stays, goes = come("stays", 0), come("goes", 1)
    assert asked_to_call(stays, "goes") == "3"
    leave(goes)
    back = come("goes", 1)  # another process, on another port
    assert asked_to_call(stays, "goes") == "3"
    assert asked_to_call(back, "stays") == "3"
    leave(back)
    leave(stays)


def test_a_worker_that_comes_back_is_reached_by_those_that_only_heard_of_it(come: Come) -> None:
    goes, stays = come("goes", 1), come("stays", 0)
    leave(goes)
    back = come("goes", 1)
    assert asked_to_call(stays, "goes") == "3"
    leave(back)
    leave(stays)


def test_the_name_of_a_worker_that_died_may_be_taken_that_of_a_living_one_not(come: Come) -> None:
    stays, dies = come("stays", 0), come("dies", 1)
    assert asked_to_call(stays, "dies") == "3"
    refused = come("dies", 2, says="")
    _, problem = refused.communicate(timeout=SECONDS)
    assert "RPC worker name dies is not unique" in problem
    assert asked_to_call(stays, "dies") == "3"
    dies.kill()
    dies.wait()
    back = come("dies", 1)
    assert asked_to_call(stays, "dies") == "3"
    assert asked_to_call(back, "dies") == "3"
    leave(back)
    leave(stays)
