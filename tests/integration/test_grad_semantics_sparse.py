"""Sparse (COO) tensors as arguments, results and gradients, compared with one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import zmq_autograd as za
from tests.helpers import Pair, connected, endpoint_of
from tests.integration.twins import gradient_of, on_accumulation, on_gradient, some

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(params=["memory", "tcp"])
async def two(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    async with connected(endpoint_of(request.param, tmp_path)) as pair:
        yield pair


@pytest.fixture
async def near() -> AsyncIterator[Pair]:
    async with connected() as pair:
        yield pair


def coo(dtype: torch.dtype = torch.float32, *, coalesced: bool = False) -> Tensor:
    """Return a sparse leaf, in which one element has two values unless it is coalesced."""
    tensor = torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 1, 1], [2, 0, 2, 2]]),
        torch.tensor([3, 4, 5, 6], dtype=dtype),
        (3, 3),
        check_invariants=True,
    )
    return (tensor.coalesce() if coalesced else tensor).requires_grad_()


def assert_same(found: Tensor | None, expected: Tensor | None) -> None:
    """Compare layout, dtype and elements: whether torch coalesces depends on who holds what."""
    found, expected = some(found), some(expected)
    assert found.layout is expected.layout
    assert found.dtype is expected.dtype
    if found.is_sparse:
        found, expected = found.coalesce(), expected.coalesce()
        assert torch.equal(found.indices(), expected.indices())
        found, expected = found.values(), expected.values()
    assert torch.equal(found, expected)


# --- arguments, results and their gradients ------------------------------------------------------


class Tripled(Function):
    """What is left of it once its result has been sent is the graph's to keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])

PROGRAMS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "add": (torch.add, torch.sparse.sum),
    "add up twice": (lambda a, b: a + b + a, lambda y: torch.sparse.sum(y * y)),
    "product": (lambda a, b: torch.sparse.mm(a, W) * 2 + b.to_dense(), torch.sum),
    "elementwise": (lambda a, b: a * b, torch.sparse.sum),
    "densify here": (lambda a, b: a * 3, lambda y: (y.to_dense() ** 2).sum()),
    "densify there": (lambda a, b: a.to_dense() * W + b.to_dense(), lambda y: (y**2).sum()),
    "coalesced there": (lambda a, b: (a + b).coalesce(), lambda y: y.values().sum()),
    "to sparse there": (lambda a, b: (a.to_dense() * W).to_sparse(), torch.sparse.sum),
    "dimension summed": (lambda a, b: torch.sparse.sum(a, dim=0), torch.sparse.sum),
    "in place": (lambda a, b: a.mul_(2) + b, torch.sparse.sum),
    "custom Function": (lambda a, b: Tripled.apply(a * 2 + b), torch.sparse.sum),  # type: ignore[no-untyped-call]
    "as it came": (lambda a, b: a, lambda y: torch.sparse.sum(y * 2)),
}


