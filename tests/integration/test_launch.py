"""`zmq-autograd launch`: output, exit codes, and that nothing is left behind, whatever happens."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from tests.integration.fleets import until
from zmq_autograd import connect
from zmq_autograd.cli import main
from zmq_autograd.launch.local import launch
from zmq_autograd.launch.store import host_store

DEADLINE = 30.0
Script = Callable[[str], list[str]]

# Two processes per rank that would run for ever: the rank itself and a child of its own.
FOREVER = """
    import os, signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print("started", os.getpid(), child.pid)
    time.sleep(1000)
"""


# With a process's first store libuv opens a pipe that lasts as long as the process.
host_store("127.0.0.1", 0)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Write a script and return the command that runs it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(text))
        return [sys.executable, "-u", str(path)]

    return write


async def launched(command: Sequence[str], world_size: int, *, grace: float = 10) -> int:
    async with asyncio.timeout(DEADLINE):
        return await launch(command, world_size, grace=grace)


async def test_every_line_says_its_rank(script: Script, capfd: pytest.CaptureFixture[str]) -> None:
    program = script("""
        import os, sys
        print("first\\nsecond")
        print("problem", file=sys.stderr)
        print("no newline", end="")
    """)
    assert await launched(program, 2) == 0
    output, errors = capfd.readouterr()
    expected = [f"[{rank}] {line}" for rank in (0, 1) for line in ("first", "no newline", "second")]
    assert sorted(output.splitlines()) == expected
    assert sorted(errors.splitlines()) == ["[0] problem", "[1] problem"]


async def test_lines_are_whole_however_they_are_written(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    program = script("""
        import os
        for _ in range(300):
            os.write(1, b"a" * 1000)
            os.write(1, b"b" * 1000 + b"\\n")
    """)
    assert await launched(program, 3) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == sorted([f"[{r}] " + "a" * 1000 + "b" * 1000 for r in range(3)] * 300)


async def test_a_process_finds_its_place_in_its_environment(
    script: Script, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR OMP_NUM_THREADS"
    program = script(f"""
        import os, sys
        print(*(os.environ[name] for name in "{names}".split()), repr(sys.stdin.read()))
    """)
    assert await launched(program, 2) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "[0] 0 0 2 2 0 127.0.0.1 1 ''",
        "[1] 1 1 2 2 0 127.0.0.1 1 ''",
    ]


async def test_the_first_failure_ends_all_with_its_exit_code(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    program = script("""
        import os, sys, time
        if os.environ["RANK"] == "1":
            sys.exit(7)
        time.sleep(1000)
    """)
    assert await launched(program, 3) == 7
    assert "zmq-autograd launch: rank 1 exited with code 7" in capfd.readouterr().err


async def test_a_process_ended_by_a_signal_is_a_failure(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    program = script("""
        import os, signal, time
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    """)
    assert await launched(program, 2) == 128 + signal.SIGKILL
    assert "rank 0 was ended by SIGKILL" in capfd.readouterr().err


async def test_a_process_that_does_not_end_is_killed_after_the_grace(script: Script) -> None:
    program = script("""
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        other = 1 - int(os.environ["RANK"])
        open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").close()
        if other == 0:
            while not os.path.exists(f"{sys.argv[1]}/{other}"):
                time.sleep(0.01)
            sys.exit(4)
        time.sleep(1000)
    """)
    began = asyncio.get_running_loop().time()
    assert await launched([*program, str(Path(program[-1]).parent)], 2, grace=0.5) == 4
    assert asyncio.get_running_loop().time() - began > 0.5


async def test_what_a_finished_process_left_running_is_ended(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    program = script("""
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid)
    """)
    assert await launched(program, 1) == 0
    await all_gone([int(capfd.readouterr().out.split()[1])])


async def test_a_daemon_that_keeps_the_output_open_is_not_waited_for(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    program = script("""
        import subprocess, sys
        sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
        print(subprocess.Popen(sleeper, start_new_session=True).pid)
    """)
    assert await launched(program, 1) == 0
    os.kill(int(capfd.readouterr().out.split()[1]), signal.SIGKILL)


async def test_cancelling_ends_the_processes(script: Script, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = script("""
        import os, sys, time
        with open(sys.argv[1], "w") as fifo:
            fifo.write(str(os.getpid()))
        time.sleep(1000)
    """)
    launching = asyncio.create_task(launched([*program, str(fifo)], 1))
    pid = int(await asyncio.to_thread(fifo.read_text))
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    await all_gone([pid])


@asynccontextmanager
async def command(
    *arguments: str, cwd: Path | None = None, stdout: int = asyncio.subprocess.PIPE
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the command line in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "zmq_autograd", *arguments),
        stdin=asyncio.subprocess.PIPE,  # open and silent: nobody should read it
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def started(process: asyncio.subprocess.Process, world_size: int) -> list[int]:
    """Wait until every rank says that it runs, and return the processes' numbers."""
    assert process.stdout is not None
    pids: list[int] = []
    for _ in range(world_size):
        line = await process.stdout.readline()
        assert b"started" in line
        pids += map(int, line.split()[2:])
    return pids


