"""Processes forked from one that has imported torch already, which takes a new one seconds.

`multiprocessing`'s fork server is that one: `start` has it running before the first test, so that
no test seems to leave it behind.
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Final

_CONTEXT: Final = multiprocessing.get_context("forkserver")


def start(*modules: str) -> None:
    """Start the process that others are forked from, with `modules` imported."""
    _CONTEXT.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


class WarmProcess:
    """What a test uses of `subprocess.Popen`, for a module's ``async def main()``.

    Attributes:
        stdin: the process's standard input, by lines.
        stdout: its standard output.
    """

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        """Run `main` of `module` with these arguments in a process of its own."""
        its_stdin, self._near_stdin = _CONTEXT.Pipe(duplex=False)
        self._near_stdout, its_stdout = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run, args=(module, arguments, its_stdin, its_stdout)
        )
        self._process.start()
        its_stdin.close()
        its_stdout.close()
        self.stdin = os.fdopen(self._near_stdin.fileno(), "w", buffering=1, closefd=False)
        self.stdout = os.fdopen(self._near_stdout.fileno(), closefd=False)

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once, unless it has ended."""
        self._process.kill()

    def terminate(self) -> None:
        """Ask it to leave, unless it has ended."""
        self._process.terminate()

    def wait(self, timeout: float) -> int:
        """Wait for its end and return its exit code, that of a signal negative; blocks."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return code

    def communicate(self, timeout: float) -> None:
        """Wait for its end, and close the pipes to it; blocks."""
        self.wait(timeout)
        self.stdin.close()
        self.stdout.close()
        self._near_stdin.close()
        self._near_stdout.close()
        self._process.close()


def _run(module: str, arguments: Sequence[str], stdin: Connection, stdout: Connection) -> None:
    """Be the process: as if `module` had been run with these arguments, and those pipes."""
    os.dup2(stdin.fileno(), 0)
    os.dup2(stdout.fileno(), 1)
    stdin.close()
    stdout.close()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.argv = [module, *arguments]
    asyncio.run(importlib.import_module(module).main())