def in_one_process(name: str, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    function, loss_of = PROGRAMS[name]
    # What arrives elsewhere is no leaf, and can be changed in place there.
    loss_of(function(a.clone(), b.clone())).backward()  # type: ignore[no-untyped-call]
    return a.grad, b.grad


@pytest.mark.parametrize("coalesced", [False, True], ids=["", "coalesced"])
@pytest.mark.parametrize("name", PROGRAMS)
async def test_sparse_tensors_travel_both_ways_with_their_gradients(
    two: Pair, name: str, coalesced: bool
) -> None:
    expected = in_one_process(name, coo(coalesced=coalesced), coo(coalesced=coalesced))
    a, b = coo(coalesced=coalesced), coo(coalesced=coalesced)
    function, loss_of = PROGRAMS[name]
    two.bob.register(function, "f")
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("f", a, b)
        await ctx.backward(loss_of(y))
        found = ctx.gradients()
    for leaf, grad in zip((a, b), expected, strict=True):
        if grad is None:
            assert leaf not in found
        else:
            assert_same(found[leaf], grad)
        assert leaf.grad is None


async def test_sparse_tensors_of_different_dtypes(two: Pair) -> None:
    expected = in_one_process("add", coo(), coo(torch.float64))
    a, b = coo(), coo(torch.float64)
    two.bob.register(torch.add, "add")
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("add", a, b)
        assert y.dtype is torch.float64
        await ctx.backward(torch.sparse.sum(y))
        for leaf, grad in zip((a, b), expected, strict=True):
            assert_same(ctx.gradients()[leaf], grad)


async def test_a_sparse_tensor_three_hops_away_and_many_passes(two: Pair) -> None:
    async def again(x: Tensor, times: int) -> Any:
        if not times:
            return x * 2
        peer = za.current_peer()
        assert peer is not None
        return await peer.call("again", x + x, times - 1)

    for worker in (two.alice, two.bob):
        worker.register(again)
    leaf, here = coo(), coo()
    y = here
    for _ in range(3):
        y = y + y
    loss = torch.sparse.sum(y * 2)
    async with two.alice.context() as ctx:
        far = torch.sparse.sum(await two.remote_bob.call("again", leaf, 3))
        for passes in range(1, 6):
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            await ctx.backward(far, retain_graph=True)
            found = ctx.gradients()[leaf]
            assert found.is_sparse
            assert torch.equal(found.to_dense(), some(here.grad).to_dense()), passes


async def test_sparse_roots_with_sparse_and_dense_gradients(near: Pair) -> None:
    near.bob.register(lambda x: x * 2, "double")
    for grad in (coo().detach(), torch.ones(3, 3)):
        here, leaf = coo(), coo()
        (here.clone() * 2).backward(grad)  # type: ignore[no-untyped-call]
        async with near.alice.context() as ctx:
            await ctx.backward(await near.remote_bob.call("double", leaf), grad)
            assert_same(ctx.gradients()[leaf], here.grad)


async def test_gradients_of_chosen_sparse_inputs(near: Pair) -> None:
    near.bob.register(torch.add, "add")
    a, b = coo(), coo()
    async with near.alice.context() as ctx:
        inner = a * 2
        y = await near.remote_bob.call("add", inner, b)
        await ctx.backward(torch.sparse.sum(y * 3), inputs=[inner, b])
        found = ctx.gradients()
    assert found.keys() == {inner, b}
    assert found[b].to_dense().sum() == found[inner].to_dense().sum() == 3 * 3


async def test_outside_a_context_the_graph_of_a_sparse_tensor_is_not_cut_silently(
    near: Pair,
) -> None:
    near.bob.register(lambda x: x * 2, "double")
    y = await near.remote_bob.call("double", coo())
    assert torch.equal(y.detach().to_dense(), 2 * coo().detach().to_dense())
    with pytest.raises(za.ContextError, match=r"async with worker.context\(\) as ctx"):
        torch.sparse.sum(y).backward()  # type: ignore[no-untyped-call]


async def test_the_graph_tells_the_bytes_that_travelled(near: Pair) -> None:
    near.bob.register(lambda x: x * 2, "double")
    async with near.alice.context() as ctx:
        await near.remote_bob.call("double", coo())
        assert f"{2 * 4 * 8 + 4 * 4} B" in await ctx.graph()


# --- embeddings ----------------------------------------------------------------------------------

WORDS = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9])
OFFSETS = torch.tensor([0, 4])
KINDS: dict[str, Callable[[], nn.Module]] = {
    "bag": lambda: nn.EmbeddingBag(16, 4, mode="sum", sparse=True),
    "embedding": lambda: nn.Embedding(16, 4, sparse=True),
}


def looked_up(table: nn.Module, weights: Tensor) -> Any:
    if isinstance(table, nn.EmbeddingBag):
        return table(WORDS, OFFSETS, weights)
    return table(WORDS) * weights[:, None]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_embedding_that_lives_elsewhere_accumulates_sparse_gradients(
    two: Pair, kind: str
) -> None:
    table = KINDS[kind]()
    (weight,) = table.parameters()
    with torch.no_grad():  # whole numbers, whose sums are the same in any order
        weight.copy_(torch.arange(64).reshape(16, 4))
    weights = torch.arange(1.0, 9.0)
    here = weights.clone().requires_grad_()
    loss = looked_up(table, here).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    two.bob.register(lambda given: looked_up(table, given), "look_up")
    two.bob.register(lambda: gradient_of(weight), "gradient")
    there = weights.clone().requires_grad_()
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("look_up", there)).sum()
        await ctx.backward(loss, retain_graph=True)
        await ctx.backward(loss)
        assert_same(ctx.gradients()[there], here.grad)
        found = await two.remote_bob.call("gradient")
    assert_same(found, weight.grad)
    assert found.is_sparse


