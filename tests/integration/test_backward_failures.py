"""What an error in a pass, too little time or a cancellation leaves: nothing, but its cause."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from tests.integration.fleets import Fleet, running, until
from tests.integration.twins import far_leaf, near_leaf, on_accumulation, on_gradient

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


# --- errors in a pass -----------------------------------------------------------------------------

COMPLETE = "complete here"

CHAIN = ("alice", "bob", "carol", "dave")


class Fails(torch.autograd.Function):
    """Passes on what it gets, and raises in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("in backward")


class WrongShape(torch.autograd.Function):
    """Passes on what it gets, and makes another gradient of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ones(7)


class Stage:
    """What one worker of a chain offers: it scales by a leaf of its own, and may fail."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.w = torch.tensor(2.0, requires_grad=True)
        self._fleet = fleet
        self._name = name
        for function in (self.scale, self.fail, self.through, self.found):
            fleet[name].register(function)

    def scale(self, x: Tensor) -> Tensor:
        return x * self.w

    def fail(self, x: Tensor) -> Any:
        return Fails.apply(x) * self.w  # type: ignore[no-untyped-call]

    async def through(self, x: Tensor, path: list[str], last: str) -> Tensor:
        """Scale `x` here and along `path`, at whose end `last` is called, and again on the way."""
        way = await self._fleet.way(self._name, path[0])
        if len(path) == 1:
            return self.scale(await way.call(last, self.scale(x)))
        return self.scale(await way.call("through", self.scale(x), path[1:], last))

    def found(self) -> int:
        """Return of how many leaves this worker has gradients in the context."""
        return len(here().gradients())


@pytest.fixture
async def chain() -> AsyncIterator[Fleet]:
    """Four workers."""
    async with running(*CHAIN) as fleet:
        for name in CHAIN:
            Stage(fleet, name)
        yield fleet


async def all_found(fleet: Fleet) -> list[int]:
    """Return of how many leaves each of the others has a gradient in the context."""
    bob = await fleet.way("alice", "bob")
    return [
        await bob.call("found"),
        await bob.call("ask", ["carol"], "found"),
        await bob.call("ask", ["carol", "dave"], "found"),
    ]


