"""Timeouts and cancellation: how long a caller waits, and what stops on the other side."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected, memory_endpoint
from zmq_autograd.node import current_call
from zmq_autograd.wire.messages import AutogradMetadata, PropagateGradientsRequest, Status

pytestmark = pytest.mark.timeout(30)


class Endless:
    """A coroutine that waits until it is cancelled, and tells of it."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.calls = 0

    async def __call__(self) -> None:
        self.calls += 1
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def eventually(event: asyncio.Event) -> None:
    async with asyncio.timeout(DEADLINE):
        await event.wait()


def remaining() -> float:
    """Return the seconds that the running handler has left."""
    call = current_call.get()
    assert call is not None
    assert call.deadline is not None
    return call.deadline - asyncio.get_running_loop().time()


@asynccontextmanager
async def chained() -> AsyncIterator[tuple[za.RemoteWorker, list[za.Worker]]]:
    """Run w0, w1 ... where each offers ``pass_on``, a call of it on the next, the last "last"."""
    async with AsyncExitStack() as stack:
        workers = [za.Worker(f"w{n}", listen=memory_endpoint()) for n in range(4)]
        for worker in workers:
            await stack.enter_async_context(worker)
        remotes = [await a.connect(b.endpoints[0]) for a, b in itertools.pairwise(workers)]
        for worker, remote, name in zip(
            workers[1:], remotes[1:], ("pass_on", "last"), strict=False
        ):
            worker.register(remote.function(name, timeout=None), "pass_on")
        yield remotes[0], workers