async def test_the_gradient_of_a_table_that_travelled_comes_back_sparse(two: Pair) -> None:
    table = nn.Embedding(1000, 4, sparse=True)
    seen: list[Tensor | None] = []

    @two.alice.handler(za.messages.PropagateGradientsRequest)
    async def take(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        seen.extend(request.grads)
        return await two.alice.default_handler(request, peer)

    two.bob.register(lambda weight: F.embedding(WORDS, weight, sparse=True), "look_up")
    here = F.embedding(WORDS, table.weight, sparse=True).sum()
    (expected,) = torch.autograd.grad(here, [table.weight])
    async with two.alice.context() as ctx:
        loss = (await two.remote_bob.call("look_up", table.weight)).sum()
        await ctx.backward(loss, accumulate_grad=True)
        assert_same(ctx.gradients()[table.weight], expected)
    (grad,) = seen
    assert some(grad).is_sparse
    assert some(grad)._nnz() == len(WORDS)
    assert_same(table.weight.grad, expected)


async def test_sparse_and_dense_gradients_add_up(near: Pair) -> None:
    near.bob.register(lambda weight: F.embedding(WORDS, weight, sparse=True), "look_up")
    near.bob.register(lambda weight: weight * 2, "double")
    here = nn.Parameter(torch.ones(16, 4))
    torch.autograd.backward([F.embedding(WORDS, here, sparse=True).sum(), (here * 2).sum()])
    for order in (("look_up", "double"), ("double", "look_up")):
        leaf = nn.Parameter(torch.ones(16, 4))
        async with near.alice.context() as ctx:
            for name in order:
                await ctx.backward((await near.remote_bob.call(name, leaf)).sum())
            assert_same(ctx.gradients()[leaf], here.grad)
        async with near.alice.context() as ctx:
            results = [await near.remote_bob.call(name, leaf) for name in order]
            await ctx.backward([result.sum() for result in results])
            assert_same(ctx.gradients()[leaf], here.grad)


async def test_an_op_that_takes_no_sparse_gradient_raises_as_in_one_process(near: Pair) -> None:
    near.bob.register(lambda weight: F.embedding(WORDS, weight, sparse=True), "look_up")
    here = torch.ones(16, 4, requires_grad=True)
    with pytest.raises(RuntimeError) as expected:
        torch.autograd.backward(F.embedding(WORDS, here.relu(), sparse=True).sum())
    leaf = torch.ones(16, 4, requires_grad=True)
    async with near.alice.context() as ctx:
        y = await near.remote_bob.call("look_up", leaf.relu())
        with pytest.raises(RuntimeError) as caught:
            await ctx.backward(y.sum())
    assert str(caught.value) == str(expected.value)


async def test_hooks_see_sparse_gradients(near: Pair) -> None:
    near.bob.register(lambda weight: F.embedding(WORDS, weight, sparse=True), "look_up")
    hooked, stepped = nn.Parameter(torch.ones(16, 4)), nn.Parameter(torch.ones(16, 4))
    seen: list[Tensor] = []

    def triple(grad: Tensor) -> Tensor:
        seen.append(grad)
        return grad * 3

    on_gradient(hooked, triple)
    on_accumulation(stepped, lambda leaf: seen.append(some(leaf.grad)))
    on_accumulation(hooked, lambda leaf: seen.append(some(leaf.grad)))
    async with near.alice.context() as ctx:
        for leaf in (hooked, stepped):
            await ctx.backward((await near.remote_bob.call("look_up", leaf)).sum())
        totals = [ctx.gradients()[leaf].to_dense().sum() for leaf in (hooked, stepped)]
    assert totals == [3 * 8 * 4, 8 * 4]
    assert [grad.to_dense().sum() for grad in seen] == [8 * 4, 3 * 8 * 4, 8 * 4]
    assert all(grad.is_sparse for grad in seen)


async def test_the_bits_are_the_same_on_each_run(near: Pair) -> None:
    near.bob.register(lambda weight, words: F.embedding(words, weight, sparse=True), "look_up")
    runs = []
    for _ in range(3):
        torch.manual_seed(2)
        leaf = nn.Parameter(torch.rand(16, 4))
        async with near.alice.context() as ctx:
            losses = []
            for _ in range(5):
                words = torch.randint(16, (40,))
                found = await near.remote_bob.call("look_up", leaf, words)
                losses.append((found * torch.rand(40, 4)).sum())
            await ctx.backward(losses)
            runs.append(ctx.gradients()[leaf])
    for run in runs[1:]:
        assert_same(run, runs[0])


# --- memory --------------------------------------------------------------------------------------


class Passing(Function):
    """Passes on what it gets, and notes where that is."""

    address = 0
    views: tuple[Tensor, ...] = ()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Passing.address = address_of(grad)
        Passing.views = (grad._indices(), grad._values()) if grad.is_sparse else ()
        return grad


class Sharing(Function):
    """Gives one gradient to two."""

    address = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        Sharing.address = address_of(grad)
        return grad, grad


def looked_up_by(function: Any, *leaves: Tensor, sparse: bool) -> Tensor:
    """Return a loss whose gradient reaches `function` in memory of its own."""
    return (F.embedding(WORDS, function.apply(*leaves), sparse=sparse) * torch.ones(8, 4)).sum()


def address_of(grad: Tensor) -> int:
    return (grad._values() if grad.is_sparse else grad).data_ptr()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
async def test_a_gradient_that_nobody_else_holds_is_taken_over(near: Pair, sparse: bool) -> None:
    leaf = torch.ones(16, 4, requires_grad=True)
    async with near.alice.context() as ctx:
        await ctx.backward(looked_up_by(Passing, leaf, sparse=sparse))
        assert address_of(ctx.gradients()[leaf]) == Passing.address


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
async def test_a_gradient_of_two_is_each_ones_own(near: Pair, sparse: bool) -> None:
    a, b = torch.ones(16, 4, requires_grad=True), torch.ones(16, 4, requires_grad=True)
    async with near.alice.context() as ctx:
        await ctx.backward(looked_up_by(Sharing, a, b, sparse=sparse))
        found = ctx.gradients()
    addresses = {address_of(found[a]), address_of(found[b]), Sharing.address}
    assert len(addresses) == 3
    assert_same(found[a], found[b])
