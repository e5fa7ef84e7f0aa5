"""What backward refuses: roots that cannot be, graphs that are freed, tensors from elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import Pair, connected
from tests.integration.twins import far_leaf, near_leaf

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory, the second of which multiplies by a leaf of its own."""
    async with connected() as pair:
        w = far_leaf()
        pair.bob.register(lambda x: x * w, "scale")
        yield pair


# --- what it cannot start from -------------------------------------------------------------------

leaf = near_leaf()
scalar = (leaf * 2).sum()

REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no roots": (([],), {}, "roots: expected a tensor or several"),
    "no tensor": ((3.0,), {}, "roots: expected a tensor or several, got 3.0"),
    "not all are tensors": (([scalar, None],), {}, "roots: expected tensors, got None"),
    "does not require grad": ((leaf.detach(),), {}, "does not require grad and has no grad_fn"),
    "no gradient": ((leaf,), {}, "only for scalar outputs: a root of shape [2, 3]"),
    "no gradient of a complex one": ((scalar.to(torch.cfloat),), {}, "real scalar outputs"),
    "too few gradients": (([scalar, scalar], [None]), {}, "expected 2, one for each root, got 1"),
    "one gradient for two": (([scalar, scalar], torch.ones(())), {}, "expected 2"),
    "gradient of another shape": ((leaf, torch.ones(3)), {}, "expected shape [2, 3]"),
    "gradient of another kind": ((leaf, torch.ones(2, 3, dtype=torch.cfloat)), {}, "[2, 3]"),
    "gradient is no tensor": ((scalar, [1.0]), {}, "expected tensors or None, got 1.0"),
    "no inputs": ((scalar,), {"inputs": []}, "inputs: expected a tensor or several"),
    "inputs require no grad": ((scalar,), {"inputs": leaf.detach()}, "input: expected a tensor"),
    "create_graph": ((scalar,), {"create_graph": True}, "gradients of gradients are not"),
    "negative timeout": ((scalar,), {"timeout": -1.0}, "timeout: expected seconds >= 0"),
    "timeout is no number": ((scalar,), {"timeout": "soon"}, "timeout: expected seconds >= 0"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_a_pass_cannot_start_from_is_refused_and_costs_nothing(
    two: Pair, what: str
) -> None:
    args, kwargs, text = REFUSED[what]
    async with two.alice.context() as ctx:
        with pytest.raises(za.ConfigurationError) as caught:
            await ctx.backward(*args, **kwargs)
        assert text in str(caught.value)
        assert not ctx.gradients()
        await ctx.backward(scalar, retain_graph=True)
        assert torch.equal(ctx.gradients()[leaf], torch.full((2, 3), 2.0))


# --- graphs that were cut ------------------------------------------------------------------------


async def plain(x: Tensor) -> Tensor:
    return x * 2


async def in_a_thread(x: Tensor) -> Any:
    with torch.no_grad():
        return await za.compute(torch.mul, x, 2)


CUT: dict[str, Callable[..., Any]] = {
    "detached": lambda x: (x * 2).detach(),
    "whole numbers": lambda x: (x * 2).long(),
    "compared": lambda x: x > 1,
    "by way of Python": lambda x: torch.tensor((x * 2).tolist()),
    "without grad mode": torch.no_grad()(lambda x: x * 2),
    "in inference mode": torch.inference_mode()(lambda x: x * 2),
    "without grad mode in a coroutine": in_a_thread,
}


@pytest.mark.parametrize("how", CUT)
async def test_a_root_whose_graph_was_cut_elsewhere_says_how_that_may_be(
    two: Pair, how: str
) -> None:
    two.bob.register(CUT[how], "cut")
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("cut", near_leaf())
        with pytest.raises(za.ConfigurationError, match=r"another worker.*no_grad\(\).*detached"):
            await ctx.backward(y.sum())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("function", ["scale", "plain"])
async def test_a_root_whose_graph_was_cut_here_says_how_that_may_be(
    two: Pair, mode: Callable[[], Any], function: str
) -> None:
    two.bob.register(plain)
    async with two.alice.context() as ctx:
        with mode():
            y = await two.remote_bob.call(function, near_leaf())
        assert not y.requires_grad
        with pytest.raises(za.ConfigurationError, match=r"here or.*no_grad\(\).*detached"):
            await ctx.backward(y.sum())
        y = await two.remote_bob.call(function, near_leaf())
        await ctx.backward(y.sum())


async def test_a_number_that_came_back_is_no_root(two: Pair) -> None:
    two.bob.register(lambda x: (x * 2).sum().item(), "number")
    async with two.alice.context() as ctx:
        with pytest.raises(za.ConfigurationError, match=r"roots: expected a tensor.*got 42\.0"):
            await ctx.backward(await two.remote_bob.call("number", near_leaf()))


async def test_a_coroutine_that_leaves_grad_mode_as_it_found_it_keeps_the_graph(two: Pair) -> None:
    @two.bob.register
    async def metrics_then_result(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            metric = await za.compute(torch.sum, x)
        return metric, await za.compute(torch.mul, x, 2)

    x = near_leaf()
    async with two.alice.context() as ctx:
        metric, y = await two.remote_bob.call("metrics_then_result", x)
        assert not metric.requires_grad
        await ctx.backward(y.sum())
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 2.0))


