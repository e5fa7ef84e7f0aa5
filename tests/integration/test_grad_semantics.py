"""What torch's users rely on in autograd, compared with one process: Parameters and subclasses as
arguments, compiled stages, checkpointing, and gradients that go to ``.grad`` too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zmq_autograd as za
from tests.helpers import Pair, connected, endpoint_of
from tests.integration.twins import near_leaf, on_accumulation, on_gradient, some

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["memory", "tcp"])
async def two(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    async with connected(endpoint_of(request.param, tmp_path)) as pair:
        yield pair


@pytest.fixture
async def near() -> AsyncIterator[Pair]:
    async with connected() as pair:
        yield pair


def gradients_there(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    context = za.current_context()
    assert context is not None
    return [context.gradients().get(leaf) for leaf in leaves]


def here(function: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """Return the gradients of `args` as one process finds them."""
    return list(torch.autograd.grad((function(*args) ** 2).sum(), args))


async def there(pair: Pair, function: Callable[..., Any], *args: Tensor) -> list[Tensor]:
    """Return the same, of `function` called on bob."""
    pair.bob.register(function, "function")
    async with pair.alice.context() as ctx:
        await ctx.backward(((await pair.remote_bob.call("function", *args)) ** 2).sum())
        return [ctx.gradients()[arg] for arg in args]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- Parameters and subclasses as arguments ------------------------------------------------------


class Named(Tensor):
    """A subclass that takes part in every operation on it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class Doubling(Tensor):
    """A subclass whose operations are not what they are called."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.detach or func is Tensor.cpu or func is Tensor.contiguous:
            raise AssertionError("what travels is the elements, whatever the subclass makes of it")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def leaf_of(kind: str) -> Tensor:
    values = near_leaf().detach()
    match kind:
        case "parameter":
            return nn.Parameter(values)
        case "subclass":
            return values.as_subclass(Named).requires_grad_()
        case "stubborn subclass":
            return values.as_subclass(Doubling).requires_grad_()
        case "parameter of a subclass":
            return nn.Parameter(values.as_subclass(Named))
        case "buffer":
            return nn.Buffer(values).requires_grad_()
    return values.requires_grad_()


def weighed(x: Tensor, y: Tensor) -> Tensor:
    return x * y + x


@pytest.mark.parametrize(
    "kind",
    ["parameter", "subclass", "stubborn subclass", "parameter of a subclass", "buffer"],
)
async def test_arguments_that_are_more_than_tensors_get_their_gradients(
    two: Pair, kind: str
) -> None:
    expected = here(weighed, leaf_of("plain"), leaf_of("plain"))
    leaf, plain = leaf_of(kind), leaf_of("plain")
    found = await there(two, weighed, leaf, plain)
    assert_same([grad.as_subclass(Tensor) for grad in found], expected)


async def test_a_parameter_arrives_as_a_plain_tensor_on_the_graph(near: Pair) -> None:
    kinds: list[tuple[type, bool]] = []

    def look(x: Tensor) -> Tensor:
        kinds.append((type(x), x.is_leaf))
        return x * 2

    await there(near, look, nn.Parameter(torch.ones(2)))
    assert kinds == [(Tensor, False)]


async def test_a_modules_parameters_in_a_dict_get_their_gradients(near: Pair) -> None:
    torch.manual_seed(1)
    net = nn.Linear(3, 3)
    x = near_leaf()
    near.bob.register(
        lambda parameters, x: torch.func.functional_call(net, parameters, (x,)), "call"
    )
    (net(x) ** 2).sum().backward()
    async with near.alice.context() as ctx:
        y = await near.remote_bob.call("call", dict(net.named_parameters()), x)
        await ctx.backward((y**2).sum())
        leaves = [*net.parameters(), x]
        assert_same([ctx.gradients()[p] for p in leaves], [some(p.grad) for p in leaves])


async def test_a_subclass_keeps_taking_part_in_what_is_computed_here(near: Pair) -> None:
    x = leaf_of("subclass")
    near.bob.register(weighed, "weighed")
    async with near.alice.context() as ctx:
        y = await near.remote_bob.call("weighed", x * 2, x)
        calls = Named.calls
        await ctx.backward((y.as_subclass(Named) ** 2).sum())
        assert Named.calls > calls
        assert x in ctx.gradients()


# --- compiled stages -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")  # torch's own, of its parts for each other
async def test_a_compiled_stage(near: Pair, backend: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    stage = torch.compile(net, backend=backend)
    x = near_leaf()
    for _ in range(2):
        (net(x) ** 2).sum().backward()
    leaves = list(net.parameters())
    near.bob.register(stage, "stage")
    near.bob.register(lambda: gradients_there(leaves), "gradients")
    again = near_leaf()
    async with near.alice.context() as ctx:
        for _ in range(2):
            y = await near.remote_bob.call("stage", again)
            await ctx.backward((y**2).sum())
        found = [ctx.gradients()[again], *await near.remote_bob.call("gradients")]
    torch.testing.assert_close(found, [some(leaf.grad) for leaf in (x, *leaves)])


@pytest.mark.filterwarnings("ignore")
async def test_a_compiled_function_between_two_calls(near: Pair) -> None:
    near.bob.register(lambda x: x.sin(), "sine")
    function = torch.compile(lambda x: (x * 2).cos(), backend="aot_eager")
    x, again = near_leaf(), near_leaf()
    torch.autograd.backward((x.sin() * 2).cos().sin().sum())
    async with near.alice.context() as ctx:
        y = function(await near.remote_bob.call("sine", again))
        await ctx.backward((await near.remote_bob.call("sine", y)).sum())
        torch.testing.assert_close(ctx.gradients()[again], x.grad)


# --- checkpointing -------------------------------------------------------------------------------


def block(net: nn.Module, runs: list[str]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        runs.append("forward")
        y: Tensor = net(x)
        return y

    return run


async def test_a_checkpointed_stage_computes_again_in_backward(two: Pair) -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    runs: list[str] = []
    leaves = list(net.parameters())

    def stage(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        y: Tensor = checkpoint(block(net, runs), x, use_reentrant=False)
        return y.relu()

    x, again = near_leaf(), near_leaf()
    torch.autograd.backward((stage(x) ** 2).sum())
    assert len(runs) == 2
    two.bob.register(stage)
    two.bob.register(lambda: gradients_there(leaves), "gradients")
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("stage", again)
        assert len(runs) == 3
        await ctx.backward((y**2).sum())
        assert len(runs) == 4
        found = [ctx.gradients()[again], *await two.remote_bob.call("gradients")]
    assert_same(found, [some(leaf.grad) for leaf in (x, *leaves)])


async def test_a_checkpoint_over_several_passes_and_around_what_was_received(near: Pair) -> None:
    near.bob.register(lambda x: x.sin(), "sine")
    x, again = near_leaf(), near_leaf()
    checkpoint(lambda x: (x * 2).cos(), x.sin(), use_reentrant=False).sum().backward()
    async with near.alice.context() as ctx:
        received = await near.remote_bob.call("sine", again)
        loss = checkpoint(lambda x: (x * 2).cos(), received, use_reentrant=False).sum()
        for passes in (1, 2):
            await ctx.backward(loss, retain_graph=True)
            torch.testing.assert_close(ctx.gradients()[again], passes * some(x.grad))


# --- into .grad too ------------------------------------------------------------------------------


async def test_gradients_go_to_grad_too_on_every_worker(two: Pair) -> None:
    torch.manual_seed(6)
    net, x = nn.Linear(3, 2), near_leaf()
    table = nn.Embedding(5, 3, sparse=True)
    words = torch.tensor([1, 4, 1])
    leaves = [*net.parameters(), table.weight]

    def stage(x: Tensor) -> Tensor:
        y: Tensor = net(x.sum(0) + table(words))
        return y

    expected = []
    for _ in range(2):
        torch.autograd.backward((stage(x) ** 2).sum())
        expected.append([some(leaf.grad).clone() for leaf in (x, *leaves)])
    for leaf in (x, *leaves):
        leaf.grad = None
    two.bob.register(stage)
    two.bob.register(lambda: [leaf.grad for leaf in leaves], "grads")
    for passes in (0, 1):
        async with two.alice.context() as ctx:
            y = await two.remote_bob.call("stage", x)
            await ctx.backward((y**2).sum(), accumulate_grad=True)
            grads = [some(x.grad), *await two.remote_bob.call("grads")]
            assert grads[-1].is_sparse
            pairs = zip(grads, expected[passes], strict=True)
            for grad, right in pairs:
                torch.testing.assert_close(grad.to_dense(), right.to_dense())
            # The context's are of this context alone, and nobody else's memory.
            some(x.grad).add_(0)
            torch.testing.assert_close(ctx.gradients()[x], expected[0][0])


async def test_a_pass_that_fails_leaves_grad_alone(near: Pair) -> None:
    x = near_leaf()
    x.grad = torch.ones(2, 3)
    near.bob.register(lambda x: x * 2, "double")

    def fail(grad: Tensor) -> None:
        raise ValueError("no")

    async with near.alice.context() as ctx:
        y = x * 2
        on_gradient(y, fail)
        z = await near.remote_bob.call("double", y)
        with pytest.raises(ValueError, match="no"):
            await ctx.backward(z.sum() + (x**2).sum(), accumulate_grad=True)
    assert torch.equal(x.grad, torch.ones(2, 3))


async def test_a_hook_on_accumulation_steps_once_and_grad_stays_the_users(near: Pair) -> None:
    """As in an optimizer that steps in backward: it sees the pass's gradient alone."""
    near.bob.register(lambda x: x * 3, "triple")
    seen = []
    x = near_leaf()
    x.grad = torch.ones(2, 3)
    on_accumulation(x, lambda leaf: seen.append(some(leaf.grad).clone()))
    async with near.alice.context() as ctx:
        await ctx.backward((await near.remote_bob.call("triple", x)).sum(), accumulate_grad=True)
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.full((2, 3), 3.0))
    assert torch.equal(x.grad, torch.full((2, 3), 4.0))
