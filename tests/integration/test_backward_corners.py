"""Corners of a pass: who hears of a commit, who may end it, and what gradients share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import Pair, connected, memory_endpoint
from zmq_autograd.wire import Limits

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    async with connected() as pair:
        pair.bob.register(lambda x: 3 * x, "triple")
        yield pair


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def of_current() -> za.Context:
    context = za.current_context()
    assert context is not None
    return context


async def test_a_worker_that_was_not_in_a_pass_passes_the_word_on() -> None:
    """Pass 1 goes from a to c; x joins after it, and is the way on which pass 2 reaches c first."""
    async with (
        za.Worker("c", listen=memory_endpoint()) as c,
        za.Worker("x", listen=memory_endpoint()) as x,
        za.Worker("a") as a,
    ):
        weight = ones(2)
        c.register(lambda t: weight * t, "scale")
        c.register(lambda: of_current().gradients()[weight], "gradient")
        x_to_c = await x.connect(c.endpoints[0])
        x.register(lambda t: x_to_c.call("scale", t), "relay")
        x.register(lambda: x_to_c.call("gradient"), "gradient")
        to_c, to_x = await a.connect(c.endpoints[0]), await a.connect(x.endpoints[0])
        async with a.context() as ctx:
            await ctx.backward((await to_c.call("scale", ones(2))).sum())
            assert (await to_x.call("gradient")).tolist() == [1, 1]
            await ctx.backward((await to_x.call("relay", ones(2))).sum())
            assert (await to_c.call("gradient")).tolist() == [2, 2]


@pytest.mark.parametrize("requests", [1, 2])
async def test_calls_leave_room_for_what_a_pass_needs(requests: int) -> None:
    async with connected(limits=Limits(requests=requests)) as pair:
        pair.bob.register(lambda x: 3 * x, "triple")
        async with pair.alice.context() as ctx:
            x = ones(2)
            await ctx.backward((await pair.remote_bob.call("triple", x)).sum(), timeout=5)
            assert ctx.gradients()[x].tolist() == [3, 3]


async def test_time_that_runs_out_after_the_end_changes_nothing(two: Pair) -> None:
    """Accumulate hooks run when the pass is complete: they may take as long as they like."""
    x = ones(2)
    released = threading.Event()

    def hold(leaf: Tensor) -> None:
        released.wait(10)

    x.register_post_accumulate_grad_hook(hold)  # type: ignore[no-untyped-call]
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("triple", x)
        asyncio.get_running_loop().call_later(1.0, released.set)
        await ctx.backward(y.sum(), timeout=0.5)
        assert ctx.gradients()[x].tolist() == [3, 3]


async def test_a_message_that_did_not_leave_tells_nobody_of_the_commit(two: Pair) -> None:
    weight = ones(2)
    told = torch.zeros(())
    weight.register_post_accumulate_grad_hook(lambda _: told.fill_(1))  # type: ignore[no-untyped-call]
    two.bob.register(lambda x: weight * x, "scale")
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("scale", ones(2))).sum())
        with pytest.raises(za.SerializationError):
            await two.remote_bob.call("scale", object())
    assert told == 1


@pytest.mark.parametrize("hooked", [False, True])
async def test_gradients_share_no_memory(two: Pair, hooked: bool) -> None:
    first, second, grad = ones(2), ones(2), torch.full((2,), 5.0)
    if hooked:
        for leaf in (first, second):
            leaf.register_hook(lambda grad: None)  # type: ignore[no-untyped-call]
    async with two.alice.context() as ctx:
        inner = first + second
        await ctx.backward(inner, grad, retain_graph=True)
        found = ctx.gradients()
        grad.zero_()
        found[first].mul_(2)
        assert found[second].tolist() == [5, 5]
        await ctx.backward(inner, torch.ones(2), inputs=[inner])
        assert ctx.gradients()[inner].tolist() == [1, 1]


async def test_an_inner_input_gets_what_its_hooks_return(two: Pair) -> None:
    async with two.alice.context() as ctx:
        inner = 2 * await two.remote_bob.call("triple", ones(2))
        inner.register_hook(lambda grad: 10 * grad)
        await ctx.backward((inner * inner).sum(), inputs=[inner])
        assert ctx.gradients()[inner].tolist() == [120, 120]


async def test_a_leaf_frozen_meanwhile_is_passed_over(two: Pair) -> None:
    x, frozen = ones(2), ones(2)
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("triple", x * frozen)
        frozen.requires_grad_(False)
        await ctx.backward(y.sum())
        assert ctx.gradients().keys() == {x}


async def test_sparse_gradients_add_up_and_cross(two: Pair) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    two.bob.register(
        lambda weight: nn.functional.embedding(torch.tensor([1, 1, 3]), weight, sparse=True), "look"
    )
    async with two.alice.context() as ctx:
        far = await two.remote_bob.call("look", table.weight)
        near = table(torch.tensor([0, 1]))
        await ctx.backward([far.sum(), near.sum()])
        found = ctx.gradients()[table.weight]
    assert found.to_dense()[:, 0].tolist() == [1, 3, 0, 1]


async def test_post_accumulate_hooks_of_a_hooked_leaf_may_change_it(two: Pair) -> None:
    x = ones(2)
    x.register_hook(lambda grad: grad)  # type: ignore[no-untyped-call]

    def step(leaf: Tensor) -> None:
        assert leaf.grad is not None
        leaf.sub_(leaf.grad)

    x.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("triple", x)).sum())
    assert x.tolist() == [-2, -2]


async def test_a_context_is_entered_once(two: Pair) -> None:
    ctx = two.alice.context()
    async with ctx:
        pass
    with pytest.raises(za.ContextError, match="it has ended"):
        async with ctx:
            pass


async def test_a_hook_cannot_call_backward(two: Pair) -> None:
    said: list[za.ContextError] = []

    def differentiate(grad: Tensor) -> None:
        coroutine = of_current().backward(grad.sum())
        try:
            coroutine.send(None)
        except za.ContextError as error:
            said.append(error)

    x = ones(2)
    x.register_hook(differentiate)  # type: ignore[no-untyped-call]
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("triple", x)).sum())
    assert "a hook cannot call backward" in str(said[0])


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_what_a_hook_raises_ends_no_event_loop(two: Pair, kind: type[BaseException]) -> None:
    def leave(grad: Tensor) -> None:
        raise kind("from a hook")

    x = ones(2)
    x.register_hook(leave)  # type: ignore[no-untyped-call]
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("triple", x)
        with pytest.raises(kind, match="from a hook"):
            await ctx.backward(y.sum())
    assert (await two.remote_bob.call("triple", torch.ones(1))).tolist() == [3]
