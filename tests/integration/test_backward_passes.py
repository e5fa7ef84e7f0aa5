"""Who runs passes: several tasks, handlers, several workers at once, many contexts at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.integration.fleets import Fleet, running, until
from tests.integration.twins import some

pytestmark = pytest.mark.timeout(60)

CHAIN = ("alice", "bob", "carol", "dave")

TRAINERS = 20


@pytest.fixture
async def chain() -> AsyncIterator[Fleet]:
    """Four workers; each has a leaf and functions that use it, or run passes."""
    async with running(*CHAIN) as fleet:
        for name in CHAIN:
            Stage(fleet, name)
        yield fleet


class Stage:
    """What one worker offers."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.w = torch.tensor(2.0, requires_grad=True)
        self._fleet = fleet
        self._name = name
        self._kept: Tensor | None = None
        for function in (self.scale, self.gradient, self.through, self.keep, self.differentiate):
            fleet[name].register(function)

    def scale(self, x: Tensor) -> Tensor:
        return x * self.w

    def gradient(self) -> Tensor | None:
        """Return the gradient of this worker's leaf."""
        return here().gradients().get(self.w)

    async def through(self, path: list[str], x: Tensor) -> Tensor:
        """Scale `x` here, and then on each worker of `path`."""
        y = self.scale(x)
        if not path:
            return y
        way = await self._fleet.way(self._name, path[0])
        z: Tensor = await way.call("through", path[1:], y)
        return z

    def keep(self, x: Tensor) -> Tensor:
        """Keep the result for a pass of this worker's own."""
        self._kept = self.scale(x)
        return self._kept

    async def differentiate(self, times: int, *, retain_graph: bool) -> None:
        """Run passes from what was kept."""
        assert self._kept is not None
        for _ in range(times):
            await here().backward(self._kept.sum(), retain_graph=retain_graph)


def here() -> za.Context:
    context = za.current_context()
    assert context is not None
    return context


async def gradients_in(fleet: Fleet, *paths: list[str]) -> list[float | None]:
    """Return what alice finds for the leaf at the end of each path, asked for along it."""
    bob = await fleet.way("alice", "bob")
    found = []
    for path in paths:
        grad = await (bob.call("ask", path[1:], "gradient") if path[1:] else bob.call("gradient"))
        found.append(None if grad is None else grad.item())
    return found


ALONG = (["bob"], ["bob", "carol"], ["bob", "carol", "dave"])


