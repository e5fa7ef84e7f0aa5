"""Passes that run out of time, are cancelled, or are left: they end everywhere."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from tests.integration.twins import far_leaf, near_leaf, on_gradient

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory, the second of which multiplies by a leaf of its own."""
    async with connected() as pair:
        w = far_leaf()
        pair.bob.register(lambda x: x * w, "scale")
        pair.bob.register(lambda: here().gradients().get(w), "gradient")
        yield pair


def here() -> za.Context:
    context = za.current_context()
    assert context is not None
    return context


def passes(worker: za.Worker) -> list[dict[str, Any]]:
    """Return what `worker` says of its passes, in all contexts."""
    return [each for context in worker.status()["contexts"] for each in context["passes"]]


class Blocked:
    """A function on bob in whose result a hook waits until `release`, or the end of the block."""

    def __init__(self, pair: Pair) -> None:
        self.reached = asyncio.Event()
        self._released = threading.Event()
        self._loop = asyncio.get_running_loop()
        pair.bob.register(self.blocked)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self._released.set()

    def blocked(self, x: Tensor) -> Tensor:
        y = x * 2
        on_gradient(y, self._block)
        return y * 3

    def _block(self, _: Tensor) -> None:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self._released.wait(DEADLINE)


@pytest.fixture
async def blocked(two: Pair) -> AsyncIterator[Blocked]:
    with Blocked(two) as blocked:
        yield blocked


async def test_a_pass_that_takes_too_long_names_what_it_waits_for(
    two: Pair, blocked: Blocked
) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("blocked", x)
        started = time.monotonic()
        with pytest.raises(za.DeadlineExceeded) as caught:
            await ctx.backward(y.sum(), timeout=0.2)
        assert 0.2 < time.monotonic() - started < DEADLINE
        assert "bob" in caught.value.workers
        assert caught.value.message_ids
        assert "0.2 s" in str(caught.value)
        assert not ctx.gradients()
        assert not passes(two.alice)
        assert not passes(two.bob)
        blocked.release()
        assert await two.remote_bob.call("gradient") is None
        assert not ctx.gradients()


async def test_a_pass_that_waits_in_vain_for_its_turn_does_no_harm(
    two: Pair, blocked: Blocked
) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("blocked", x)
        running = asyncio.create_task(ctx.backward(y.sum()))
        await asyncio.wait_for(blocked.reached.wait(), DEADLINE)
        queued = asyncio.create_task(ctx.backward((x * 2).sum()))
        with pytest.raises(za.DeadlineExceeded, match="waited for its turn"):
            await ctx.backward((x * 2).sum(), timeout=0.05)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        blocked.release()
        await running
        await ctx.backward((x * 2).sum())
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 6.0 + 2.0))


async def test_time_runs_out_for_a_pass_of_a_handler(two: Pair) -> None:
    """The context's owner is not the one who is told: it holds the pass up."""
    held, released = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold_up(_: Tensor) -> None:
        loop.call_soon_threadsafe(held.set)
        assert released.wait(DEADLINE)

    @two.bob.register
    async def learn(x: Tensor) -> list[str]:
        with pytest.raises(za.DeadlineExceeded) as caught:
            await here().backward((x * x).sum(), retain_graph=True, timeout=0.2)
        assert held.is_set()
        return list(caught.value.workers)

    x = near_leaf()
    inner = x * 2
    on_gradient(inner, hold_up)
    async with two.alice.context() as ctx:
        try:
            assert "alice" in await two.remote_bob.call("learn", inner)
        finally:
            released.set()
        assert not ctx.gradients()
        assert not passes(two.bob)
        await ctx.backward(inner.sum())
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 2.0))


async def test_status_tells_what_a_pass_waits_for(two: Pair, blocked: Blocked) -> None:
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("blocked", near_leaf())
        running = asyncio.create_task(ctx.backward(y.sum()))
        await asyncio.wait_for(blocked.reached.wait(), DEADLINE)
        (here,), (there,) = passes(two.alice), passes(two.bob)
        assert here["pass_id"] == there["pass_id"]
        assert here["workers"] == there["workers"] == ["bob"]
        assert len(here["message_ids"]) == 1
        assert not there["message_ids"]
        blocked.release()
        await running
        assert not passes(two.alice)


@pytest.mark.parametrize("retain_graph", [False, True])
async def test_a_cancelled_pass_is_aborted_everywhere(
    two: Pair, blocked: Blocked, retain_graph: bool
) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("blocked", x)
        running = asyncio.create_task(ctx.backward(y.sum(), retain_graph=retain_graph))
        await asyncio.wait_for(blocked.reached.wait(), DEADLINE)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        blocked.release()
        assert await two.remote_bob.call("gradient") is None
        assert not ctx.gradients()
        if retain_graph:
            await ctx.backward(y.sum())
            assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 6.0))
        else:
            with pytest.raises(za.ContextError, match="given up"):
                await ctx.backward(y.sum())


async def test_leaving_the_context_ends_a_pass_that_runs(two: Pair, blocked: Blocked) -> None:
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("blocked", near_leaf())
        running = asyncio.create_task(ctx.backward(y.sum()))
        await asyncio.wait_for(blocked.reached.wait(), DEADLINE)
    with pytest.raises(za.ContextError, match="has ended"):
        await asyncio.wait_for(running, DEADLINE)
    assert not two.bob.status()["contexts"]
    blocked.release()
