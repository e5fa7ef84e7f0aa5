"""`za.init`: a world of processes that find each other, wait for each other and leave together."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import DEADLINE
from tests.integration.fleets import until
from tests.integration.worlds import hosted_store, member, members, outcomes, running
from zmq_autograd import RemoteWorker, Worker, current_peer
from zmq_autograd.errors import (
    ConfigurationError,
    DeadlineExceeded,
    ProtocolError,
    WorkerLost,
)
from zmq_autograd.launch.environment import rank_variables, read_environment
from zmq_autograd.launch.member import BARRIER, Member
from zmq_autograd.launch.store import Entry, host_store
from zmq_autograd.launch.world import WorldWorker, init

LOST_SECONDS = 3.0
"""Within which a killed member is known to be lost."""


@pytest.fixture
def port() -> Iterator[int]:
    """Where the members meet."""
    with hosted_store() as port:
        yield port


async def test_members_know_each_other_by_rank_and_by_name(port: int) -> None:
    workers = members(3, port)
    for worker in workers:
        worker.register(lambda x, rank=worker.rank: (rank, x), name="tell")
    async with running(workers):
        for worker in workers:
            assert (worker.name, worker.world_size) == (f"worker{worker.rank}", 3)
            for rank in {0, 1, 2} - {worker.rank}:
                peer = await worker.peer(rank)
                assert await worker.peer(f"worker{rank}") is peer
                assert (peer.name, peer.incarnation) == (peer.name, workers[rank].incarnation)
                assert await peer.call("tell", "x") == (rank, "x")


async def test_two_dozen_members_come_up_and_call_each_other_at_once(port: int) -> None:
    workers = members(24, port)

    @workers[0].register
    async def ask_back(x: int) -> int:
        caller = current_peer()
        assert caller is not None
        answer: int = await caller.call("double", x)
        return answer

    for worker in workers:
        worker.register(lambda x: 2 * x, "double")

    async def ask(worker: WorldWorker) -> int:
        answer: int = await (await worker.peer(0)).call("ask_back", worker.rank)
        return answer

    async with running(workers):
        answers = await asyncio.gather(*(ask(worker) for worker in workers[1:]))
        assert answers == [2 * rank for rank in range(1, 24)]


async def test_a_peer_asked_for_twice_at_once_is_dialled_once(port: int) -> None:
    async with running(members(3, port)) as workers:
        one, other = await asyncio.gather(workers[1].peer(2), workers[1].peer("worker2"))
        assert one is other


async def test_a_peer_that_is_none_is_refused(port: int) -> None:
    async with running(members(2, port)) as workers:
        with pytest.raises(ConfigurationError, match="'worker0', 'worker1', got 'bob'"):
            await workers[0].peer("bob")
        with pytest.raises(ConfigurationError, match=r"a rank below 2 .* got 2"):
            await workers[0].peer(2)
        with pytest.raises(ConfigurationError, match="got 1: itself"):
            await workers[1].peer(1)


async def test_names_are_free_to_choose(port: int) -> None:
    workers = [member(0, 2, port, name="server"), member(1, 2, port)]
    async with running(workers):
        assert (await workers[1].peer("server")).name == "server"
        assert (await workers[0].peer("worker1")).name == "worker1"


@pytest.mark.parametrize("agent_store", [True, False], ids=["agent", "rank 0"])
async def test_two_members_of_one_name_are_refused_everywhere(port: int, agent_store: bool) -> None:
    port = port if agent_store else free_port()
    workers = [
        WorldWorker(
            replace(
                read_environment(rank_variables(rank, 3, master_port=port, run_id="test")),
                agent_store=agent_store,
            ),
            name="a" if rank else "b",
        )
        for rank in range(3)
    ]
    errors = await outcomes(*(worker.start() for worker in workers))
    assert [type(error) for error in errors] == [ConfigurationError] * 3
    assert all("got 'a' for ranks 1 and 2" in str(error) for error in errors)
    assert not any(worker.endpoints for worker in workers)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def test_who_does_not_come_is_named_and_nothing_stays_open(port: int) -> None:
    worker = member(0, 3, port, timeout=0.2)
    with pytest.raises(DeadlineExceeded, match="rank 1, rank 2"):
        await worker.start()
    assert worker.endpoints == []


async def test_joining_can_be_cancelled() -> None:
    store = host_store("127.0.0.1", 0)
    worker = member(0, 2, store.port)
    before = store.num_keys()
    joining = asyncio.ensure_future(worker.start())
    await until(lambda: store.num_keys() > before)  # it is there, and looks for the other one
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    assert worker.endpoints == []


async def test_a_world_can_be_joined_again(port: int) -> None:
    workers = members(2, port)
    lives = set()
    for _ in range(2):
        async with running(workers):
            lives.add((await workers[0].peer(1)).incarnation)
            await asyncio.gather(*(worker.barrier() for worker in workers))
    assert len(lives) == 2


async def test_a_world_may_be_of_one(port: int) -> None:
    async with running(members(1, port)) as [worker]:
        for _ in range(3):
            await worker.barrier()
        await worker.serve_forever()


async def test_a_stranger_cannot_take_part(port: int) -> None:
    async with running(members(2, port)) as workers, Worker("worker1") as stranger:
        coordinator = await stranger.connect(workers[0].endpoints[0])
        with pytest.raises(ProtocolError, match="a member of the world, got worker 'worker1'"):
            await coordinator.call(BARRIER, 0, 5.0)


async def test_whoever_answers_in_a_member_s_place_is_not_taken_for_it() -> None:
    async with Worker("worker1", listen="tcp://127.0.0.1:0") as other, Worker("worker0") as worker:
        entries = [
            Entry(0, "worker0", ("tcp://127.0.0.1:1",), worker.incarnation),
            Entry(1, "worker1", tuple(other.endpoints), "ab" * 16),
        ]
        with pytest.raises(WorkerLost, match=r"'worker1' .*abababab.* answers in its place"):
            await Member(worker, 0, entries).peer(1, 5)


async def test_each_endpoint_of_a_member_is_tried() -> None:
    async with Worker("worker1", listen="tcp://127.0.0.1:0") as other, Worker("worker0") as worker:
        nobody = f"tcp://127.0.0.1:{free_port()}"
        entries = [
            Entry(0, "worker0", (nobody,), worker.incarnation),
            Entry(1, "worker1", (nobody, *other.endpoints), other.incarnation),
        ]
        assert (await Member(worker, 0, entries).peer(1, 0.6)).name == "worker1"


async def test_the_endpoints_of_a_member_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = []

    async def noted(endpoint: str, *, timeout: float) -> RemoteWorker:
        seconds.append(timeout)
        return await Worker.connect(worker, endpoint, timeout=timeout)

    nobody = [f"tcp://127.0.0.1:{free_port()}" for _ in range(3)]
    async with Worker("worker0") as worker:
        entries = [
            Entry(0, "worker0", ("tcp://127.0.0.1:1",), worker.incarnation),
            Entry(1, "worker1", tuple(nobody), "ab" * 16),
        ]
        monkeypatch.setattr(worker, "connect", noted)
        with pytest.raises(WorkerLost, match=f"'worker1'.* nobody answers at {nobody[0]}, "):
            await Member(worker, 0, entries).peer(1, 0.6)
    assert seconds == [pytest.approx(0.2)] * 3


async def test_a_member_that_listens_everywhere_can_be_reached(port: int) -> None:
    workers = members(2, port, listen="tcp://0.0.0.0:0", insecure=True)
    async with running(workers):
        assert (await workers[0].peer(1)).name == "worker1"
        peer = await workers[1].peer(0)
        assert peer.endpoint.startswith("tcp://127.0.0.1:")


async def test_a_member_that_listens_nowhere_is_refused(port: int) -> None:
    with pytest.raises(ConfigurationError, match="has to listen"):
        await member(0, 1, port, listen=[]).start()


async def test_outside_its_block_a_member_waits_for_nothing(port: int) -> None:
    worker = member(0, 1, port)
    for use in (worker.barrier, worker.serve_forever, lambda: worker.peer(1)):
        with pytest.raises(ConfigurationError, match="'worker0' is not running"):
            await use()


# --- the environment -------------------------------------------------------------------------


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in rank_variables(0, 1, master_port=1, run_id=""):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_the_way_to_launch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
    with pytest.raises(ConfigurationError, match=r"RANK, .*: start .*zmq-autograd launch"):
        init()


def test_the_environment_gives_rank_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(
        monkeypatch, RANK="2", WORLD_SIZE="5", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )
    worker = init()
    assert (worker.name, worker.rank, worker.world_size) == ("worker2", 2, 5)


def test_beyond_this_machine_trust_has_to_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    monkeypatch.setattr("zmq_autograd.launch.world._own_address", lambda _: "192.0.2.7")
    set_environment(monkeypatch, **place)
    with pytest.raises(ConfigurationError, match=r"tcp://192\.0\.2\.7:0, beyond this machine"):
        init()
    init(insecure=True)
    set_environment(monkeypatch, **place, LOCAL_WORLD_SIZE="2")
    init()  # all on one machine, whatever its name


def test_a_timeout_has_to_be_one(port: int) -> None:
    with pytest.raises(ConfigurationError, match="seconds above 0, got 0"):
        member(0, 1, port, timeout=0)


# --- processes -------------------------------------------------------------------------------

RING = """
    import asyncio, sys
    import zmq_autograd as za

    async def main():
        worker = za.init()
        got = []

        @worker.register
        async def passed(value, hops):
            got.append(value)
            if hops:
                following = await worker.peer((worker.rank + 1) % worker.world_size)
                return await following.call("passed", value + 1, hops - 1)
            return value

        async with worker:
            if worker.rank == 0:
                first = await worker.peer("worker1")
                assert await first.call("passed", 10, 2) == 12
            await worker.barrier()
            # In one write: under torch's launcher all ranks write to one pipe.
            sys.stdout.write(f"rank {worker.rank} of {worker.world_size} got {got}\\n")

    asyncio.run(main())
