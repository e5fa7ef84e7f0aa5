"""Backward across workers finds what it finds in one process, whatever is sent and received."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import Pair, connected
from tests.integration.twins import Call, Program, across, far_leaf, in_one_process, near_leaf

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory: what travels is the same over the other transports."""
    async with connected() as pair:
        yield pair


async def check(pair: Pair, program: Program, dtype: torch.dtype = torch.float32) -> None:
    """Compare what `program` finds across two workers with what it finds in one process."""
    expected = await in_one_process(program, near_leaf(dtype), far_leaf(dtype))
    found = await across(pair, program, near_leaf(dtype), far_leaf(dtype))
    found.check(expected)


# --- what is sent and received -------------------------------------------------------------------


async def as_argument(call: Call, x: Tensor) -> Any:
    return await call("scale", x)


async def as_keyword(call: Call, x: Tensor) -> Any:
    return await call("scale", times=3, x=x)


async def in_containers(call: Call, x: Tensor) -> Any:
    tree = {"a": [x, (2 * x,)], "b": {"c": x**2}}
    reply = await call("in_containers", tree, more=[x, x + 1, "text"])
    (total, (scaled, *_)), again = reply["out"], reply["twice"]["again"]
    assert again is total
    return total * scaled + again


async def same_tensor_twice(call: Call, x: Tensor) -> Any:
    return await call("product", x, x)


async def same_tensor_twice_and_changed(call: Call, x: Tensor) -> Any:
    y = x * 2
    return await call("is_same", y, y)


async def equal_tensors_that_are_not_the_same(call: Call, x: Tensor) -> Any:
    return await call("is_same", x * 2, x * 2)


async def argument_changed_in_place(call: Call, x: Tensor) -> Any:
    return await call("scale_in_place", x * 2)


async def result_changed_in_place(call: Call, x: Tensor) -> Any:
    y, z = await call("scale", x), await call("scale", x, 2)
    y.mul_(z)
    y[0] = x[1] * 3
    return y.add_(1)


async def change_after_sending(call: Call, x: Tensor) -> Any:
    y = x * 2
    z = await call("scale", y.clone())
    y.mul_(3)
    return y * z


async def several_results(call: Call, x: Tensor) -> Any:
    scaled, detached, same, shared = await call("several", x)
    assert scaled.requires_grad
    assert not detached.requires_grad
    return scaled * detached + same * shared


async def shared_leaf_is_the_result(call: Call, x: Tensor) -> Any:
    return x * await call("shared")


async def result_sent_again(call: Call, x: Tensor) -> Any:
    y = await call("scale", x)
    return await call("product", y, await call("scale", y + x))


async def skip_over_a_call(call: Call, x: Tensor) -> Any:
    y = x * 2
    return y * await call("scale", y) + y


async def calls_side_by_side(call: Call, x: Tensor) -> Any:
    results = await asyncio.gather(*(call("scale", x, times) for times in range(1, 6)))
    total: Tensor = sum(results)
    return total


async def many_tensors(call: Call, x: Tensor) -> Any:
    return await call("add_all", [x * i for i in range(50)])


async def some_require_no_grad(call: Call, x: Tensor) -> Any:
    return await call("add_all", [x, x.detach(), torch.ones(2), x + 1, torch.ones(2).long()])


async def nothing_near_requires_grad(call: Call, x: Tensor) -> Any:
    return await call("scale", x.detach())


async def views(call: Call, x: Tensor) -> Any:
    y = await call("add_all", [x[0], x[:, 1], x.t(), x[1:, :2]])
    return y * (await call("scale", x[1])).sum()


async def expanded(call: Call, x: Tensor) -> Any:
    return await call("scale", x[0].sum().expand(4, 3))


async def not_contiguous(call: Call, x: Tensor) -> Any:
    return (await call("scale", x.repeat(1, 2)[:, ::2])).t() * 2


async def zero_dimensional(call: Call, x: Tensor) -> Any:
    return await call("scale", x.sum())


async def empty(call: Call, x: Tensor) -> Any:
    y = await call("scale", x[:0])
    assert y.shape == (0, 3)
    return y.sum() + (x * 2).sum()


async def no_grad_without(call: Call, x: Tensor) -> Any:
    with torch.no_grad():
        y = await call("scale", x)
    assert not y.requires_grad
    return y * x


