"""The program that hangs torch.distributed.autograd, run on both libraries beside a clock.

Alice calls Bob more often than her loss needs: one result is not used, or a call failed and was
tried again.  torch waits for a gradient of every message that was sent, also of those for which
none can come, and no timeout ends that.  Here a pass tells at once which gradients will not come.

Each pair of Alice and Bob has two processes of its own, which are killed if a backward takes
longer than `--seconds`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from asyncio import Barrier, Lock
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import torch
import torch.distributed.autograd as dist_autograd
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor
from torch.distributed import rpc

import zmq_autograd as za

OURS, TORCHS = "zmq_autograd", "torch.distributed.autograd"
PROGRAMS = {
    "used": "every result is used",
    "unused": "one result is unused",
    "retried": "a call is tried again",
}
# What each pair of processes runs.  After a hang there is no next, so torch has two pairs.
PAIRS = (
    (OURS, ("used", "unused", "retried")),
    (TORCHS, ("used", "unused")),
    (TORCHS, ("retried",)),
)
EXPECTED = [2.0, 4.0, 6.0]  # the gradient of sum(x * x), where x is [1, 2, 3]
START_SECONDS = 60
LIFE_SECONDS = 120  # of each of them, even if nobody is left to kill it


# What Bob offers.


def square(x: Tensor, lucky: bool = True) -> Tensor:
    if not lucky:
        raise ValueError("no luck this time")
    return x * x


# The programs with zmq_autograd.


async def our_bob(endpoint: str) -> None:
    async with za.Worker("bob", listen=endpoint) as bob:
        bob.register(square)
        await bob.serve_forever()


async def our_alice(endpoint: str, programs: list[str]) -> None:
    async with za.Worker("alice") as alice:
        bob = await alice.connect(endpoint, timeout=START_SECONDS)
        for program in programs:
            x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
            async with alice.context() as ctx:
                if program == "unused":
                    await bob.call("square", x)
                if program == "retried":
                    with suppress(za.RemoteError):
                        await bob.call("square", x, lucky=False)
                loss = (await bob.call("square", x)).sum()
                started = say_started()
                await ctx.backward(loss)
                say_done(started, ctx.gradients()[x])


# The same with torch.distributed.autograd.


def torchs_bob(store: str) -> None:
    join("bob", 1, store)
    rpc.shutdown()


def torchs_alice(store: str, programs: list[str]) -> None:
    join("alice", 0, store)
    for program in programs:
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        with dist_autograd.context() as context_id:
            if program == "unused":
                rpc.rpc_sync("bob", square, args=(x,))
            if program == "retried":
                with suppress(ValueError):
                    rpc.rpc_sync("bob", square, args=(x, False))
            loss = rpc.rpc_sync("bob", square, args=(x,)).sum()
            started = say_started()
            dist_autograd.backward(context_id, [loss])
            say_done(started, dist_autograd.get_gradients(context_id)[x])
    rpc.shutdown()


def join(name: str, rank: int, store: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=store)
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


# Around them: the processes, and the clock.


def say_started() -> float:
    print("backward", flush=True)
    return time.perf_counter()


def say_done(started: float, gradient: Tensor) -> None:
    milliseconds = 1000 * (time.perf_counter() - started)
    print(f"{milliseconds:.1f} ms: {gradient.tolist()}", flush=True)


def be(name: str, library: str, folder: Path, programs: list[str]) -> None:
    """Be Alice or Bob, as soon as all processes have started."""
    signal.alarm(LIFE_SECONDS)
    # Whatever is distributed: torch imports parts of itself during the first backward of a process.
    torch.autograd.backward([torch.ones(1, requires_grad=True) * 1], [torch.ones(1)])
    print("ready", flush=True)
    sys.stdin.readline()
    if library == TORCHS:
        store = f"file://{folder}/store"
        torchs_bob(store) if name == "bob" else torchs_alice(store, programs)
    else:
        endpoint = f"ipc://{folder}/bob"
        asyncio.run(our_bob(endpoint) if name == "bob" else our_alice(endpoint, programs))


@asynccontextmanager
async def pair(library: str, programs: Sequence[str]) -> AsyncIterator[tuple[Process, Process]]:
    """Start Bob and Alice, each in a process of its own, and kill them in the end."""
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in ("bob", "alice"):
                command = (sys.executable, __file__, "--be", name, library, folder, *programs)
                processes.append(
                    await asyncio.create_subprocess_exec(
                        *command, stdin=PIPE, stdout=PIPE, stderr=PIPE
                    )
                )
            yield processes[0], processes[1]
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
            for process in processes:
                await process.communicate()


async def line_of(process: Process, seconds: float) -> str:
    """Return the next line of a process; TimeoutError if there is none in time."""
    line = await asyncio.wait_for(process.stdout.readline(), seconds)
    if not line:
        raise RuntimeError((await process.stderr.read()).decode())
    return line.decode().strip()


class Clock:
    """The table: what each program came to on each library, or how long it has been waiting."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.results: dict[tuple[str, str], str] = {}
        self.started: dict[tuple[str, str], float] = {}

    async def watch(self, alice: Process, library: str, program: str) -> None:
        """Wait for one backward of Alice's; TimeoutError if it takes too long."""
        key = library, program
        await line_of(alice, START_SECONDS)
        self.started[key] = time.perf_counter()
        try:
            self.results[key] = await line_of(alice, self.seconds)
        except TimeoutError:
            self.results[key] = f"killed after {self.seconds:g} s"
            raise

    def cell(self, library: str, program: str) -> str:
        key = library, program
        if key in self.started and key not in self.results:
            return f"in backward, {time.perf_counter() - self.started[key]:.1f} s"
        return self.results.get(key, "")

    def __rich__(self) -> Table:
        table = Table("", box=box.SIMPLE_HEAD, show_edge=False)
        for library in (OURS, TORCHS):
            table.add_column(library, min_width=24)
        for program, meaning in PROGRAMS.items():
            table.add_row(meaning, self.cell(OURS, program), self.cell(TORCHS, program))
        return table


async def run_pair(
    library: str, programs: Sequence[str], everybody: Barrier, turn: Lock, clock: Clock
) -> None:
    """Run programs one after the other, until one does not come back."""
    async with pair(library, programs) as (bob, alice):
        for process in (bob, alice):
            await line_of(process, START_SECONDS)
        # Others neither start nor set up their connections while the first program is timed.
        await everybody.wait()
        with suppress(TimeoutError):
            async with turn:
                for process in (bob, alice):
                    process.stdin.write(b"go\n")
                await clock.watch(alice, library, programs[0])
            for program in programs[1:]:
                await clock.watch(alice, library, program)


async def run(seconds: float) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    console = Console(highlight=False)
    console.print("loss = sum(x * x), computed by another process; how long backward takes, and")
    console.print("the gradient it ends with:")
    clock = Clock(seconds)
    everybody, turn = Barrier(len(PAIRS)), Lock()
    with Live(clock, console=console):
        async with asyncio.TaskGroup() as tasks:
            for library, programs in PAIRS:
                tasks.create_task(run_pair(library, programs, everybody, turn, clock))
    console.print()
    wrong = [p for p in PROGRAMS if not clock.cell(OURS, p).endswith(f"ms: {EXPECTED}")]
    if wrong:
        sys.exit(f"zmq_autograd did not end with {EXPECTED}: {', '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="how long a backward may take")
    parser.add_argument("--be", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.be:
        name, library, folder, *programs = arguments.be
        be(name, library, Path(folder), programs)
        return
    try:
        asyncio.run(run(arguments.seconds))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("stopped")


if __name__ == "__main__":
    main()
