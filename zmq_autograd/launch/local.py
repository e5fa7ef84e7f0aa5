"""Local processes, started and ended together: what `zmq-autograd launch` runs.

Owns the processes of one world on this machine: their environment, their output, the rule that the
first failure ends all, and the promise that none of them outlives the launcher.  It also hosts the
rendezvous store.  Knows nothing of workers; the processes find each other in `launch.world`.

How nothing is left behind: all processes, and whatever they start in turn, are in one process
group, led by a guardian of two system calls that waits for a pipe to be closed.  The launcher ends
the group when it ends itself; if it is killed outright the system closes its end of the pipe, and
the guardian kills the group.  Only a process that leaves the group on its own account (a daemon
that calls ``setsid``) is out of reach.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from typing import Any, Final, Self

from zmq_autograd.launch.environment import rank_variables
from zmq_autograd.launch.output import Printer, relay
from zmq_autograd.launch.store import host_store

__all__ = ["DEFAULT_GRACE", "launch"]

DEFAULT_GRACE: Final = 10.0
"""Seconds that processes have to end by themselves before they are killed."""

DRAIN_SECONDS: Final = 2.0
"""How long output is waited for once all processes have ended and the terminal takes what it gets:
only a process outside the group can still hold a pipe open."""

STDOUT: Final = 1
STDERR: Final = 2
GUARDIAN: Final = "import os, signal; os.read(0, 1); os.killpg(0, signal.SIGKILL)"
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def launch(command: Sequence[str], world_size: int, *, grace: float = DEFAULT_GRACE) -> int:
    """Run `world_size` processes of one command until all have ended, and return the exit code.

    Each line of their output appears with the process's rank in front.  The first process that
    fails ends the others: SIGTERM, then SIGKILL after `grace`.  SIGINT, SIGTERM and SIGHUP are
    passed on to all processes and end them in the same way; a second one kills them at once.

    Args:
        command: program and arguments, the same for every process.
        world_size: number of processes.
        grace: seconds between asking processes to end and killing them.

    Returns:
        0 if every process returned 0; else the exit code of the first that did not, 128 plus the
        number where a signal ended it, or where one ended the launcher.

    Raises:
        OSError: a process could not be started; those that were are killed.

    Cancelling kills the processes and waits for their end.
    """
    store = host_store("127.0.0.1", 0)  # serves while it is referred to: until this returns
    with ProcessGroup() as group:
        world = _World(group, grace)
        try:
            return await world.run(command, world_size, store.port)
        finally:
            world.close()


class ProcessGroup:
    """A process group that ends with this process, however that ends."""

    def __enter__(self) -> Self:
        # The guardian inherits the blocked signals, so that what is sent to its group passes it by.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", GUARDIAN],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self._guardian.communicate()

    @property
    def id(self) -> int:
        """The group's number, for `subprocess`'s ``process_group``."""
        return self._guardian.pid

    def signal(self, signum: int) -> None:
        """Send a signal to every process of the group."""
        os.killpg(self.id, signum)


@dataclass(frozen=True, slots=True)
class _Ending:
    """Why the processes are made to end before they do so by themselves.

    Attributes:
        exit_code: what the launcher returns.
        signum: the signal that asks the processes to end.
    """

    exit_code: int
    signum: int


class _World:
    """The processes of one launch, from the first start to the last line of output."""

    def __init__(self, group: ProcessGroup, grace: float) -> None:
        self._group = group
        self._grace = grace
        self._printer = Printer()
        # One per process, done when it has ended.
        self._exits: list[asyncio.Task[None]] = []
        # Two per process, done when all it wrote is printed; and notices of our own.
        self._relays: list[asyncio.Task[None]] = []
        # The first reason to end; later ones are consequences.
        self._ending: asyncio.Future[_Ending] = asyncio.get_running_loop().create_future()
        # Whether a signal has asked for the end; a second one sets `hurry`: kill at once.
        self._interrupted = False
        self._hurry = asyncio.Event()

    def close(self) -> None:
        """Print no more."""
        for task in self._relays:
            task.cancel()
        self._printer.close()

    async def run(self, command: Sequence[str], world_size: int, port: int) -> int:
        """Start all, wait for all, print all; returns the launcher's exit code."""
        with _handlers(self._on_signal):
            try:
                await self._start_all(command, world_size, port)
                exit_code = await self._all_ended()
            finally:
                self._ending.cancel()  # if it had no reason yet: what ends now, we have killed
                self._group.signal(signal.SIGKILL)
                if self._exits:
                    await asyncio.wait(self._exits)
            await self._drain()
        return exit_code

    async def _start_all(self, command: Sequence[str], world_size: int, port: int) -> None:
        run_id = secrets.token_hex(8)
        for rank in range(world_size):
            variables = rank_variables(rank, world_size, master_port=port, run_id=run_id)
            process = await self._start(command, rank, _environment(variables, world_size))
            self._exits.append(asyncio.create_task(self._watch(rank, process)))

    async def _all_ended(self) -> int:
        """Wait until all processes have ended or, once one must, until `grace` is over.

        Returns the launcher's exit code.
        """
        everyone: asyncio.Future[Any] = asyncio.gather(*self._exits)
        await asyncio.wait([everyone, self._ending], return_when=asyncio.FIRST_COMPLETED)
        if not self._ending.done():
            return 0
        ending = self._ending.result()
        self._group.signal(ending.signum)
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait(
            [everyone, hurry], timeout=self._grace, return_when=asyncio.FIRST_COMPLETED
        )
        hurry.cancel()
        return ending.exit_code

    async def _start(
        self, command: Sequence[str], rank: int, environment: dict[str, str]
    ) -> asyncio.subprocess.Process:
        # Pipes of our own: with asyncio's, `wait` may last until a grandchild has closed them too.
        ends = [os.pipe() for _ in range(2)]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=ends[0][1],
                stderr=ends[1][1],
                env=environment,
                process_group=self._group.id,
            )
        except BaseException:
            for read_end, _ in ends:
                os.close(read_end)
            raise
        finally:
            for _, write_end in ends:
                os.close(write_end)
        for descriptor, (read_end, _) in zip((STDOUT, STDERR), ends, strict=True):
            self._relays.append(asyncio.create_task(self._relay(rank, descriptor, read_end)))
        return process

    async def _relay(self, rank: int, descriptor: int, read_end: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), FileIO(read_end)
        )
        try:
            await relay(reader, self._printer, descriptor, b"[%d] " % rank)
        except OSError:
            # Whoever read our output is gone: end as a program does that writes to a closed pipe.
            self._end_with(_Ending(128 + signal.SIGPIPE, signal.SIGTERM))
        finally:
            transport.close()

    async def _watch(self, rank: int, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if code > 0:
            self._end_with(_Ending(code, signal.SIGTERM), f"rank {rank} exited with code {code}")
        elif code < 0:
            how = f"was ended by {_signal_name(-code)}"
            self._end_with(_Ending(128 - code, signal.SIGTERM), f"rank {rank} {how}")

    def _on_signal(self, signum: int) -> None:
        if self._ending.done():
            self._hurry.set()
        self._interrupted = True
        self._end_with(_Ending(128 + signum, signum))

    def _end_with(self, ending: _Ending, notice: str = "") -> None:
        """End the world for this reason, unless it is ending already; tell the operator why."""
        if not self._ending.done():
            self._ending.set_result(ending)
            if notice:
                self._relays.append(asyncio.create_task(self._notify(notice)))

    async def _notify(self, text: str) -> None:
        with suppress(OSError):  # nobody is there to read it
            await self._printer.write(STDERR, f"zmq-autograd launch: {text}\n".encode())

    async def _drain(self) -> None:
        """Wait until everything is printed that the processes wrote.

        That lasts until a terminal takes it that takes nothing now (a pager), or a signal comes;
        but only `DRAIN_SECONDS` for a process outside the group that holds a pipe open.
        """
        printed: set[asyncio.Task[None]] = set()
        unprinted = set(self._relays)
        while unprinted:
            done, unprinted = await asyncio.wait(unprinted, timeout=DRAIN_SECONDS)
            printed |= done
            if self._interrupted or not (done or self._printer.busy):
                break
        for task in unprinted:
            task.cancel()
        await asyncio.gather(*unprinted, return_exceptions=True)
        for task in printed:
            task.result()


def _environment(variables: dict[str, str], world_size: int) -> dict[str, str]:
    environment = {**os.environ, **variables}
    if world_size > 1:
        # As under torchrun: so many processes would otherwise each take every core.
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


@contextmanager
def _handlers(handle: Callable[[int], None]) -> Iterator[None]:
    """Let `handle` receive the signals that end a program, those ignored (nohup) excepted."""
    loop = asyncio.get_running_loop()
    caught = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    for signum in caught:
        loop.add_signal_handler(signum, handle, signum)
    try:
        yield
    finally:
        for signum in caught:
            loop.remove_signal_handler(signum)


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