async def test_a_tensor_made_in_inference_mode_is_on_no_graph_though_it_says_so(two: Pair) -> None:
    with torch.inference_mode():
        x = near_leaf()
    two.bob.register(lambda x: x.requires_grad, "says_so")
    async with two.alice.context() as ctx:
        assert not await two.remote_bob.call("says_so", x)
        y = near_leaf()
        two.bob.register(torch.mul, "multiply")
        await ctx.backward((await two.remote_bob.call("multiply", x, y)).sum())
        assert ctx.gradients().keys() == {y}
        with pytest.raises(za.ConfigurationError, match=r"computed under.*inference_mode\(\)"):
            await ctx.backward(x, torch.ones(2, 3))


# --- graphs that were freed ----------------------------------------------------------------------


async def test_a_second_pass_over_a_freed_graph_here_raises_as_in_torch(two: Pair) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("scale", x) ** 2).sum()
        await ctx.backward(loss)
        found = ctx.gradients()[x].clone()
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            await ctx.backward(loss)
        assert torch.equal(ctx.gradients()[x], found)
    assert not two.bob.status()["contexts"]


async def test_a_second_pass_over_a_freed_graph_elsewhere_names_the_worker(two: Pair) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", x)
        await ctx.backward(y.sum())
        with pytest.raises(za.RemoteError, match="through the graph a second time") as caught:
            await ctx.backward(y.sum())
        assert caught.value.worker == "bob"
        assert caught.value.type_name == "RuntimeError"


async def test_a_second_pass_raises_however_late_it_meets_what_was_freed(two: Pair) -> None:
    """Only what was sent is freed, and the gradients for it come after all else is done."""
    two.bob.register(lambda x: x + 1, "add_one")

    @two.alice.handler(za.messages.PropagateGradientsRequest)
    async def take_over(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        await peer.call("scale", torch.ones(3))  # a round trip
        return await two.alice.default_handler(request, peer)

    x = near_leaf()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("add_one", x**2)).sum()
        await ctx.backward(loss)
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            await ctx.backward(loss)
        assert torch.equal(ctx.gradients()[x], 2 * x)


async def test_a_second_pass_over_what_frees_nothing_is_fine_as_in_torch(two: Pair) -> None:
    two.bob.register(lambda x: x + 1, "add_one")
    x = near_leaf()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("add_one", x + 1)).sum()
        for _ in range(2):
            await ctx.backward(loss)
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 2.0))


async def test_a_context_whose_pass_failed_says_so_afterwards(two: Pair) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("scale", x) ** 2).sum()
        await ctx.backward(loss)
        with pytest.raises(RuntimeError, match="second time"):
            await ctx.backward(loss)
        with pytest.raises(za.ContextError, match=r"earlier pass failed.*second time") as caught:
            await ctx.backward(x.sum())
        assert caught.value.context_id == ctx.context_id
        await two.remote_bob.call("scale", x)  # calls go on
        assert x in ctx.gradients()


