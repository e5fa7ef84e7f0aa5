"""Leaving a context: it is gone everywhere, and nothing late brings it back."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE
from tests.integration.fleets import Fleet, running, until

pytestmark = pytest.mark.timeout(60)

CHAIN = ("alice", "bob", "carol", "dave")


@pytest.fixture
async def chain() -> AsyncIterator[Fleet]:
    """Four workers, each with functions that need no context and take it along."""
    async with running(*CHAIN) as fleet:
        for name in CHAIN:
            fleet[name].register(here)
            fleet[name].register(double)
        yield fleet


def here() -> int | None:
    context = za.current_context()
    return None if context is None else context.context_id


def double(x: Tensor) -> Tensor:
    return 2 * x


def ones() -> Tensor:
    return torch.ones(2, requires_grad=True)


async def test_leaving_drops_it_everywhere_however_it_is_left(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")

    async def reach_all() -> None:
        await bob.call("ask", ["carol", "dave"], "double", ones())
        assert list(chain.contexts()) == list(CHAIN)

    async with chain["alice"].context():
        await reach_all()
    assert not chain.contexts()

    async def fail() -> None:
        async with chain["alice"].context():
            await reach_all()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert not chain.contexts()

    async def hold() -> None:
        async with chain["alice"].context():
            await reach_all()
            reached.set()
            await asyncio.Event().wait()

    reached = asyncio.Event()
    holding = asyncio.create_task(hold())
    await asyncio.wait_for(reached.wait(), DEADLINE)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert not chain.contexts()


async def test_cleanup_may_come_twice_and_of_what_never_was(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        await bob.call("ask", ["carol"], "here")
        request = za.messages.CleanupContextRequest(ctx.context_id)
        for cleanup in (request, request, za.messages.CleanupContextRequest(12345)):
            assert await bob.request(cleanup) == za.messages.CleanupContextResponse()
        assert list(chain.contexts()) == ["alice"]
    await bob.request(request)
    assert not chain.contexts()


@pytest.mark.parametrize("busy", ["bob", "carol"])
async def test_leaving_waits_for_a_busy_worker_but_not_for_long(
    chain: Fleet, busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    @chain[busy].handler(za.messages.CleanupContextRequest)
    async def clean_up(request: za.messages.CleanupContextRequest, peer: za.RemoteWorker) -> Any:
        reply = await chain[busy].default_handler(request, peer)
        entered.set()
        await release.wait()
        return reply

    async def use_it() -> None:
        async with chain["alice"].context():
            await bob.call("ask", ["carol", "dave"], "here")

    bob = await chain.way("alice", "bob")
    monkeypatch.setattr("zmq_autograd.engine.contexts.CLEANUP_SECONDS", 4 * DEADLINE)
    using = asyncio.create_task(use_it())
    await asyncio.wait_for(entered.wait(), DEADLINE)
    assert not using.done()
    release.set()
    await asyncio.wait_for(using, DEADLINE)
    assert not chain.contexts()

    release.clear()
    monkeypatch.setattr("zmq_autograd.engine.contexts.CLEANUP_SECONDS", 0.1)
    await asyncio.wait_for(use_it(), DEADLINE)
    release.set()
    assert not chain.contexts()


async def test_leaving_passes_over_lost_workers(
    chain: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmq_autograd.engine.contexts.CLEANUP_SECONDS", 4 * DEADLINE)
    bob, carol = await chain.way("alice", "bob"), await chain.way("alice", "carol")
    async with asyncio.timeout(DEADLINE), chain["alice"].context():
        await bob.call("here")
        await carol.call("ask", ["dave"], "here")
        await chain["carol"].close()
        await until(lambda: not carol.is_connected)
    await until(lambda: not any(chain[name].status()["contexts"] for name in ("bob", "dave")))


async def test_contexts_vanish_with_the_worker_that_owned_them(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    ctx = chain["alice"].context()
    async with ctx:
        await bob.call("ask", ["carol", "dave"], "double", ones())
        assert len(chain.contexts()) == 4
        await chain["alice"].close()
        others = [chain[name] for name in CHAIN[1:]]
        await until(lambda: not any(worker.status()["contexts"] for worker in others))
        with pytest.raises(za.ContextError, match="has ended"):
            ctx.gradients()


async def test_a_context_that_is_kept_holds_nothing_after_its_end(chain: Fleet) -> None:
    found: list[weakref.ref[Tensor]] = []
    kept: list[za.Context | None] = []

    @chain["bob"].register
    def keep() -> None:
        context = za.current_context()
        assert context is not None
        kept.append(context)
        found.extend(weakref.ref(grad) for grad in context.gradients().values())

    w = ones()
    chain["bob"].register(lambda x: x * w, "scale")
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        y = await bob.call("scale", ones())
        await ctx.backward((y * y).sum())
        found.append(weakref.ref(y))
        found.extend(weakref.ref(grad) for grad in ctx.gradients().values())
        del y
        await bob.call("keep")
    gc.collect()
    assert len(found) == 3
    assert [each() for each in found] == [None] * 3


# --- what comes late -----------------------------------------------------------------------------


async def test_a_call_that_outlives_its_context_makes_nothing_anew(chain: Fleet) -> None:
    """It is under way two hops away, in a thread, when the context is left; then it goes on."""
    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @chain["carol"].register
    def wait(x: Tensor) -> Tensor:
        loop.call_soon_threadsafe(begun.set)
        assert release.wait(DEADLINE)
        return 2 * x

    @chain["bob"].register
    async def wait_and_go_on(x: Tensor) -> Tensor:
        y = await (await chain.way("bob", "carol")).call("wait", x)
        dave = await chain.way("bob", "dave")
        result: Tensor = await dave.call("double", y)
        return result

    bob = await chain.way("alice", "bob")
    async with chain["alice"].context():
        call = asyncio.create_task(bob.call("wait_and_go_on", ones()))
        await asyncio.wait_for(begun.wait(), DEADLINE)
    assert not chain.contexts()
    release.set()
    with pytest.raises(za.ContextError):
        await asyncio.wait_for(call, DEADLINE)
    assert not chain.contexts()
    assert await bob.call("here") is None


@pytest.mark.parametrize("delayed", ["bob", "carol"])
async def test_a_call_that_arrives_after_the_cleanup_makes_nothing_anew(
    chain: Fleet, delayed: str
) -> None:
    arrived, release = asyncio.Event(), asyncio.Event()

    @chain[delayed].handler(za.messages.ForwardRequest)
    async def hold_up(request: za.messages.ForwardRequest, peer: za.RemoteWorker) -> Any:
        arrived.set()
        await release.wait()
        return await chain[delayed].default_handler(request, peer)

    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        call = asyncio.create_task(bob.call("ask", ["carol"], "double", ones()))
        await asyncio.wait_for(arrived.wait(), DEADLINE)
    release.set()
    with pytest.raises(za.ContextError, match=str(ctx.context_id)):
        await asyncio.wait_for(call, DEADLINE)
    assert not chain.contexts()


async def test_messages_about_what_has_ended_make_nothing_anew(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        await bob.call("double", ones())
    context_id = ctx.context_id
    metadata = za.messages.AutogradMetadata(context_id, 7)
    refused: list[za.messages.Request] = [
        za.messages.StartPass(context_id, 1),
        za.messages.PropagateGradientsRequest(metadata, [torch.ones(2)], False, 1),
        za.messages.BackwardRequest(context_id, 1),
        za.messages.ForwardRequest("here", (), {}, metadata),
    ]
    for request in refused:
        with pytest.raises(za.ContextError, match=str(context_id)):
            await bob.request(request)
        assert not chain.contexts()
    for taken in (
        za.messages.CommitPass(context_id, 1),
        za.messages.AbortPass(context_id, 1, "remote_error", "boom", "alice"),
    ):
        assert isinstance(await bob.request(taken), taken.reply)
        assert not chain.contexts()