# --- timeouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [-1, -1e-9, -math.inf, math.nan])
async def test_a_timeout_that_makes_no_sense_is_refused(pair: Pair, timeout: float) -> None:
    pair.bob.register(lambda: 1, "f")
    with pytest.raises(ValueError, match="timeout"):
        await pair.remote_bob.call("f", timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        await pair.remote_bob.function("f", timeout=timeout)()
    with pytest.raises(ValueError, match="timeout"):
        await pair.remote_bob.request(Status(), timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        await pair.remote_bob.propagate_gradients([], context_id=1, message_id=1, timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        await pair.alice.connect(pair.bob.endpoints[0], timeout=timeout)
    assert await pair.remote_bob.call("f") == 1


async def test_no_time_is_not_enough(pair: Pair) -> None:
    endless = Endless()
    pair.bob.register(endless, "f")
    with pytest.raises(za.DeadlineExceeded) as raised:
        await pair.remote_bob.call("f", timeout=0)
    assert raised.value.workers == ("bob",)
    assert isinstance(raised.value, TimeoutError)
    assert not endless.calls


@pytest.mark.parametrize("timeout", [1e-300, 1e-6, 0.01])
async def test_a_call_ends_with_its_timeout_and_stops_the_other_side(
    pair: Pair, timeout: float
) -> None:
    endless = Endless()
    pair.bob.register(endless, "f")
    for _ in range(3):
        with pytest.raises(za.DeadlineExceeded, match="'bob'") as raised:
            await pair.remote_bob.call("f", timeout=timeout)
        assert raised.value.workers == ("bob",)
    if endless.calls:
        await eventually(endless.cancelled)


async def test_timeouts_of_many_calls_are_kept_each_on_its_own(pair: Pair) -> None:
    endless = Endless()
    pair.bob.register(endless, "f", concurrency=1000)
    loop = asyncio.get_running_loop()
    ended: list[float] = []

    async def call(timeout: float) -> None:
        with pytest.raises(za.DeadlineExceeded):
            await pair.remote_bob.call("f", timeout=timeout)
        ended.append(timeout)

    timeouts = [0.3, 0.05, 0.2, 0.1]
    started = loop.time()
    await asyncio.gather(*(call(timeout) for timeout in timeouts))
    assert ended == sorted(timeouts)
    assert 0.3 <= loop.time() - started < 0.3 + DEADLINE


@pytest.mark.parametrize("timeout", [None, 1e300, 10**9, 1, torch.tensor(5.0).item(), math.inf])
async def test_a_long_timeout_is_one(pair: Pair, timeout: float | None) -> None:
    pair.bob.register(lambda: 1, "f")
    assert await pair.remote_bob.call("f", timeout=timeout) == 1
    assert await pair.remote_bob.call("f", timeout=timeout) == 1


async def test_a_handler_sees_how_long_it_has() -> None:
    async with connected() as pair:

        @pair.bob.register
        async def left() -> float | None:
            call = current_call.get()
            assert call is not None
            return None if call.deadline is None else remaining()

        found = await pair.remote_bob.call("left", timeout=30)
        assert 29 < found <= 30
        assert await pair.remote_bob.call("left", timeout=None) is None


async def test_deadlines_shrink_from_hop_to_hop() -> None:
    async with chained() as (first, workers):
        last = await workers[2].connect(workers[3].endpoints[0])
        middle = await workers[1].connect(workers[2].endpoints[0])
        spent = threading.Event()

        @workers[3].register
        async def at_last() -> list[float]:
            return [remaining()]

        @workers[2].register
        async def in_between() -> list[float]:
            here = remaining()
            await za.compute(spent.wait, 0.02)
            return [here, *await last.call("at_last", timeout=100)]

        @workers[1].register
        async def at_first() -> list[float]:
            here = remaining()
            await za.compute(spent.wait, 0.02)
            return [here, *await middle.call("in_between", timeout=None)]

        found = await first.call("at_first", timeout=10)
        assert 9 < found[0] <= 10
        assert found[0] - found[1] > 0.02
        assert found[1] - found[2] > 0.02
        # A shorter one on the way holds from there on.
        shorter = middle.function("in_between", timeout=3)
        workers[1].register(lambda: shorter(), "shorter")
        assert 2 < max(await first.call("shorter", timeout=10)) <= 3


async def test_a_deadline_ends_the_whole_chain() -> None:
    async with chained() as (first, workers):
        endless = Endless()
        workers[3].register(endless, "last")
        with pytest.raises(za.DeadlineExceeded):
            await first.call("pass_on", timeout=0.1)
        await eventually(endless.cancelled)


async def test_no_time_left_means_no_call(pair: Pair) -> None:
    """A handler that goes on past its deadline can call nobody any more."""
    called = threading.Event()
    result: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    pair.alice.register(called.set, "called")

    @pair.bob.register
    async def stubborn() -> None:
        peer = za.current_peer()
        assert peer is not None
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            while remaining() > 0:  # the sender's own clock may have been a little ahead
                await asyncio.sleep(0)
            try:
                await peer.call("called")
            except za.DeadlineExceeded as error:
                result.set_result(error)
                raise

    with pytest.raises(za.DeadlineExceeded):
        await pair.remote_bob.call("stubborn", timeout=0.05)
    async with asyncio.timeout(DEADLINE):
        assert isinstance(await result, za.DeadlineExceeded)
    assert not called.is_set()


# --- cancellation --------------------------------------------------------------------------------


async def test_cancelling_a_call_cancels_its_handler(pair: Pair) -> None:
    endless = Endless()
    pair.bob.register(endless, "f")
    calling = asyncio.create_task(pair.remote_bob.call("f"))
    await eventually(endless.started)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    await eventually(endless.cancelled)
    pair.bob.register(lambda: 1, "g")
    assert await pair.remote_bob.call("g") == 1


async def test_cancellation_reaches_three_hops() -> None:
    async with chained() as (first, workers):
        endless = Endless()
        workers[3].register(endless, "last")
        calling = asyncio.create_task(first.call("pass_on"))
        await eventually(endless.started)
        calling.cancel()
        await asyncio.wait([calling])
        assert calling.cancelled()
        await eventually(endless.cancelled)


async def test_cancelling_before_anything_was_sent_calls_nobody(pair: Pair) -> None:
    endless = Endless()
    pair.bob.register(endless, "f")
    pair.bob.register(lambda: 1, "g")
    calling = asyncio.create_task(pair.remote_bob.call("f"))
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await pair.remote_bob.call("g") == 1
    assert not endless.calls


async def test_a_thread_finishes_though_its_call_was_cancelled(pair: Pair) -> None:
    entered = threading.Event()
    gate = threading.Event()

    class Gated:
        finished = 0

        def work(self) -> None:
            entered.set()
            assert gate.wait(DEADLINE)
            self.finished += 1

        async def count(self) -> int:
            return self.finished

    pair.bob.register(Gated(), "gated", expose=("work", "count"))
    calling = asyncio.create_task(pair.remote_bob.call("gated.work"))
    assert await asyncio.to_thread(entered.wait, DEADLINE)
    calling.cancel()
    await asyncio.wait([calling])
    counting = asyncio.create_task(pair.remote_bob.call("gated.count"))
    pair.bob.register(lambda: "through", "probe")
    assert await pair.remote_bob.call("probe") == "through"  # so the count has arrived there
    assert not counting.done()
    gate.set()
    assert await counting == 1


async def test_a_handler_that_ignores_its_cancellation_bothers_nobody(pair: Pair) -> None:
    started = asyncio.Event()
    released = asyncio.Event()

    @pair.bob.register
    async def stubborn() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            released.set()
        return "too late"

    calling = asyncio.create_task(pair.remote_bob.call("stubborn"))
    await eventually(started)
    calling.cancel()
    await eventually(released)
    pair.bob.register(lambda: 1, "f")
    assert await pair.remote_bob.call("f") == 1


async def test_cancelled_calls_make_room_for_others() -> None:
    async with connected(limits=za.Limits(requests=2)) as pair:
        endless = Endless()
        pair.bob.register(endless, "f", concurrency=100)
        pair.bob.register(lambda x: x, "echo")
        calls = [asyncio.create_task(pair.remote_bob.call("f")) for _ in range(6)]
        await eventually(endless.started)
        echo = asyncio.create_task(pair.remote_bob.call("echo", 5))
        for call in reversed(calls):  # those that were never sent first
            call.cancel()
        async with asyncio.timeout(DEADLINE):
            assert await echo == 5
        assert endless.calls == 2


async def test_other_requests_have_timeouts_too(pair: Pair) -> None:
    gate = asyncio.Event()

    @pair.bob.handler(PropagateGradientsRequest)
    async def wait(request: PropagateGradientsRequest, peer: za.RemoteWorker) -> za.messages.Reply:
        await gate.wait()
        return za.messages.PropagateGradientsResponse()

    with pytest.raises(za.DeadlineExceeded):
        await pair.remote_bob.propagate_gradients([], context_id=1, message_id=1, timeout=0.02)
    request = PropagateGradientsRequest(AutogradMetadata(1, 1), [])
    with pytest.raises(za.DeadlineExceeded):
        await pair.remote_bob.request(request, timeout=0.02)
    gate.set()
    assert await pair.remote_bob.request(request)