async def test_changing_what_a_graph_needs_raises_as_in_torch(two: Pair) -> None:
    @two.bob.register
    def spoil(x: Tensor) -> Tensor:
        y = x * 2
        z = y**2
        y.add_(1)
        return z

    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("spoil", near_leaf())
        with pytest.raises(za.RemoteError, match="modified by an inplace operation") as caught:
            await ctx.backward(y.sum())
        assert caught.value.worker == "bob"


# --- what lies outside of the context ------------------------------------------------------------


async def test_backward_through_a_call_made_outside_a_context_says_what_to_do(two: Pair) -> None:
    x = near_leaf()
    y = await two.remote_bob.call("scale", x)
    assert y.requires_grad
    with pytest.raises(za.ContextError, match=r"async with worker.context\(\) as ctx"):
        y.sum().backward()
    async with two.alice.context() as ctx:
        with pytest.raises(za.ContextError, match="received outside one"):
            await ctx.backward(y.sum())
    assert x.grad is None
    assert torch.equal(y.detach(), x.detach() * torch.tensor([2.0, 1.0, 3.0]))


async def test_a_call_outside_a_context_carries_values_where_no_gradient_is_asked_for(
    two: Pair,
) -> None:
    assert not (await two.remote_bob.call("scale", near_leaf().detach())).requires_grad
    with torch.no_grad():
        assert not (await two.remote_bob.call("scale", near_leaf())).requires_grad
    leaf_there = far_leaf()
    two.bob.register(lambda: leaf_there, "leaf")
    assert not (await two.remote_bob.call("leaf")).requires_grad


async def test_a_plain_backward_through_a_received_tensor_says_what_to_do(two: Pair) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", x)
        with pytest.raises(za.ContextError, match=r"await ctx.backward") as caught:
            y.sum().backward()
        assert caught.value.context_id == ctx.context_id
        await ctx.backward(y.sum())
        assert x in ctx.gradients()
    assert x.grad is None


async def test_a_plain_backward_in_a_handler_says_so_too(two: Pair) -> None:
    two.bob.register(lambda x: (x * 2).sum().backward(), "plain")
    async with two.alice.context():
        with pytest.raises(za.ContextError, match=r"await ctx.backward"):
            await two.remote_bob.call("plain", near_leaf())


async def test_a_tensor_received_in_another_context_is_refused(two: Pair) -> None:
    x = near_leaf()
    async with two.alice.context() as first:
        kept = await two.remote_bob.call("scale", x)
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", x)
        with pytest.raises(za.ContextError, match=f"received in context {first.context_id}"):
            await ctx.backward((y * kept).sum())
        assert not ctx.gradients()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", x)
        await ctx.backward((y * kept.detach()).sum())
        assert x in ctx.gradients()


async def test_a_tensor_that_another_worker_kept_of_another_context_is_refused(two: Pair) -> None:
    kept: list[Tensor] = []

    @two.bob.register
    def add_up(x: Tensor) -> Tensor:
        kept.append(x)
        total: Tensor = sum(kept, start=torch.zeros(()))
        return total

    async with two.alice.context() as first:
        await first.backward((await two.remote_bob.call("add_up", near_leaf())).sum())
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("add_up", near_leaf())
        with pytest.raises(za.ContextError, match=str(first.context_id)) as caught:
            await ctx.backward(y.sum())
        assert caught.value.worker == "bob"


async def test_a_tensor_that_another_worker_computed_in_this_context_is_refused(two: Pair) -> None:
    """Two workers may live in one process: the gradient for what was sent would be lost."""
    kept: list[Tensor] = []

    @two.bob.register
    def keep(x: Tensor) -> None:
        kept.append(3 * x)

    async with two.alice.context() as ctx:
        await two.remote_bob.call("keep", near_leaf())
        with pytest.raises(za.ContextError, match="that another worker of this process received"):
            await ctx.backward(kept[0].sum())
