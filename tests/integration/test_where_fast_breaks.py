"""The programs on which torch.distributed.autograd hangs, fails late or leaves things behind.

Its FAST mode waits for a gradient for every message that was sent, so whatever part of a program
gets none holds it up for ever, or until some timeout.  Here each gives what it gives in one process
in well under a second, and nothing stays behind.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE
from tests.integration.fleets import Fleet, running
from tests.integration.twins import on_gradient

pytestmark = pytest.mark.timeout(30)

SECONDS: Final = 1.0
"""That a pass may take."""

CHAIN = ("alice", "bob", "carol")


class Stage:
    """What a worker offers, all of it by way of a leaf of its own."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.w = torch.tensor([1.0, 2.0], requires_grad=True)
        self.failures = 0
        self.kept: list[Tensor] = []
        self.entered = asyncio.Event()
        self.released = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._fleet = fleet
        self._name = name
        for function in (
            self.scale,
            self.nothing,
            self.metric,
            self.two_results,
            self.unreliable,
            self.held_up,
            self.two_losses,
            self.keep_and_return,
            self.nested,
            self.nested_in_vain,
            self.gradient,
        ):
            fleet[name].register(function)

    def scale(self, x: Tensor) -> Tensor:
        return x * self.w

    def nothing(self, x: Tensor) -> None:
        self.kept.append(x * self.w)

    def metric(self, x: Tensor) -> Any:
        return (x * self.w).argmax(), (x * self.w).detach().sum(), 0.5

    def two_results(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.w, x * self.w * 10

    def unreliable(self, x: Tensor) -> Tensor:
        """Fail the first time, after having computed."""
        y = x * self.w
        self.failures += 1
        if self.failures == 1:
            raise ZeroDivisionError("the first time")
        return y

    def held_up(self, x: Tensor) -> Tensor:
        """Wait until released, as a slow worker does."""
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self.released.wait(DEADLINE)
        return x * self.w

    async def two_losses(self, x: Tensor) -> Tensor:
        """Compute two losses with the next worker's help, and return one of them."""
        carol = await self._fleet.way(self._name, "carol")
        first, second = await carol.call("scale", x), await carol.call("scale", x * 2)
        self.kept.append(second.sum())
        result: Tensor = first.sum()
        return result

    def keep_and_return(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return x * self.w

    async def nested(self, x: Tensor, function: str) -> Tensor:
        carol = await self._fleet.way(self._name, "carol")
        y: Tensor = await carol.call(function, x * self.w)
        return y * self.w

    async def nested_in_vain(self, x: Tensor) -> Tensor:
        carol = await self._fleet.way(self._name, "carol")
        await carol.call("scale", x * self.w)
        return x * self.w

    def gradient(self) -> Tensor | None:
        context = za.current_context()
        assert context is not None
        return context.gradients().get(self.w)


class Scene:
    """Three workers, a leaf on the first, and a context that it is in."""

    def __init__(self, fleet: Fleet, stages: dict[str, Stage]) -> None:
        self.fleet = fleet
        self.stages = stages
        self.x = torch.tensor([3.0, 4.0], requires_grad=True)
        self.ctx: za.Context
        self.bob: za.RemoteWorker

    async def backward(self, loss: Tensor, **options: Any) -> None:
        await self.ctx.backward(loss, timeout=SECONDS, **options)

    async def found(self) -> list[list[float] | None]:
        """Return the gradients of the leaves of alice, bob and carol, in this order."""
        grads = [
            self.ctx.gradients().get(self.x),
            await self.bob.call("gradient"),
            await self.bob.call("ask", ["carol"], "gradient"),
        ]
        return [None if grad is None else grad.tolist() for grad in grads]


@asynccontextmanager
async def in_context(fleet: Fleet, stages: dict[str, Stage]) -> AsyncIterator[Scene]:
    scene = Scene(fleet, stages)
    scene.bob = await fleet.way("alice", "bob")
    async with fleet["alice"].context() as scene.ctx:
        yield scene
        for name in CHAIN:
            (context,) = fleet[name].status()["contexts"] or [{"passes": []}]
            assert not context["passes"]
    assert not fleet.contexts()


@pytest.fixture
async def stages() -> AsyncIterator[dict[str, Stage]]:
    async with running(*CHAIN) as fleet:
        yield {name: Stage(fleet, name) for name in CHAIN}


@pytest.fixture
async def scene(stages: dict[str, Stage]) -> AsyncIterator[Scene]:
    async with in_context(stages["alice"]._fleet, stages) as scene:
        yield scene


def of_scale(x: Tensor, times: int = 1) -> list[list[float] | None]:
    """Return what one process finds for ``times`` times the sum of a result of `scale`."""
    near, far = x.detach().requires_grad_(), torch.tensor([1.0, 2.0], requires_grad=True)
    (times * (near * far).sum()).backward()  # type: ignore[no-untyped-call]
    assert near.grad is not None
    assert far.grad is not None
    return [near.grad.tolist(), far.grad.tolist(), None]


# --- what was sent and got no gradient -----------------------------------------------------------


@pytest.mark.parametrize("function", ["scale", "nothing", "metric", "two_results"])
async def test_a_result_that_is_not_used(scene: Scene, function: str) -> None:
    await scene.bob.call(function, scene.x)
    y = await scene.bob.call("scale", scene.x)
    await scene.bob.call(function, scene.x * y)
    await scene.backward(y.sum())
    assert await scene.found() == of_scale(scene.x)


@pytest.mark.parametrize("function", ["scale", "nothing", "metric"])
async def test_no_result_at_all_is_used(scene: Scene, function: str) -> None:
    await scene.bob.call(function, scene.x)
    await scene.backward((scene.x * 3).sum())
    assert await scene.found() == [[3.0, 3.0], None, None]


@pytest.mark.parametrize("used", [0, 1])
async def test_one_of_two_results_is_not_used(scene: Scene, used: int) -> None:
    results = await scene.bob.call("two_results", scene.x)
    await scene.backward(results[used].sum())
    assert await scene.found() == of_scale(scene.x, 10 if used else 1)


async def test_a_result_that_is_used_without_its_graph(scene: Scene) -> None:
    y, z = await scene.bob.call("scale", scene.x), await scene.bob.call("scale", scene.x)
    await scene.backward((y * z.detach()).sum())
    assert await scene.found() == [[3.0, 16.0], [9.0, 32.0], None]


async def test_a_nested_call_whose_result_the_handler_does_not_use(scene: Scene) -> None:
    await scene.backward((await scene.bob.call("nested_in_vain", scene.x)).sum())
    assert await scene.found() == of_scale(scene.x)


async def test_two_losses_of_a_handler_and_backward_on_one(scene: Scene) -> None:
    """What the handler sent for the other one gets no gradient, on a worker that is not ours."""
    await scene.backward(await scene.bob.call("two_losses", scene.x))
    assert await scene.found() == [[1.0, 2.0], None, [3.0, 4.0]]


async def test_two_losses_and_backward_on_one_after_the_other(scene: Scene) -> None:
    first, second = await scene.bob.call("scale", scene.x), await scene.bob.call("scale", scene.x)
    await scene.backward(first.sum())
    assert await scene.found() == of_scale(scene.x)
    await scene.backward(second.sum())
    assert await scene.found() == of_scale(scene.x, 2)


# --- calls that failed ---------------------------------------------------------------------------


async def test_a_call_that_failed_and_was_made_again(scene: Scene) -> None:
    with pytest.raises(za.RemoteError, match="the first time"):
        await scene.bob.call("unreliable", scene.x)
    y = await scene.bob.call("unreliable", scene.x)
    await scene.backward(y.sum())
    assert await scene.found() == of_scale(scene.x)


async def test_a_nested_call_that_failed_and_was_made_again(scene: Scene) -> None:
    with pytest.raises(za.RemoteError, match="the first time") as caught:
        await scene.bob.call("nested", scene.x, "unreliable")
    assert caught.value.worker == "carol"
    await scene.backward((await scene.bob.call("nested", scene.x, "unreliable")).sum())
    assert await scene.found() == [[1.0, 8.0], [6.0, 32.0], [3.0, 16.0]]


async def test_a_call_that_timed_out_and_was_made_again(scene: Scene) -> None:
    """The first one goes on all the while, and after the pass."""
    stage = scene.stages["bob"]
    with releasing(stage):
        with pytest.raises(za.DeadlineExceeded):
            await scene.bob.call("held_up", scene.x, timeout=0.05)
        await asyncio.wait_for(stage.entered.wait(), DEADLINE)
        y = await scene.bob.call("scale", scene.x)
        await scene.backward(y.sum())
        assert await scene.found() == of_scale(scene.x)


async def test_a_nested_call_that_timed_out(scene: Scene) -> None:
    carol = scene.stages["carol"]
    with releasing(carol):
        with pytest.raises(za.DeadlineExceeded):
            await scene.bob.call("nested", scene.x, "held_up", timeout=0.05)
        await asyncio.wait_for(carol.entered.wait(), DEADLINE)
        await scene.backward((await scene.bob.call("nested", scene.x, "scale")).sum())
        assert await scene.found() == [[1.0, 8.0], [6.0, 32.0], [3.0, 16.0]]


async def test_a_call_that_was_cancelled_and_was_made_again(scene: Scene) -> None:
    stage = scene.stages["bob"]
    with releasing(stage):
        call = asyncio.create_task(scene.bob.call("held_up", scene.x))
        await asyncio.wait_for(stage.entered.wait(), DEADLINE)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await scene.backward((await scene.bob.call("scale", scene.x)).sum())
        assert await scene.found() == of_scale(scene.x)


async def test_a_call_that_is_still_under_way(scene: Scene) -> None:
    """It is not in the pass; its result may be used in the next one."""
    stage = scene.stages["bob"]
    with releasing(stage):
        call = asyncio.create_task(scene.bob.call("held_up", scene.x))
        await asyncio.wait_for(stage.entered.wait(), DEADLINE)
        await scene.backward((await scene.bob.call("scale", scene.x)).sum())
        assert await scene.found() == of_scale(scene.x)
        stage.released.set()
        await scene.backward((await call).sum())
        assert await scene.found() == of_scale(scene.x, 2)


@contextmanager
def releasing(stage: Stage) -> Iterator[None]:
    """Let what is held up go on in the end, however the test goes."""
    try:
        yield
    finally:
        stage.released.set()


# --- errors half-way -----------------------------------------------------------------------------


def failing_at(times: set[int]) -> Any:
    """Return a hook that raises when it runs for the so-manieth time, from 1."""
    runs = 0

    def hook(_: Tensor) -> None:
        nonlocal runs
        runs += 1
        if runs in times:
            raise ZeroDivisionError(f"the hook's run number {runs}")

    return hook


async def test_an_error_half_way_leaves_nothing_and_the_next_context_is_fine(
    stages: dict[str, Stage],
) -> None:
    fleet = stages["alice"]._fleet
    on_gradient(stages["carol"].w, failing_at({1}))
    async with in_context(fleet, stages) as scene:
        y = await scene.bob.call("nested", scene.x, "scale")
        with pytest.raises(za.RemoteError, match="run number 1") as caught:
            await scene.backward(y.sum())
        assert caught.value.worker == "carol"
        assert await scene.found() == [None, None, None]
    async with in_context(fleet, stages) as scene:
        await scene.backward((await scene.bob.call("nested", scene.x, "scale")).sum())
        assert await scene.found() == [[1.0, 8.0], [6.0, 32.0], [3.0, 16.0]]


async def test_what_failed_passes_held_is_freed(stages: dict[str, Stage]) -> None:
    fleet = stages["alice"]._fleet
    on_gradient(stages["carol"].w, failing_at({1, 2, 3, 4, 5}))
    received: list[weakref.ref[Tensor]] = []
    fleet["carol"].register(lambda x: self_and_note(x, stages["carol"], received), "noting")
    for _ in range(5):
        async with in_context(fleet, stages) as scene:
            y = await scene.bob.call("nested", scene.x, "noting")
            received.append(weakref.ref(y))
            with pytest.raises(za.RemoteError):
                await scene.backward(y.sum())
            del y
    del scene
    gc.collect()
    assert len(received) == 10
    assert not [each for each in received if each() is not None]


def self_and_note(x: Tensor, stage: Stage, received: list[weakref.ref[Tensor]]) -> Tensor:
    received.append(weakref.ref(x))
    return x * stage.w


async def test_a_hundred_passes_of_which_every_second_fails(stages: dict[str, Stage]) -> None:
    fleet = stages["alice"]._fleet
    on_gradient(stages["bob"].w, failing_at(set(range(2, 101, 2))))
    started = time.monotonic()
    for number in range(1, 101):
        async with in_context(fleet, stages) as scene:
            y = await scene.bob.call("scale", scene.x)
            if number % 2:
                await scene.backward(y.sum())
                assert await scene.found() == of_scale(scene.x)
            else:
                with pytest.raises(za.RemoteError, match=f"run number {number}"):
                    await scene.backward(y.sum())
    assert time.monotonic() - started < DEADLINE


# --- passes at once ------------------------------------------------------------------------------


async def test_two_passes_on_one_context_at_once(scene: Scene) -> None:
    y, z = await scene.bob.call("scale", scene.x), await scene.bob.call("scale", scene.x)
    await asyncio.gather(scene.backward(y.sum()), scene.backward(z.sum()))
    assert await scene.found() == of_scale(scene.x, 2)


async def test_two_passes_at_once_over_one_graph(scene: Scene) -> None:
    y = (await scene.bob.call("scale", scene.x)).sum()
    await asyncio.gather(*(scene.backward(y, retain_graph=True) for _ in range(2)))
    assert await scene.found() == of_scale(scene.x, 2)


async def test_a_pass_on_another_context_while_one_fails(stages: dict[str, Stage]) -> None:
    fleet = stages["alice"]._fleet
    hook = failing_at({1})
    fleet["bob"].register(lambda x: hooked(x * 2, hook), "fail")

    async def succeed() -> None:
        async with in_context_of_its_own(fleet, stages) as scene:
            await scene.backward((await scene.bob.call("scale", scene.x)).sum())
            assert await scene.found() == of_scale(scene.x)

    async def fail() -> None:
        async with in_context_of_its_own(fleet, stages) as scene:
            y = await scene.bob.call("fail", scene.x)
            with pytest.raises(za.RemoteError, match="run number 1"):
                await scene.backward(y.sum())

    await asyncio.gather(succeed(), fail(), succeed())
    assert not fleet.contexts()


def hooked(x: Tensor, hook: Any) -> Tensor:
    on_gradient(x, hook)
    return x


@asynccontextmanager
async def in_context_of_its_own(fleet: Fleet, stages: dict[str, Stage]) -> AsyncIterator[Scene]:
    """Give a scene among others that go on at the same time."""
    scene = Scene(fleet, stages)
    scene.bob = await fleet.way("alice", "bob")
    async with fleet["alice"].context() as scene.ctx:
        yield scene