async def no_grad_but_where_enabled(call: Call, x: Tensor) -> Any:
    with torch.no_grad():
        y = await call("enabling", x)
    return y * x


async def inference_mode(call: Call, x: Tensor) -> Any:
    with torch.inference_mode():
        y = await call("scale", x)
    assert not y.requires_grad
    return await call("scale", x) * y.clone()


async def autocast(call: Call, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = await call("matrix_product", x)
    assert y.dtype is torch.bfloat16
    return y.float() * 2


PROGRAMS: list[Program] = [
    as_argument,
    as_keyword,
    in_containers,
    same_tensor_twice,
    same_tensor_twice_and_changed,
    equal_tensors_that_are_not_the_same,
    argument_changed_in_place,
    result_changed_in_place,
    change_after_sending,
    several_results,
    shared_leaf_is_the_result,
    result_sent_again,
    skip_over_a_call,
    calls_side_by_side,
    many_tensors,
    some_require_no_grad,
    nothing_near_requires_grad,
    views,
    expanded,
    not_contiguous,
    zero_dimensional,
    empty,
    no_grad_without,
    no_grad_but_where_enabled,
    inference_mode,
    autocast,
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
async def test_gradients_are_those_of_one_process(two: Pair, program: Program) -> None:
    await check(two, program)


async def test_gradients_are_those_of_one_process_over_each_transport(pair: Pair) -> None:
    await check(pair, result_sent_again)


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
async def test_gradients_of_any_dtype(two: Pair, dtype: torch.dtype) -> None:
    async def program(call: Call, x: Tensor) -> Any:
        y = await call("scale", x) * x
        return torch.view_as_real(y).sum() if dtype.is_complex else y

    await check(two, program, dtype)


async def test_a_message_may_carry_gradients_of_several_dtypes(two: Pair) -> None:
    @two.bob.register
    def cast(x: Tensor) -> list[Tensor]:
        return [x.half(), x.double() * 2, x.bfloat16() * 3, x.long()]

    x = near_leaf()
    async with two.alice.context() as ctx:
        half, double, brain, whole = await two.remote_bob.call("cast", x)
        assert not whole.requires_grad
        await ctx.backward((half.double() + double + brain.double()).sum())
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 6.0))


# --- roots ---------------------------------------------------------------------------------------


def double(x: Tensor) -> Tensor:
    return 2 * x


async def test_several_roots_with_gradients_of_their_own(two: Pair) -> None:
    two.bob.register(double)
    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("double", x)
        scalar, other = (y * x).sum(), (y**2).sum()
        grads = [torch.full((2, 3), 3.0), None, torch.tensor(5.0), None]
        await ctx.backward([y, scalar, other, scalar], grads)
        assert torch.equal(ctx.gradients()[x], 2 * 3 + 2 * 4 * x + 5 * 8 * x)


async def test_a_received_tensor_may_be_the_root(two: Pair) -> None:
    two.bob.register(double)
    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("double", x)
        await ctx.backward(y, torch.arange(6.0).reshape(2, 3))
        assert torch.equal(ctx.gradients()[x], 2 * torch.arange(6.0).reshape(2, 3))


async def test_a_leaf_may_be_the_root(two: Pair) -> None:
    x, y = torch.ones(1, requires_grad=True), near_leaf()
    async with two.alice.context() as ctx:
        await ctx.backward((x, y), (None, torch.full((2, 3), 2)))
        assert torch.equal(ctx.gradients()[x], torch.ones(1))
        assert torch.equal(ctx.gradients()[y], torch.full((2, 3), 2.0))


async def test_a_pass_needs_no_calls_at_all(two: Pair) -> None:
    x = near_leaf()
    async with two.alice.context() as ctx:
        await ctx.backward((x**2).sum())
        assert torch.equal(ctx.gradients()[x], 2 * x)


# --- inputs --------------------------------------------------------------------------------------


async def test_inputs_are_found_alone(two: Pair) -> None:
    """A leaf, an inner tensor and a received one; one that nothing leads to is not found."""
    w = far_leaf()
    two.bob.register(lambda x: x * w, "scale")
    two.bob.register(lambda: len(here().gradients()), "found")
    x, z, unreached = near_leaf(), near_leaf(), near_leaf()
    async with two.alice.context() as ctx:
        inner = 2 * x
        received = await two.remote_bob.call("scale", inner)
        loss = (received * z).sum()
        await ctx.backward(loss, inputs=[inner, received, x, unreached], accumulate_grad=True)
        found = ctx.gradients()
        assert set(found) == {inner, received, x}
        assert torch.equal(found[received], z)
        assert torch.equal(found[inner], z * w)
        assert torch.equal(found[x], 2 * z * w)
        assert await two.remote_bob.call("found") == 0
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * z * w)
    assert z.grad is None
    assert w.grad is None


