"""Tests' side of `victim`: runs it, and hears what becomes of those that wait for it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import zmq_autograd as za
from tests.faults.warm import WarmProcess

ROOT: Final = Path(__file__).parents[2]
DEADLINE_SECONDS: Final = 20.0
"""After which a test gives up waiting for what should take milliseconds."""


class Victim:
    """A worker in a process of its own."""

    MODULE: ClassVar = "tests.faults.victim"
    """What runs there."""

    def __init__(
        self,
        name: str,
        *options: str,
        listen: str = "tcp://127.0.0.1:0",
        within: Sequence[str] = (),
    ) -> None:
        """Start the process; `started` waits until it listens.

        Args:
            name: the worker's name.
            options: of the script.
            listen: where it listens.
            within: a command that is to run the process and has its number.
        """
        self.name = name
        self.endpoint = ""
        self.incarnation = ""
        arguments = [name, "--listen", listen, *options]
        self._process: WarmProcess | subprocess.Popen[str]
        if within:
            self._process = subprocess.Popen(
                [*within, sys.executable, "-m", self.MODULE, *arguments],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        else:
            self._process = WarmProcess(self.MODULE, arguments)

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def started(self) -> None:
        """Wait until it listens; blocks."""
        words = self.heard().split()
        assert words[:2] == ["listening", "on"], f"victim {self.name!r} said {words}"
        self.endpoint, self.incarnation = words[2:]

    def heard(self) -> str:
        """Wait for the next line of its standard output; blocks."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self._process.kill()

    def freeze(self) -> None:
        """Stop it where it is; its system goes on answering for it."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to leave."""
        self._process.terminate()

    def wait(self, timeout: float) -> int:
        """Wait for its end and return its exit code; blocks."""
        return self._process.wait(timeout)

    def close(self) -> None:
        """Kill what is left of it."""
        self._process.kill()
        self._process.communicate(timeout=DEADLINE_SECONDS)


@asynccontextmanager
async def running_victim(
    name: str, *options: str, listen: str = "tcp://127.0.0.1:0"
) -> AsyncIterator[Victim]:
    """Run a victim, which is killed on the way out if it still runs."""
    victim = Victim(name, *options, listen=listen)
    try:
        await asyncio.to_thread(victim.started)
        yield victim
    finally:
        await asyncio.to_thread(victim.close)


@asynccontextmanager
async def called_back(worker: za.Worker) -> AsyncIterator[asyncio.Future[za.RemoteWorker]]:
    """Run `worker`, which offers `here`, and give the first that calls it."""
    caller: asyncio.Future[za.RemoteWorker] = asyncio.get_running_loop().create_future()

    @worker.register
    async def here() -> None:
        peer = za.current_peer()
        assert peer is not None
        caller.set_result(peer)

    async with worker:
        yield caller


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with which error, if any, and when, on the monotonic clock."""

    error: za.ZmqAutogradError | None
    ended: float


async def outcome(remote: za.RemoteWorker, function: str, *args: object) -> Outcome:
    """Call `function` and return how that ended."""
    error = None
    try:
        await remote.call(function, *args, timeout=DEADLINE_SECONDS)
    except za.ZmqAutogradError as raised:
        error = raised
    return Outcome(error, time.monotonic())


class Callers:
    """Calls of `wait` that are under way on a victim."""

    def __init__(self, remote: za.RemoteWorker, count: int = 5) -> None:
        self.remote = remote
        self._calls = [asyncio.create_task(outcome(remote, "wait")) for _ in range(count)]

    async def losses(self, struck: float) -> list[float]:
        """Return after how many seconds from `struck` each learned that its worker is lost."""
        outcomes = await asyncio.gather(*self._calls)
        for each in outcomes:
            assert isinstance(each.error, za.WorkerLost), each
            assert each.error.name == self.remote.name
            assert each.error.incarnation == self.remote.incarnation
            assert repr(self.remote.name) in str(each.error)
        assert not self.remote.is_connected
        return [each.ended - struck for each in outcomes]