async def test_a_pass_runs_through_three_hops_and_back(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        y = await bob.call("through", ["carol", "dave"], x)
        await ctx.backward(y)
        assert ctx.gradients()[x].item() == 8
        assert await gradients_in(chain, *ALONG) == [12, 12, 12]
    assert not chain.contexts()


async def test_every_worker_has_its_gradients_whichever_way_they_are_asked_for(
    chain: Fleet,
) -> None:
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        await ctx.backward(await bob.call("through", ["carol", "dave"], torch.tensor(3.0)))
        dave = await chain.way("alice", "dave")  # a way that the context has not taken yet
        assert (await dave.call("gradient")).item() == 12


async def test_every_worker_has_its_gradients_soon_without_being_asked(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    async with chain["alice"].context() as ctx:
        await ctx.backward(await bob.call("through", ["carol", "dave"], torch.tensor(3.0)))

        def found() -> list[int]:
            statuses = (chain[name].status()["contexts"] for name in CHAIN[1:])
            return [status["gradients"] for (status,) in statuses]

        await until(lambda: found() == [1, 1, 1])


async def test_passes_of_several_tasks_run_one_after_another(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        results = [await bob.call("scale", x) for _ in range(10)]
        await asyncio.gather(*(ctx.backward(result * 5) for result in results))
        assert ctx.gradients()[x].item() == 100
        assert await gradients_in(chain, ["bob"]) == [150]


async def test_passes_of_one_graph_by_several_tasks(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        y = await bob.call("through", ["carol"], x)
        await asyncio.gather(*(ctx.backward(y, retain_graph=True) for _ in range(10)))
        assert ctx.gradients()[x].item() == 40
        assert await gradients_in(chain, *ALONG[:2]) == [60, 60]


@pytest.mark.parametrize("path", ALONG, ids=lambda path: path[-1])
async def test_a_handler_runs_a_pass_however_far_from_the_owner(
    chain: Fleet, path: list[str]
) -> None:
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        if path[1:]:
            await bob.call("ask", path[1:], "keep", x)
            await bob.call("ask", [*path[1:-1], path[-1]], "gradient")
        else:
            await bob.call("keep", x)
        way = await chain.way("alice", path[-1])
        # Over a session of its own: it runs at the last worker all the same.
        await way.function("differentiate")(1, retain_graph=False)
        assert ctx.gradients()[x].item() == 2
        assert await gradients_in(chain, path) == [3]
    assert not chain.contexts()


async def test_a_handler_runs_a_pass_while_its_call_is_under_way(chain: Fleet) -> None:
    @chain["carol"].register
    async def learn(x: Tensor) -> float:
        y = x * x
        await here().backward(y)
        return y.item()

    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        inner = 2 * x
        assert await bob.call("ask", ["carol"], "learn", inner) == 36
        assert ctx.gradients()[x].item() == 24
        assert await bob.call("ask", ["carol"], "learn", x + 1) == 16
        assert ctx.gradients()[x].item() == 24 + 8
    assert not chain.contexts()


async def test_several_workers_run_passes_at_once(chain: Fleet) -> None:
    bob, carol = await chain.way("alice", "bob"), await chain.way("alice", "carol")
    x = torch.tensor(3.0, requires_grad=True)
    times = 5
    async with chain["alice"].context() as ctx:
        y, z = await asyncio.gather(bob.call("keep", x), carol.call("keep", x))

        async def differentiate() -> None:
            for _ in range(times):
                await ctx.backward(y * z, retain_graph=True)

        await asyncio.gather(
            differentiate(),
            bob.function("differentiate")(times, retain_graph=True),
            carol.function("differentiate")(times, retain_graph=True),
        )
        assert ctx.gradients()[x].item() == times * (2 * 2 * 3 * 2 + 2 + 2)
        assert (await bob.call("gradient")).item() == times * (3 * 6 + 3)
        assert (await carol.call("gradient")).item() == times * (3 * 6 + 3)


async def test_contexts_at_once_share_parameters_and_nothing_else(chain: Fleet) -> None:
    bob, carol = await chain.way("alice", "bob"), await chain.way("alice", "carol")

    async def train(number: int) -> None:
        x = torch.tensor(float(number), requires_grad=True)
        async with chain["alice"].context() as ctx:
            for step in (1, 2):
                y = await bob.call("through", ["carol"], x)
                await ctx.backward(y * await carol.call("scale", x))
                assert ctx.gradients()[x].item() == step * 16 * number
                assert (await bob.call("gradient")).item() == step * 4 * number**2
                assert (await carol.call("gradient")).item() == step * 8 * number**2

    await asyncio.gather(*(train(number) for number in range(1, TRAINERS + 1)))
    assert not chain.contexts()


async def test_trainers_on_several_workers_use_one_server(chain: Fleet) -> None:
    async def train(name: str, number: int) -> None:
        dave = await chain.way(name, "dave")
        x = torch.tensor(float(number), requires_grad=True)
        for _ in range(5):
            async with chain[name].context() as ctx:
                await ctx.backward(await dave.call("scale", x))
                assert ctx.gradients()[x].item() == 2
                assert (await dave.call("gradient")).item() == number

    await asyncio.gather(*(train(name, number) for number, name in enumerate(CHAIN[:3], start=1)))
    assert not chain.contexts()


async def test_more_gradients_than_a_worker_takes_requests_at_once(chain: Fleet) -> None:
    """Some wait to be sent, and are passed by what needs not wait."""
    calls = 200
    few = za.Limits(requests=4)
    async with za.Worker("erin", limits=few) as erin:
        bob = await erin.connect(chain["bob"].endpoints[0])
        x = torch.tensor(3.0, requires_grad=True)
        async with erin.context() as ctx:
            results = [await bob.call("scale", x) for _ in range(calls)]
            await ctx.backward(torch.stack(results).sum())
            assert ctx.gradients()[x].item() == 2 * calls


async def test_a_worker_may_use_itself(chain: Fleet) -> None:
    itself = await chain.way("alice", "alice")
    x = torch.tensor(3.0, requires_grad=True)
    async with chain["alice"].context() as ctx:
        await ctx.backward(await itself.call("scale", x))
        assert ctx.gradients()[x].item() == 2
        assert (await itself.call("gradient")).item() == 3
    assert not chain.contexts()


async def test_calls_back_to_the_caller_are_in_the_pass(chain: Fleet) -> None:
    @chain["bob"].register
    async def back_and_forth(x: Tensor, depth: int) -> Tensor:
        peer = za.current_peer()
        assert peer is not None
        y = x * 2
        if depth == 0:
            return y
        z: Tensor = await peer.call("back_and_forth", y, depth - 1)
        return z * x

    chain["alice"].register(back_and_forth)
    bob = await chain.way("alice", "bob")
    x = torch.tensor(3.0, requires_grad=True)
    local = torch.tensor(3.0, requires_grad=True)

    def in_one_process(x: Tensor, depth: int) -> Tensor:
        y = x * 2
        return in_one_process(y, depth - 1) * x if depth else y

    in_one_process(local, 5).backward()  # type: ignore[no-untyped-call]
    async with chain["alice"].context() as ctx:
        await ctx.backward(await bob.call("back_and_forth", x, 5))
        assert torch.equal(ctx.gradients()[x], some(local.grad))
    assert not chain.contexts()