async def test_one_input_need_not_be_in_a_list(two: Pair) -> None:
    two.bob.register(double)
    x, z = near_leaf(), near_leaf()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("double", x) * z).sum()
        await ctx.backward(loss, inputs=x)
        assert set(ctx.gradients()) == {x}


def here() -> za.Context:
    context = za.current_context()
    assert context is not None
    return context


# --- where gradients go --------------------------------------------------------------------------


async def test_gradients_go_to_the_context_and_nowhere_else(two: Pair) -> None:
    w = far_leaf()
    w.grad = far_before = torch.ones(3)
    two.bob.register(lambda x: x * w, "scale")
    x = near_leaf()
    x.grad = near_before = torch.ones(2, 3)
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("scale", x)).sum())
        kept = ctx.gradients()
        kept.clear()
        assert set(ctx.gradients()) == {x}
    assert x.grad is near_before
    assert w.grad is far_before
    assert torch.equal(near_before, torch.ones(2, 3))
    assert torch.equal(far_before, torch.ones(3))


async def test_accumulate_grad_adds_them_to_the_leaves(two: Pair) -> None:
    w = far_leaf()
    two.bob.register(lambda x: x * w, "scale")
    x = near_leaf()
    x.grad = torch.ones(2, 3)
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("scale", x)).sum(), accumulate_grad=True)
        assert torch.equal(x.grad, 1 + ctx.gradients()[x])
        await two.remote_bob.call("scale", x)  # sees the whole pass
        assert w.grad is not None
        assert torch.equal(w.grad, x.detach().sum(0))


async def test_passes_add_up_out_of_place(two: Pair) -> None:
    two.bob.register(double)
    x = near_leaf()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("double", x) * x).sum()
        for times in range(1, 4):
            before = ctx.gradients().get(x)
            kept = None if before is None else before.clone()
            await ctx.backward(loss, retain_graph=True)
            assert torch.equal(ctx.gradients()[x], times * 4 * x)
            if before is not None and kept is not None:
                assert torch.equal(before, kept)


async def test_a_hundred_passes_over_one_graph(two: Pair) -> None:
    two.bob.register(double)
    x = near_leaf()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("double", x)).sum()
        for _ in range(100):
            await ctx.backward(loss, retain_graph=True)
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 200.0))


async def test_losses_over_disjoint_parts_run_once_each(two: Pair) -> None:
    two.bob.register(lambda x: (x**2, x**3), "powers")
    x, z = near_leaf(), near_leaf()
    async with two.alice.context() as ctx:
        square, cube = await two.remote_bob.call("powers", x)
        other, _ = await two.remote_bob.call("powers", z)
        for loss in (square, other, cube):
            await ctx.backward(loss.sum())
        assert torch.equal(ctx.gradients()[x], 2 * x + 3 * x**2)
        assert torch.equal(ctx.gradients()[z], 2 * z)


async def test_a_module_in_two_halves(two: Pair) -> None:
    """Parameters of modules on both workers, against the same module in one process."""
    torch.manual_seed(0)
    front, back = torch.nn.Linear(4, 8), torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(8, 2))
    batch = torch.randn(16, 4)
    back(front(batch)).square().mean().backward()
    whole: dict[Tensor, Tensor | None] = {
        p: p.grad for p in [*front.parameters(), *back.parameters()]
    }
    found: list[dict[Tensor, Tensor]] = []
    two.bob.register(back.forward, "back")
    two.bob.register(lambda: found.append(here().gradients()), "keep")
    async with two.alice.context() as ctx:
        result: Any = await two.remote_bob.call("back", front(batch))
        await ctx.backward(result.square().mean())
        await two.remote_bob.call("keep")
        for parameter, grad in {**ctx.gradients(), **found[0]}.items():
            torch.testing.assert_close(grad, whole.pop(parameter), rtol=0, atol=0)
    assert not whole