async def all_gone(pids: Sequence[int]) -> None:
    """Wait until none of the processes runs."""

    def runs(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    async with asyncio.timeout(5):
        while left := [pid for pid in pids if runs(pid)]:
            await asyncio.sleep(0.01)
    assert not left


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
async def test_a_signal_ends_the_launcher_and_leaves_nothing(
    script: Script, signum: signal.Signals
) -> None:
    async with command("launch", "-n", "2", *script(FOREVER)[2:]) as process:
        pids = await started(process, 2)
        assert len(pids) == 4
        process.send_signal(signum)
        assert await process.wait() == 128 + signum
        await all_gone(pids)


async def test_a_killed_launcher_leaves_nothing(script: Script) -> None:
    async with command("launch", "-n", "2", *script(FOREVER)[2:]) as process:
        pids = await started(process, 2)
        process.kill()
        await all_gone(pids)


async def test_a_second_signal_kills_at_once(script: Script) -> None:
    program = script("""
        import os, signal, time
        signal.signal(signal.SIGINT, lambda *_: print("no"))
        print("started", os.getpid())
        while True:
            time.sleep(1000)
    """)
    async with command("launch", "--grace", "1000", "-n", "1", *program[2:]) as process:
        pids = await started(process, 1)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"[0] no\n"
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 128 + signal.SIGINT
        await all_gone(pids)


async def test_a_closed_output_ends_all(script: Script) -> None:
    program = script("""
        import os, time
        print("started", os.getpid())
        while True:
            print("more")
            time.sleep(0.01)
    """)
    read_end, write_end = os.pipe()
    async with command("launch", "-n", "1", *program[2:], stdout=write_end) as process:
        os.close(write_end)
        pid = int((await asyncio.to_thread(os.read, read_end, 100)).split()[2])
        os.close(read_end)
        assert await process.wait() == 128 + signal.SIGPIPE
        await all_gone([pid])


async def test_a_stalled_output_does_not_hold_up_a_signal(script: Script) -> None:
    program = script("""
        import os
        print("started", os.getpid())
        while True:
            os.write(1, b"more" * 1000 + b"\\n")
    """)
    read_end, write_end = os.pipe()
    async with command("launch", "-n", "1", *program[2:], stdout=write_end) as process:
        pid = int((await asyncio.to_thread(os.read, read_end, 30)).split()[2])
        # Until nothing more fits in: nobody reads on.
        await until(lambda: not select.select([], [write_end], [], 0)[1])
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 128 + signal.SIGTERM
        await all_gone([pid])
    os.close(read_end)
    os.close(write_end)


async def test_a_module_is_launched_by_name_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    tool = "import sys; print(__name__, sys.argv[1:], repr(sys.stdin.read()))"
    (tmp_path / "package" / "tool.py").write_text(tool)
    async with command(
        "launch", "-n", "1", "-m", "package.tool", "-n", "5", "--x", cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert await process.stdout.read() == b"[0] __main__ ['-n', '5', '--x'] ''\n"
        assert await process.wait() == 0


SERVED = """
    import asyncio
    import zmq_autograd as za

    worker = za.Worker("alice")
    begun = asyncio.Event()

    @worker.register
    async def slow():
        begun.set()
        await asyncio.sleep(0.3)
        return "finished"

    @worker.register
    async def wait_until_begun():
        await begun.wait()
"""


async def test_a_worker_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(textwrap.dedent(SERVED))
    endpoints = ["tcp://127.0.0.1:0", f"ipc://{tmp_path}/socket"]
    listen = [f"--listen={endpoint}" for endpoint in endpoints]
    async with command(
        "worker", "served:worker", "--name", "bob", *listen, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        lines = [(await process.stdout.readline()).decode() for _ in endpoints]
        assert lines[1] == f"listening on {endpoints[1]}\n"
        endpoint = lines[0].removeprefix("listening on ").rstrip("\n")
        async with connect(endpoint, timeout=DEADLINE) as bob:
            assert bob.name == "bob"
            call = asyncio.create_task(bob.call("slow"))
            await bob.call("wait_until_begun")
            process.send_signal(signal.SIGTERM)
            assert await call == "finished"
        _, errors = await process.communicate()
        assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("launch -n 0 x.py", "-n/--processes: expected a number of at least 1, got '0'"),
        ("launch -n two x.py", "-n/--processes: expected a number of at least 1, got 'two'"),
        ("launch x.py", "arguments are required: -n/--processes"),
        ("launch -n 1 absent.py", "no such script: absent.py"),
        ("lunch", "invalid choice: 'lunch'"),
    ],
)
def test_a_command_without_sense_is_told(
    arguments: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        main(arguments.split())
    assert info.value.code == 2
    assert problem in capsys.readouterr().err


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out.strip() == version("zmq-autograd")
