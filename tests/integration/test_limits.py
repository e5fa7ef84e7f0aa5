"""What is too much: messages larger than the peer takes in, more requests than it takes at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from zmq_autograd.wire.messages import Status

pytestmark = pytest.mark.timeout(60)

SMALL = za.Limits(header_bytes=2000, frames=4, frame_bytes=10_000, message_bytes=20_000)


@asynccontextmanager
async def limited(endpoint: str, alice: za.Limits, bob: za.Limits) -> AsyncIterator[Pair]:
    """Run two workers with limits of their own."""
    async with (
        za.Worker("bob", listen=endpoint, limits=bob) as second,
        za.Worker("alice", limits=alice) as first,
    ):
        yield Pair(first, second, await first.connect(second.endpoints[0]))


TOO_LARGE: list[tuple[str, Any]] = [
    ("header", "x" * 2000),
    ("tensor frames", [torch.ones(1) for _ in range(5)]),
    ("frame", torch.ones(2501)),
    ("message", [torch.ones(2400) for _ in range(3)]),
]
FITS: list[Any] = [
    "x" * 1500,
    [torch.ones(1) for _ in range(4)],
    torch.ones(2500),
    [torch.ones(2400) for _ in range(2)],
]


@pytest.mark.parametrize("timeout", [DEADLINE, -1])
async def test_what_did_not_leave_is_not_on_the_graph(timeout: float) -> None:
    async with limited("memory://not-on-the-graph", za.Limits(), SMALL) as pair:
        pair.bob.register(lambda x: x * 2, "f")
        async with pair.alice.context() as ctx:
            x = torch.ones(4 if timeout < 0 else 4000, requires_grad=True)
            with pytest.raises((za.ResourceExhausted, za.ConfigurationError)):
                await pair.remote_bob.call("f", x, timeout=timeout)
            assert pair.alice.status()["contexts"][0]["sends"] == 0
            y = torch.ones(3, requires_grad=True)
            await ctx.backward((await pair.remote_bob.call("f", y)).sum(), timeout=DEADLINE)
            assert ctx.gradients()[y].tolist() == [2, 2, 2]


@pytest.mark.parametrize(("what", "value"), TOO_LARGE, ids=[name for name, _ in TOO_LARGE])
async def test_a_request_that_is_too_large_is_refused_before_it_is_sent(
    endpoint: str, what: str, value: Any
) -> None:
    async with limited(endpoint, za.Limits(), SMALL) as pair:
        calls = []
        pair.bob.register(lambda x: calls.append(1), "f")
        sent = count_sent(pair)
        with pytest.raises(
            za.ResourceExhausted, match=f"'bob' would refuse this message: .*{what}"
        ) as raised:
            await pair.remote_bob.call("f", value)
        assert raised.value.worker == "bob"
        assert not sent
        assert await pair.remote_bob.request(Status())
        assert not calls


def count_sent(pair: Pair) -> list[int]:
    """Return a list that grows with what alice sends to bob."""
    sent: list[int] = []
    link = pair.remote_bob._session._link  # type: ignore[attr-defined]
    send = link.send

    def counting(frames: Any) -> None:
        sent.append(len(frames))
        send(frames)

    link.send = counting
    return sent


@pytest.mark.parametrize(("what", "value"), TOO_LARGE, ids=[name for name, _ in TOO_LARGE])
async def test_a_reply_that_is_too_large_is_refused_before_it_is_sent(
    endpoint: str, what: str, value: Any
) -> None:
    async with limited(endpoint, SMALL, za.Limits()) as pair:
        pair.bob.register(lambda: value, "f")
        with pytest.raises(
            za.ResourceExhausted, match=f"'alice' would refuse this message: .*{what}"
        ) as raised:
            await pair.remote_bob.call("f", timeout=5)
        assert raised.value.path == ("bob",)
        assert await pair.remote_bob.request(Status())


@pytest.mark.parametrize("value", FITS, ids=lambda value: type(value).__name__)
async def test_what_just_fits_passes_both_ways(endpoint: str, value: Any) -> None:
    async with limited(endpoint, SMALL, SMALL) as pair:
        pair.bob.register(lambda x: x, "echo")
        assert type(await pair.remote_bob.call("echo", value)) is type(value)


async def test_gradients_that_are_too_large_are_refused_before_they_are_sent(endpoint: str) -> None:
    async with limited(endpoint, za.Limits(), SMALL) as pair:
        with pytest.raises(za.ResourceExhausted, match="'bob'"):
            await pair.remote_bob.propagate_gradients(
                [torch.ones(10_000)], context_id=1, message_id=1
            )


async def test_a_call_back_is_held_to_the_callers_limits(endpoint: str) -> None:
    async with limited(endpoint, SMALL, za.Limits()) as pair:
        pair.alice.register(lambda x: None, "take")

        @pair.bob.register
        async def give() -> None:
            peer = za.current_peer()
            assert peer is not None
            await peer.call("take", torch.ones(10_000))

        with pytest.raises(za.ResourceExhausted, match="'alice' would refuse") as raised:
            await pair.remote_bob.call("give")
        assert raised.value.worker == "alice"


async def test_an_error_that_is_too_large_is_told_in_fewer_words(endpoint: str) -> None:
    async with limited(endpoint, SMALL, za.Limits()) as pair:

        @pair.bob.register
        def fail() -> None:
            raise ValueError("x" * 3000)

        with pytest.raises(za.ZmqAutogradError) as raised:
            await pair.remote_bob.call("fail", timeout=5)
        assert not isinstance(raised.value, za.DeadlineExceeded)
        assert await pair.remote_bob.request(Status())


# --- how many ------------------------------------------------------------------------------------


async def test_five_thousand_calls_at_once_all_succeed_and_in_order(pair: Pair) -> None:
    seen: list[int] = []
    running = most = 0

    @pair.bob.register
    async def note(number: int) -> int:
        nonlocal running, most
        seen.append(number)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return number

    count = 5 * za.Limits().requests
    results = await asyncio.gather(*(pair.remote_bob.call("note", n) for n in range(count)))
    assert results == list(range(count))
    assert seen == list(range(count))
    assert most <= za.Limits().requests


async def test_no_more_than_the_limit_run_at_once() -> None:
    async with connected(limits=za.Limits(requests=3)) as pair:
        started: list[int] = []
        gates = [asyncio.Event() for _ in range(8)]
        arrived = asyncio.Semaphore(0)

        @pair.bob.register
        async def wait(number: int) -> int:
            started.append(number)
            arrived.release()
            await gates[number].wait()
            return number

        calls = [asyncio.create_task(pair.remote_bob.call("wait", n)) for n in range(8)]
        for _ in range(3):
            await arrived.acquire()
        for ends, begins in ((1, 3), (0, 4), (4, 5), (2, 6)):
            gates[ends].set()
            assert await calls[ends] == ends
            await arrived.acquire()
            assert started[-1] == begins
        for gate in gates:
            gate.set()
        assert await asyncio.gather(*calls) == list(range(8))


async def test_calls_that_wait_for_room_have_their_timeouts() -> None:
    async with connected(limits=za.Limits(requests=1)) as pair:
        gate = asyncio.Event()
        ran: list[int] = []

        @pair.bob.register
        async def wait(number: int) -> None:
            ran.append(number)
            await gate.wait()

        first = asyncio.create_task(pair.remote_bob.call("wait", 0))
        with pytest.raises(za.DeadlineExceeded, match="'bob'"):
            await asyncio.gather(first, pair.remote_bob.call("wait", 1, timeout=0.05))
        gate.set()
        await first
        await pair.remote_bob.call("wait", 2)
        assert ran == [0, 2]


async def test_calls_that_wait_for_room_learn_of_the_loss() -> None:
    async with connected(limits=za.Limits(requests=1), drain=0) as pair:
        started = asyncio.Event()

        @pair.bob.register
        async def wait() -> None:
            started.set()
            await asyncio.Event().wait()

        calls = [asyncio.create_task(pair.remote_bob.call("wait")) for _ in range(5)]
        await started.wait()
        await pair.bob.close()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, za.WorkerLost)
            assert outcome.name == "bob"


async def test_each_peer_has_room_of_its_own() -> None:
    async with connected(limits=za.Limits(requests=1)) as pair, za.Worker("carol") as carol:
        gate = asyncio.Event()
        started = asyncio.Event()

        @pair.bob.register
        async def wait() -> None:
            started.set()
            await gate.wait()

        pair.bob.register(lambda: "through", "f")
        waiting = asyncio.create_task(pair.remote_bob.call("wait"))
        await started.wait()
        remote = await carol.connect(pair.bob.endpoints[0])
        async with asyncio.timeout(DEADLINE):
            assert await remote.call("f") == "through"
        gate.set()
        await waiting


async def test_a_large_result_that_nobody_reads_yet_is_the_one_that_was_returned(
    endpoint: str,
) -> None:
    """More than a link holds in one go: the later replies wait, as they were when returned."""
    async with connected(endpoint) as pair:
        state = torch.zeros(1024 * 1024)

        @pair.bob.register
        async def bump() -> torch.Tensor:
            state.add_(1)
            return state

        results = await asyncio.gather(*(pair.remote_bob.call("bump") for _ in range(12)))
        assert [float(result[0]) for result in results] == [float(n) for n in range(1, 13)]
        assert all(bool(result.eq(result[0]).all()) for result in results)
