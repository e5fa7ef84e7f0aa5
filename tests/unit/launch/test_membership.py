"""The books of a world: joining, barriers and leaving, without any network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from zmq_autograd.errors import DeadlineExceeded, ProtocolError, WorkerLost
from zmq_autograd.launch.membership import Membership
from zmq_autograd.launch.store import Entry

LONG = 10.0

Outcome = tuple[str, ...]
DONE: Outcome = ("done",)


def members(count: int) -> Membership:
    return Membership([Entry(r, f"worker{r}", ("tcp://x:1",), f"{r}" * 32) for r in range(count)])


async def joined(count: int) -> Membership:
    membership = members(count)
    await together(*(membership.join(rank, LONG) for rank in range(count)))
    return membership


async def outcome(waiting: Awaitable[None]) -> Outcome:
    """Await, and tell how that ended."""
    try:
        await waiting
    except DeadlineExceeded as error:
        return ("late", *error.workers)
    except WorkerLost as error:
        return ("lost", error.name, error.incarnation, error.reason)
    return DONE


async def together(*waiting: Awaitable[None]) -> list[Outcome]:
    async with asyncio.timeout(LONG):
        return await asyncio.gather(*map(outcome, waiting))


async def started(waiting: Awaitable[None]) -> asyncio.Future[None]:
    task = asyncio.ensure_future(waiting)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


def late(*ranks: int) -> Outcome:
    return ("late", *(f"worker{rank}" for rank in ranks))


def lost(rank: int, reason: str) -> Outcome:
    return ("lost", f"worker{rank}", f"{rank}" * 32, reason)


async def test_joining_waits_for_everyone() -> None:
    membership = members(2)
    first = await started(membership.join(0, LONG))
    assert not first.done()
    assert await together(membership.join(1, LONG), first) == [DONE, DONE]


async def test_joining_tells_who_did_not_come() -> None:
    assert await outcome(members(3).join(1, 0)) == late(0, 2)


async def test_joining_tells_who_came_and_was_lost() -> None:
    membership = members(3)
    waiting = [await started(membership.join(rank, LONG)) for rank in (0, 1)]
    membership.lose(1, "killed")
    assert await together(*waiting) == [lost(1, "killed")] * 2


async def test_a_barrier_waits_for_everyone_any_number_of_times() -> None:
    membership = await joined(3)
    for number in range(5):
        early = [await started(membership.barrier(rank, number, LONG)) for rank in (2, 0)]
        assert not any(task.done() for task in early)
        assert await together(membership.barrier(1, number, LONG), *early) == [DONE] * 3


async def test_a_barrier_of_one_is_passed_at_once() -> None:
    membership = await joined(1)
    assert [await outcome(membership.barrier(0, number, 0)) for number in range(3)] == [DONE] * 3


async def test_who_gave_up_waiting_may_come_again() -> None:
    membership = await joined(2)
    assert await outcome(membership.barrier(0, 0, 0)) == late(1)
    again = await started(membership.barrier(0, 0, LONG))
    assert await together(membership.barrier(1, 0, LONG), again) == [DONE, DONE]


async def test_who_gave_up_waiting_had_arrived() -> None:
    membership = await joined(2)
    assert await outcome(membership.barrier(0, 0, 0)) == late(1)
    assert await outcome(membership.barrier(1, 0, 0)) == DONE
    assert await outcome(membership.barrier(0, 0, 0)) == DONE


async def test_a_barrier_ahead_of_the_open_one_is_refused() -> None:
    membership = await joined(2)
    with pytest.raises(ProtocolError, match="worker 'worker1' at barrier 0, got 1"):
        await membership.barrier(1, 1, LONG)


async def test_a_lost_member_fails_the_open_barrier_and_every_later_one() -> None:
    membership = await joined(3)
    waiting = [await started(membership.barrier(rank, 0, LONG)) for rank in (0, 1)]
    membership.lose(2, "killed")
    assert await together(*waiting) == [lost(2, "killed")] * 2
    assert await outcome(membership.barrier(0, 0, LONG)) == lost(2, "killed")


async def test_a_member_lost_after_it_arrived_fails_the_barrier() -> None:
    membership = await joined(3)
    arrived = await started(membership.barrier(1, 0, LONG))
    membership.lose(1, "killed")
    others = [membership.barrier(rank, 0, LONG) for rank in (0, 2)]
    assert await together(*others, arrived) == [lost(1, "killed")] * 3


async def test_a_passed_barrier_stays_passed_when_a_member_is_lost() -> None:
    membership = await joined(2)
    waiting = await started(membership.barrier(0, 0, LONG))
    arriving = asyncio.ensure_future(membership.barrier(1, 0, LONG))
    await asyncio.sleep(0)
    membership.lose(1, "killed")
    assert await together(waiting, arriving) == [DONE, DONE]


async def test_a_member_that_leaves_fails_the_barrier() -> None:
    membership = await joined(2)
    waiting = await started(membership.barrier(0, 0, LONG))
    leaving = await started(membership.leave(1, LONG, serving=False))
    assert await together(waiting) == [lost(1, "it is leaving")]
    assert await together(membership.leave(0, LONG, serving=False), leaving) == [DONE, DONE]


async def test_a_barrier_does_not_wait_for_those_that_only_serve() -> None:
    membership = await joined(3)
    early = await started(membership.barrier(0, 0, LONG))
    serving = await started(membership.leave(1, None, serving=True))
    assert not early.done()
    assert await together(membership.barrier(2, 0, LONG), early) == [DONE, DONE]
    assert not serving.done()


async def test_the_last_to_become_a_server_opens_the_barrier() -> None:
    membership = await joined(2)
    early = await started(membership.barrier(0, 0, LONG))
    serving = await started(membership.leave(1, None, serving=True))
    assert await together(early) == [DONE]
    assert await together(membership.leave(0, LONG, serving=False), serving) == [DONE, DONE]


async def test_a_lost_server_fails_the_barrier() -> None:
    membership = await joined(2)
    serving = await started(membership.leave(1, None, serving=True))
    membership.lose(1, "killed")
    assert await outcome(membership.barrier(0, 0, LONG)) == lost(1, "killed")
    serving.cancel()


async def test_leaving_waits_for_the_others_but_not_for_the_lost() -> None:
    membership = await joined(3)
    leaving = await started(membership.leave(0, LONG, serving=False))
    membership.lose(1, "killed")
    await asyncio.sleep(0)
    assert not leaving.done()
    assert await together(membership.leave(2, LONG, serving=False), leaving) == [DONE, DONE]


async def test_leaving_is_bounded() -> None:
    membership = await joined(3)
    assert await outcome(membership.leave(0, 0, serving=False)) == late(1, 2)


async def test_a_world_of_servers_is_over() -> None:
    membership = await joined(2)
    both = [membership.leave(rank, None, serving=True) for rank in range(2)]
    assert await together(*both) == [DONE, DONE]


async def test_who_left_is_not_lost() -> None:
    membership = await joined(2)
    leaving = await started(membership.leave(1, LONG, serving=False))
    membership.lose(1, "its connection ended")
    assert await outcome(membership.barrier(0, 0, LONG)) == lost(1, "it is leaving")
    leaving.cancel()


async def test_errors_say_what_was_waited_for() -> None:
    membership = await joined(3)
    with pytest.raises(DeadlineExceeded, match="barrier 0: still waiting for 'worker0', 'worker2'"):
        await membership.barrier(1, 0, 0)
    membership.lose(2, "killed")
    with pytest.raises(WorkerLost, match=r"worker 'worker2'.* is lost: killed"):
        await membership.barrier(1, 0, 0)


async def test_when_the_books_are_closed_whoever_waits_learns_that_rank_0_goes() -> None:
    membership = await joined(3)
    barrier = await started(membership.barrier(1, 0, LONG))
    leaving = await started(membership.leave(2, LONG, serving=True))
    membership.close()
    assert await together(barrier, leaving) == [lost(0, "it is leaving")] * 2


async def test_when_the_books_are_closed_an_earlier_loss_comes_first() -> None:
    membership = await joined(3)
    barrier = await started(membership.barrier(1, 0, LONG))
    membership.lose(2, "killed")
    membership.close()
    assert await together(barrier) == [lost(2, "killed")]