async def test_an_error_three_hops_away_aborts_the_pass_everywhere(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        y = await bob.call("through", x, ["carol", "dave"], "fail")
        with pytest.raises(za.RemoteError) as caught:
            await ctx.backward(y)
        error = caught.value
        assert (error.worker, error.type_name) == ("dave", "ZeroDivisionError")
        assert error.message == "in backward"
        assert error.path == ("bob", "carol", "dave")
        assert "in backward" in (error.traceback or "")
        assert not ctx.gradients()
        assert await all_found(chain) == [0, 0, 0]
        assert not any(passes(chain[name]) for name in CHAIN)
        with pytest.raises(za.ContextError, match="earlier pass failed"):
            await ctx.backward(x * 2)
    assert not chain.contexts()
    async with chain["alice"].context() as ctx:
        await ctx.backward(await bob.call("through", x, ["carol", "dave"], "scale"))
        assert ctx.gradients()[x].item() == 32
        assert await all_found(chain) == [1, 1, 1]


async def test_a_worker_that_was_done_already_keeps_nothing_either(chain: Fleet) -> None:
    done = threading.Event()

    def fail_late(_: Tensor) -> None:
        assert done.wait(DEADLINE)
        raise ZeroDivisionError("late")

    @chain["carol"].register
    def hooked(x: Tensor) -> Tensor:
        y = x * 2
        on_gradient(y, fail_late)
        return y

    bob, carol = await chain.way("alice", "bob"), await chain.way("alice", "carol")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        loss = await bob.call("scale", x) + await carol.call("hooked", x)
        backward = asyncio.create_task(ctx.backward(loss, retain_graph=True))
        try:
            await until(lambda: [each["state"] for each in passes(chain["bob"])] == [COMPLETE])
        finally:
            done.set()
        with pytest.raises(za.RemoteError, match="late"):
            await backward
        assert not passes(chain["bob"])
        assert await bob.call("found") == 0
        assert not ctx.gradients()


async def test_an_error_here_is_raised_as_it_is(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    boom = ZeroDivisionError("boom")

    def fail(_: Tensor) -> None:
        raise boom

    on_gradient(x, fail)
    async with chain["alice"].context() as ctx:
        y = await bob.call("through", x, ["carol", "dave"], "scale")
        with pytest.raises(ZeroDivisionError) as caught:
            await ctx.backward(y)
        assert caught.value is boom
        assert not ctx.gradients()
        assert await all_found(chain) == [0, 0, 0]


async def test_an_error_where_a_handler_asked_for_the_pass_is_raised_as_it_is(two: Pair) -> None:
    boom = ZeroDivisionError("boom")

    def fail(_: Tensor) -> None:
        raise boom

    @two.bob.register
    async def learn(x: Tensor) -> bool:
        y = x * x
        on_gradient(y, fail)
        with pytest.raises(ZeroDivisionError) as caught:
            await here().backward(y.sum())
        return caught.value is boom

    async with two.alice.context() as ctx:
        assert await two.remote_bob.call("learn", near_leaf() * 2)
        assert not ctx.gradients()
        with pytest.raises(za.ContextError, match=r"earlier pass failed.*boom"):
            await ctx.backward(near_leaf().sum())


async def test_gradients_of_a_pass_are_there_when_the_call_that_ran_it_failed(two: Pair) -> None:
    x = torch.ones(2, requires_grad=True)

    def slow(_: Tensor) -> None:
        time.sleep(0.1)

    x.register_post_accumulate_grad_hook(slow)  # type: ignore[no-untyped-call]

    @two.bob.register
    async def run_and_fail(y: Tensor) -> None:
        context = za.current_context()
        assert context is not None
        await context.backward((2 * y).sum())
        raise ValueError("on purpose")

    async with two.alice.context() as ctx:
        with pytest.raises(za.RemoteError, match="on purpose"):
            await two.remote_bob.call("run_and_fail", 3 * x)
        assert ctx.gradients()[x].tolist() == [6, 6]


async def test_the_same_pass_may_be_repeated_if_the_graph_was_retained(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    faults = [ZeroDivisionError("boom")]

    def fail_once(_: Tensor) -> None:
        if faults:
            raise faults.pop()

    on_gradient(x, fail_once)
    async with chain["alice"].context() as ctx:
        y = await bob.call("through", x, ["carol"], "scale")
        with pytest.raises(ZeroDivisionError):
            await ctx.backward(y, retain_graph=True)
        await ctx.backward(y, retain_graph=True)
        await ctx.backward(y)
        assert ctx.gradients()[x].item() == 2 * 8


async def test_an_accumulate_hook_that_raises_is_told_on_its_worker(two: Pair) -> None:
    def fail(_: Tensor) -> None:
        raise ZeroDivisionError("accumulating")

    x = near_leaf()
    on_accumulation(x, fail)
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("scale", x)).sum()
        with pytest.raises(ZeroDivisionError, match="accumulating"):
            await ctx.backward(loss, retain_graph=True)
        with pytest.raises(za.ContextError, match="accumulating"):
            ctx.gradients()
        assert await two.remote_bob.call("gradient") is not None  # the pass itself was complete
    assert x.grad is None


async def test_a_function_that_gives_another_shape_is_refused(two: Pair) -> None:
    two.bob.register(WrongShape.apply, "wrong")
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("wrong", near_leaf())
        with pytest.raises(za.RemoteError, match="invalid gradient at index 0"):
            await ctx.backward(y.sum())
        assert not ctx.gradients()


# --- gradients that cannot be ---------------------------------------------------------------------


def changed(pair: Pair, **fields: Any) -> None:
    """Have alice get other gradients than bob has sent."""

    @pair.alice.handler(za.messages.PropagateGradientsRequest)
    async def take_over(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        return await pair.alice.default_handler(dataclasses.replace(request, **fields), peer)


WRONG: dict[str, tuple[list[Tensor | None], str]] = {
    "none": ([], "expected 1 gradients, got 0"),
    "two": ([torch.ones(2, 3), None], "expected 1 gradients, got 2"),
    "another shape": ([torch.ones(3, 2)], r"of shape \[2, 3\].*got \[3, 2\]"),
    "another dtype": ([torch.ones(2, 3).double()], "torch.float32, got .*torch.float64"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_gradients_that_cannot_be_those_of_a_message_abort_the_pass(
    two: Pair, what: str
) -> None:
    grads, text = WRONG[what]
    changed(two, grads=grads)
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", near_leaf())
        with pytest.raises(za.ProtocolError, match=text):
            await ctx.backward(y.sum())
        assert not ctx.gradients()
        assert await two.remote_bob.call("gradient") is None


async def test_a_handler_of_gradients_that_raises_ends_the_pass_with_that(two: Pair) -> None:
    @two.alice.handler(za.messages.PropagateGradientsRequest)
    async def refuse(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        raise ZeroDivisionError("refused")

    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", near_leaf())
        with pytest.raises(za.RemoteError, match="refused"):
            await ctx.backward(y.sum(), timeout=5.0)
        assert not ctx.gradients()


async def test_gradients_may_be_taken_over_late(two: Pair) -> None:
    """A handler of one's own may take its time; the pass is not complete before."""

    @two.alice.handler(za.messages.PropagateGradientsRequest)
    async def take_over(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        await peer.call("scale", torch.ones(3))  # a round trip
        return await two.alice.default_handler(request, peer)

    x = near_leaf()
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("scale", x)).sum())
        assert torch.equal(ctx.gradients()[x], torch.tensor([2.0, 1.0, 3.0]).expand(2, 3))


async def test_gradients_that_come_twice_count_once(two: Pair) -> None:
    @two.alice.handler(za.messages.PropagateGradientsRequest)
    async def take_over_twice(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        await two.alice.default_handler(request, peer)
        return await two.alice.default_handler(request, peer)

    x = near_leaf()
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("scale", x)).sum())
        assert torch.equal(ctx.gradients()[x], torch.tensor([2.0, 1.0, 3.0]).expand(2, 3))
