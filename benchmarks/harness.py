"""What the benchmarks share: processes that are asked and answer, turns, ratios and reports.

A process is a module of `peers`.  It reads one JSON command a line and answers with one JSON line;
it lives for the whole run, so that every round meets warm connections.
"""

from __future__ import annotations

import json
import os
import selectors
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

START_SECONDS = 120  # a machine that is busy takes long to start 27 processes
STOP_SECONDS = 5


class Process:
    """A process with one torch thread, ended with the `ExitStack` that it is given."""

    def __init__(self, stack: ExitStack, module: str, *arguments: str) -> None:
        self.module = module
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", f"peers.{module}", *arguments],
            cwd=Path(__file__).parent,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        stack.callback(self._end)

    def endpoint(self) -> str:
        """Wait until it says that it is ready, and return the endpoint that it tells."""
        return self._line(START_SECONDS).removeprefix("ready").strip()

    def ask(self, command: dict[str, Any], seconds: float = 0) -> dict[str, Any]:
        """Return the answer to a command that takes about `seconds`."""
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._line(START_SECONDS + seconds))

    def _line(self, seconds: float) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            readable = selector.select(seconds)
        line = self._process.stdout.readline().decode() if readable else ""
        if not line:
            why = "ended" if readable else f"said nothing for {seconds:.0f} s"
            raise RuntimeError(f"a process of {self.module} {why}")
        return line

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def turn(members: list[T], index: int) -> list[T]:
    """Return all members, starting from another one in each round."""
    first = index % len(members)
    return members[first:] + members[:first]


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def write_report(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
