"""A context: what is in it, where calls take it, and that nothing of it is left after its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import Pair, memory_endpoint
from tests.integration.fleets import Fleet, running, until

pytestmark = pytest.mark.timeout(60)

CHAIN = ("alice", "bob", "carol", "dave")

CONTEXTS = 200


@pytest.fixture
async def chain() -> AsyncIterator[Fleet]:
    """Four workers, each with `here`, which says in which context it runs."""
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


# --- what is in a context ------------------------------------------------------------------------


async def test_a_context_has_to_be_entered_before_it_is_used(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    chain["bob"].register(torch.nn.Linear(2, 2), "net", expose="module")
    net = await bob.module("net")
    ctx = chain["alice"].context()
    rref = chain["alice"].rref(ones().sum())
    for use in (lambda: ctx.backward(rref), lambda: net.gradients(ctx), ctx.graph):
        with pytest.raises(za.ContextError, match="has not been entered"):
            await use()
    with pytest.raises(za.ContextError, match="has not been entered"):
        ctx.gradients()
    assert not chain.contexts()


async def test_there_is_no_context_outside_of_one(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    assert za.current_context() is None
    assert await bob.call("here") is None
    async with chain["alice"].context() as ctx:
        assert za.current_context() is ctx
        assert 0 < ctx.context_id < 2**64
    assert za.current_context() is None
    assert await bob.call("here") is None
    assert not chain.contexts()


async def test_whatever_a_handler_runs_is_in_the_context(chain: Fleet) -> None:
    @chain["bob"].register
    async def everywhere() -> list[int | None]:
        before = here()
        await asyncio.sleep(0)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(nested_task())
            computing = group.create_task(za.compute(here))
        thread = await asyncio.to_thread(here)
        return [before, here(), *task.result(), computing.result(), await za.compute(here), thread]

    async def nested_task() -> list[int | None]:
        return [here(), await asyncio.create_task(za.compute(here))]

    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        assert await bob.call("here") == ctx.context_id
        assert await bob.call("everywhere") == [ctx.context_id] * 7
    assert await bob.call("everywhere") == [None] * 7


async def test_a_handler_has_its_own_workers_context(chain: Fleet) -> None:
    seen: list[za.Context | None] = []
    chain["bob"].register(lambda: seen.append(za.current_context()), "look")
    async with chain["alice"].context() as ctx:
        bob = await chain.way("alice", "bob")
        await bob.call("look")
        await bob.call("look")
        assert seen[0] is seen[1]
        assert seen[0] is not ctx
        assert seen[0] is not None
        assert "worker 'bob'" in repr(seen[0])
        assert seen[0].context_id == ctx.context_id


async def test_tasks_made_in_a_context_are_in_it(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        tasks = [asyncio.create_task(bob.call("here")) for _ in range(3)]
        assert await asyncio.gather(*tasks) == [ctx.context_id] * 3
        assert await za.compute(here) == ctx.context_id


async def test_tasks_side_by_side_have_contexts_of_their_own(chain: Fleet) -> None:
    both_in = asyncio.Barrier(2)

    async def open_one() -> tuple[int, Any]:
        assert za.current_context() is None
        async with chain["alice"].context() as ctx:
            await both_in.wait()
            return ctx.context_id, await (await chain.way("alice", "bob")).call("here")

    (first, first_there), (second, second_there) = await asyncio.gather(open_one(), open_one())
    assert first == first_there != second == second_there


async def test_calls_without_tensors_take_it_through_three_hops(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        for path in (["carol"], ["carol", "dave"]):
            assert await bob.call("ask", path, "here") == ctx.context_id
        for name, parent in zip(CHAIN, (None, *CHAIN), strict=False):
            (status,) = chain[name].status()["contexts"]
            assert status["context_id"] == ctx.context_id
            assert status["parent"] == parent
            assert status["sends"] == status["receives"] == status["gradients"] == 0
            assert not status["passes"]


async def test_a_handler_may_open_a_context_of_its_worker(chain: Fleet) -> None:
    @chain["bob"].register
    async def open_one() -> list[int | None]:
        carol = await chain.way("bob", "carol")
        async with chain["bob"].context() as ctx:
            return [ctx.context_id, here(), await carol.call("here")]

    bob = await chain.way("alice", "bob")
    seen = await bob.call("open_one")
    assert seen == [seen[0]] * 3
    assert not chain.contexts()


async def test_calls_of_the_librarys_own_take_none_along(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context():
        with pytest.raises(za.NotRegistered):
            await bob.call("za.nothing", ones())
        await bob.request(za.messages.Status())
        assert list(chain.contexts()) == ["alice"]


async def test_connect_gives_a_context_without_a_worker(chain: Fleet) -> None:
    x = ones()
    async with za.connect(chain["bob"].endpoints[0]) as bob, bob.context() as ctx:
        assert za.current_context() is ctx
        assert await bob.call("here") == ctx.context_id
        await ctx.backward((await bob.call("double", x)).sum())
        assert torch.equal(ctx.gradients()[x], torch.tensor([2.0, 2.0]))
    await until(lambda: not chain.contexts())


# --- what cannot be ------------------------------------------------------------------------------


async def test_contexts_do_not_nest(chain: Fleet) -> None:
    @chain["bob"].register
    async def nest() -> None:
        async with chain["bob"].context():
            raise AssertionError("it was entered")

    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        with pytest.raises(za.ContextError, match="do not nest"):
            async with chain["alice"].context():
                raise AssertionError("it was entered")
        with pytest.raises(za.ContextError, match="do not nest"):
            async with ctx:
                raise AssertionError("it was entered")
        with pytest.raises(za.ContextError, match="do not nest"):
            await bob.call("nest")
        assert await bob.call("here") == ctx.context_id
    assert not chain.contexts()


async def test_a_context_belongs_to_one_worker(chain: Fleet) -> None:
    carols = await chain.way("carol", "bob")
    async with chain["alice"].context():
        with pytest.raises(za.ContextError, match="belongs to one worker") as caught:
            await carols.call("here")
        assert caught.value.worker == "bob"
    assert await carols.call("here") is None


async def test_an_ended_context_says_so(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    gate = asyncio.Event()

    async def call_late() -> None:
        await gate.wait()
        await bob.call("here")

    async with chain["alice"].context() as ctx:
        late = asyncio.create_task(call_late())
        y = await bob.call("double", ones())
    gate.set()
    for use in (lambda: late, lambda: ctx.backward(y.sum()), ctx.__aenter__):
        with pytest.raises(za.ContextError, match="has ended") as caught:
            await use()
        assert caught.value.context_id == ctx.context_id
        assert caught.value.worker == "alice"
    with pytest.raises(za.ContextError, match="has ended"):
        ctx.gradients()
    assert za.current_context() is None
    assert not chain.contexts()


async def test_a_worker_that_does_not_run_has_no_contexts() -> None:
    with pytest.raises(za.ConfigurationError, match="not running"):
        za.Worker("alice").context()


async def test_two_hundred_contexts_at_once(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    all_in = asyncio.Barrier(CONTEXTS)
    shared = ones()
    chain["bob"].register(lambda x, scale: scale * x * shared, "scaled")

    async def train(scale: int) -> None:
        x = ones()
        async with chain["alice"].context() as ctx:
            y = await bob.call("scaled", x, float(scale))
            await all_in.wait()
            await ctx.backward(y.sum())
            assert torch.equal(ctx.gradients()[x], torch.full((2,), float(scale)))
            assert torch.equal((await bob.call("gradients"))[0], torch.full((2,), float(scale)))

    await asyncio.gather(*(train(scale) for scale in range(1, CONTEXTS + 1)))
    assert not chain.contexts()
    assert shared.grad is None


async def test_a_worker_does_not_know_contexts_that_no_call_brought(pair: Pair) -> None:
    metadata = za.messages.AutogradMetadata(3, 7)
    with pytest.raises(za.ContextError, match="no autograd context 3"):
        await pair.remote_bob.request(
            za.messages.PropagateGradientsRequest(metadata, [torch.ones(2)], False, 1)
        )
    with pytest.raises(za.ContextError, match="no autograd context 3"):
        await pair.remote_bob.request(za.messages.BackwardRequest(3, 1))
    assert not pair.bob.status()["contexts"]


async def test_a_context_goes_round_to_its_owner_and_is_the_same_there(chain: Fleet) -> None:
    endpoint = memory_endpoint()
    async with za.Worker("erin", listen=endpoint) as erin:
        seen: list[za.Context | None] = []
        erin.register(lambda: seen.append(za.current_context()), "look")

        @chain["bob"].register
        async def back() -> None:
            peer = za.current_peer()
            assert peer is not None
            await peer.call("look")
            again = await chain["bob"].connect(endpoint)  # over a session of its own
            await again.call("look")

        bob = await erin.connect(chain["bob"].endpoints[0])
        async with erin.context() as ctx:
            await bob.call("back")
            assert seen == [ctx, ctx]
        assert not erin.status()["contexts"]
        assert not chain.contexts()
