"""Whole programs without ``async``: those of the docs, and how a program may end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

PAGE = (ROOT / "docs" / "blocking.md").read_text()


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_snippet_prints_what_its_comments_say(snippet: str) -> None:
    expected = re.findall(r"print\(.*\)  # (.*)", snippet)
    done = run_program(snippet)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == expected


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


def test_a_program_may_end_with_everything_open() -> None:
    done = run_program(
        """
import zmq_autograd as za, sys
bob = za.blocking.Worker("bob", listen="tcp://127.0.0.1:0")
bob.start()
alice = za.blocking.Worker("alice").__enter__()
remote = za.blocking.connect(bob.endpoints[0]).__enter__()
ctx = remote.context().__enter__()
bob.register(lambda x: 2 * x, "double")
print(remote.call("double", 4), flush=True)
sys.exit(2)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "8\n", "")


def test_a_forked_child_may_use_it_anew() -> None:
    done = run_program(
        """
import os, sys
import zmq_autograd as za
with za.blocking.Worker("bob", listen="tcp://127.0.0.1:0") as bob:
    bob.register(lambda x: 2 * x, "double")
    late = za.blocking.Worker("late")
    child = os.fork()
    if not child:
        with za.blocking.connect(bob.endpoints[0]) as remote:
            assert remote.call("double", 4) == 8
        with late:
            assert late.connect(bob.endpoints[0]).call("double", 5) == 10
        sys.exit(7)  # leaves bob's block: it is the parent's to close
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with za.blocking.connect(bob.endpoints[0]) as remote:
        assert remote.call("double", 6) == 12
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