"""


async def run(*arguments: str, **variables: str) -> tuple[int | None, str, str]:
    """Run Python in a process of its own and return its exit code, output and errors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(2 * DEADLINE):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_one_script_runs_under_either_launcher(tmp_path: Path) -> None:
    script = tmp_path / "ring.py"
    script.write_text(textwrap.dedent(RING))
    unbuffered = {"PYTHONUNBUFFERED": "1"}
    launched = ("--nproc-per-node", "3", str(script))
    ours = await run("-m", "zmq_autograd", "launch", "-n", "3", str(script), **unbuffered)
    torchs = await run("-m", "torch.distributed.run", *launched, **unbuffered)
    assert (ours[0], torchs[0]) == (0, 0), ours[2] + torchs[2]
    expected = ["rank 0 of 3 got [12]", "rank 1 of 3 got [10]", "rank 2 of 3 got [11]"]
    assert sorted(ours[1].splitlines()) == [f"[{line[5]}] {line}" for line in expected]
    assert sorted(torchs[1].splitlines()) == expected


DEATHS = """
    import asyncio, contextlib, os, signal, time
    import zmq_autograd as za

    async def main():
        worker = za.init()
        arrived = asyncio.Semaphore(0)

        @worker.register
        async def arrive():
            arrived.release()

        async def wait_at_barrier(victim):
            with contextlib.suppress(za.WorkerLost):  # it may die before its answer has left
                await (await worker.peer(victim)).call("arrive")
            began = time.monotonic()
            try:
                await worker.barrier()
            except za.WorkerLost as error:
                print(worker.rank, "lost", error.name, len(error.incarnation), flush=True)
                print("seconds", time.monotonic() - began, flush=True)

        async with worker:
            victim = int(os.environ["VICTIM"])
            if worker.rank == victim:
                for _ in range(worker.world_size - 1):
                    await arrived.acquire()
                os.kill(os.getpid(), signal.SIGKILL)
            await wait_at_barrier(victim)
            began = time.monotonic()
        print("seconds", time.monotonic() - began, flush=True)

    asyncio.run(main())
"""


@pytest.mark.parametrize(("victim", "world_size"), [(0, 2), (2, 3)])
async def test_a_killed_member_is_named_to_all_who_wait_for_it(
    tmp_path: Path, port: int, victim: int, world_size: int
) -> None:
    script = tmp_path / "deaths.py"
    script.write_text(textwrap.dedent(DEATHS))
    places = [
        rank_variables(rank, world_size, master_port=port, run_id="x") for rank in range(world_size)
    ]
    ended = await asyncio.gather(
        *(run(str(script), VICTIM=str(victim), **variables) for variables in places)
    )
    assert ended[victim][0] == -signal.SIGKILL
    for rank in set(range(world_size)) - {victim}:
        code, output, errors = ended[rank]
        assert code == 0, errors
        said, *seconds = output.splitlines()
        assert said == f"{rank} lost worker{victim} 32"
        assert all(float(line.split()[1]) < LOST_SECONDS for line in seconds)
