"""Members of a world wait for each other: at barriers, before they leave, and while they serve."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest

from tests.helpers import DEADLINE
from tests.integration.fleets import until
from tests.integration.worlds import fail, hosted_store, leave, member, members, outcomes, running
from zmq_autograd import RemoteWorker
from zmq_autograd.errors import DeadlineExceeded, ProtocolError, WorkerLost
from zmq_autograd.launch.member import LOST, WATCH
from zmq_autograd.launch.membership import Membership, Stand
from zmq_autograd.launch.world import WorldWorker


@pytest.fixture
def port() -> Iterator[int]:
    """Where the members meet."""
    with hosted_store() as port:
        yield port


def books(workers: list[WorldWorker]) -> Membership:
    """Return what rank 0 knows of all members."""
    membership = workers[0]._running().membership
    assert membership is not None
    return membership


async def at_barrier(workers: list[WorldWorker], *ranks: int) -> list[asyncio.Task[None]]:
    """Have members come to the barrier, and return once they wait there."""
    waiting = [asyncio.ensure_future(workers[rank].barrier()) for rank in ranks]
    await until(lambda: books(workers)._arrived.issuperset(ranks))
    return waiting


async def serving_of(workers: list[WorldWorker], rank: int) -> asyncio.Future[None]:
    """Have a member serve, and return once it does."""
    return await standing(workers, rank, Stand.SERVING, workers[rank].serve_forever())


async def leaving_of(workers: list[WorldWorker], rank: int) -> asyncio.Future[None]:
    """Have a member leave, and return once it waits for the others."""
    return await standing(workers, rank, Stand.GONE, leave(workers[rank]))


async def standing(
    workers: list[WorldWorker], rank: int, stand: Stand, waiting: Awaitable[None]
) -> asyncio.Future[None]:
    """Start something that waits for others, and return once rank 0 knows of it."""
    task = asyncio.ensure_future(waiting)
    await until(lambda: books(workers)._stands[rank] is stand)
    return task


async def test_a_barrier_holds_until_the_last_any_number_of_times(port: int) -> None:
    async with running(members(3, port)) as workers:
        for number in range(6):
            last = workers[number % 3]
            early = await at_barrier(workers, *({0, 1, 2} - {last.rank}))
            assert not any(task.done() for task in early)
            await asyncio.gather(last.barrier(), *early)


async def test_a_barrier_names_who_is_late_and_may_be_tried_again(port: int) -> None:
    async with running(members(3, port)) as workers:
        for early in (workers[1], workers[0]):
            with pytest.raises(DeadlineExceeded, match="'worker2'") as info:
                await early.barrier(timeout=0.05)
        assert info.value.workers == ("worker2",)
        await workers[2].barrier(timeout=0.05)
        await asyncio.gather(workers[1].barrier(), workers[0].barrier())


async def test_a_member_that_leaves_fails_the_barrier(port: int) -> None:
    async with running(members(3, port)) as workers:
        waiting = await at_barrier(workers, 0, 2)
        leaving = await leaving_of(workers, 1)
        for error in await outcomes(*waiting):
            assert isinstance(error, WorkerLost)
            assert (error.name, error.reason) == ("worker1", "it is leaving")
        await asyncio.gather(leaving, leave(workers[0]), leave(workers[2]))


@pytest.mark.parametrize("failing", [0, 1])
async def test_a_member_whose_block_raised_waits_for_nobody(port: int, failing: int) -> None:
    async with running(members(3, port)) as workers:
        lost = workers[failing].incarnation
        waiting = await at_barrier(workers, *({0, 1, 2} - {failing}))
        async with asyncio.timeout(DEADLINE / 2):
            await fail(workers[failing])
            errors = await outcomes(*waiting)
        for error in errors:
            assert isinstance(error, WorkerLost)
            assert (error.name, error.incarnation) == (f"worker{failing}", lost)


async def test_the_first_cause_is_told_even_when_rank_0_goes_because_of_it(port: int) -> None:
    async def fail_when_lost(worker: WorldWorker) -> None:
        with pytest.raises(WorkerLost, match=r"worker 'worker1'.* is lost: it has left"):
            await worker.barrier()
        await fail(worker)

    async with running(members(3, port)) as workers:
        rank_0 = asyncio.ensure_future(fail_when_lost(workers[0]))
        await until(lambda: 0 in books(workers)._arrived)
        await asyncio.gather(fail(workers[1]), rank_0)
        with pytest.raises(WorkerLost, match=r"worker 'worker1'.* is lost: it has left"):
            await workers[2].barrier()


async def test_a_member_that_fails_as_soon_as_it_has_joined_has_left(port: int) -> None:
    others = members(2, port)
    joining = asyncio.ensure_future(others[0].start())
    with pytest.raises(RuntimeError):
        async with others[1]:
            raise RuntimeError("its block raised")
    await joining
    with pytest.raises(WorkerLost, match="'worker1'"):
        await others[0].barrier()
    await leave(others[0])


async def test_only_rank_0_tells_who_is_lost(port: int) -> None:
    async with running(members(3, port)) as workers:
        with pytest.raises(ProtocolError, match="expected rank 0, got worker 'worker2'"):
            await (await workers[2].peer(1)).call(LOST, "worker0", "ab" * 16, "so I say")
        await asyncio.gather(*(worker.barrier() for worker in workers))


async def test_leaving_waits_for_the_others(port: int) -> None:
    async with running(members(2, port)) as workers:
        for worker in workers:
            worker.register(lambda: "here", name="tell")
        leaving = await leaving_of(workers, 1)
        assert await (await workers[0].peer(1)).call("tell") == "here"
        assert not leaving.done()
        await leave(workers[0])
        await leaving


@pytest.mark.parametrize("first", [0, 1])
async def test_leaving_waits_no_longer_than_its_bound(
    port: int, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    workers = members(2, port)
    workers[first] = member(first, 2, port, timeout=1)
    async with running(workers):
        await leave(workers[first])
        assert f"'worker{first}' leaves before the others" in caplog.text
        # And who comes later does not wait for the one that left.
        async with asyncio.timeout(DEADLINE / 2):
            await leave(workers[1 - first])


async def test_who_serves_goes_when_the_others_have_left(port: int) -> None:
    async with running(members(3, port)) as workers:
        serving = await serving_of(workers, 1)
        await asyncio.gather(workers[0].barrier(), workers[2].barrier())
        leaving = await leaving_of(workers, 0)
        assert not serving.done()
        await asyncio.gather(leave(workers[2]), leaving, serving)


async def test_serving_ends_when_the_worker_is_closed(port: int) -> None:
    async with running(members(2, port)) as workers:
        serving = await serving_of(workers, 1)
        await workers[1].close()
        await serving


async def test_a_signal_ends_serving_and_then_nobody_is_waited_for(port: int) -> None:
    async with running(members(2, port)) as workers:
        serving = await serving_of(workers, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
        async with asyncio.timeout(DEADLINE / 2):
            await leave(workers[1])


async def test_members_are_watched_for_as_long_as_they_live(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = []
    call = RemoteWorker.call

    async def noted(self: RemoteWorker, function: str, *args: Any, timeout: float | None) -> Any:
        if function == WATCH:
            seconds.append(timeout)
        return await call(self, function, *args, timeout=timeout)

    monkeypatch.setattr(RemoteWorker, "call", noted)
    async with running(members(2, port)) as workers:
        await asyncio.gather(*(worker.barrier() for worker in workers))
    assert seconds == [None]
