"""A module on another worker does what the same one does in one process: values, gradients, state.

Numbers that come from the same operations in the same order are compared bit by bit.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected

pytestmark = pytest.mark.timeout(60)


class Tied(nn.Module):
    """Two layers that share a weight, one that is frozen, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 2, dtype=torch.float32)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Any:
        return self.frozen(self.second(torch.tanh(self.first(x)))) * self.scale


def normalising() -> nn.Module:
    """Return a module that changes with each forward, and computes its weights each time."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, 4)),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        parametrizations.weight_norm(nn.Linear(4, 2)),
    )


def convolving() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.GELU())


MAKERS: list[Callable[[], nn.Module]] = [Tied, normalising, convolving]


def seeded(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(7)
    return make(*args)


def batch() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()


def grads_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any], within: float = 0) -> None:
    """Raise AssertionError unless the tensors are the same, bit by bit, in the same order."""
    assert list(found) == list(expected)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=within, atol=within)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory: what travels is the same over the other transports."""
    async with connected() as pair:
        yield pair


async def exposed(pair: Pair, module: nn.Module, **options: Any) -> za.RemoteModule:
    pair.bob.register(module, "net", expose="module", **options)
    return await pair.remote_bob.module("net", timeout=DEADLINE)


# --- as in one process ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
async def test_values_gradients_and_state_are_those_of_one_process(
    pair: Pair, make: Callable[[], nn.Module]
) -> None:
    module, local = seeded(make), seeded(make)
    net = await exposed(pair, module)
    here, there = batch(), batch()
    torch.manual_seed(1)
    expected = [local(here), local(here * 2)]
    (expected[0].square().sum() + expected[1].sum()).backward()
    torch.manual_seed(1)
    async with pair.alice.context() as ctx:
        found = [await net(there), await net(there * 2)]
        await ctx.backward(found[0].square().sum() + found[1].sum())
        grads = await net.gradients(ctx)
        input_grad = ctx.gradients()[there]
    assert all(map(torch.equal, found, expected))
    # What the two calls add to it is summed in another order.
    check_same({"x": input_grad, **grads}, {"x": here.grad, **grads_of(local)}, within=1e-5)
    assert grads_of(module) == {}
    check_same(await net.state_dict(), local.state_dict())


async def test_training_modes_are_set_where_it_lives(two: Pair) -> None:
    local = seeded(normalising)
    module = copy.deepcopy(local)
    net = await exposed(two, module)
    for is_training in (False, True, False):
        assert await net.train(is_training) is net
        local.train(is_training)
        assert {part.training for part in module.modules()} == {is_training}
        torch.manual_seed(2)
        expected = local(batch())
        torch.manual_seed(2)
        assert torch.equal(await net(batch().detach()), expected)
    await net.train()
    assert await net.eval() is net
    assert not module.training


async def test_hooks_run_where_it_lives_once_each(two: Pair) -> None:
    def hooked(module: Any) -> list[Any]:
        seen: list[Any] = []
        module.register_forward_pre_hook(lambda _, args: seen.append(("before", args[0].tolist())))
        module.register_forward_hook(lambda _, __, out: seen.append(("after", out.tolist())))
        module.register_forward_hook(lambda _, __, out: out * 2)
        module.register_full_backward_pre_hook(lambda _, g: seen.append(("pre", g[0].tolist())))
        module.register_full_backward_hook(
            lambda _, i, o: seen.append(("backward", i[0].tolist(), o[0].tolist()))
        )
        next(module.parameters()).register_hook(lambda g: seen.append(("weight", g.tolist())))
        return seen

    module, local = seeded(Tied), seeded(Tied)
    net = await exposed(two, module)
    expected, seen = hooked(local), hooked(module)
    here, there = batch(), batch()
    local(here).sum().backward()
    async with two.alice.context() as ctx:
        await ctx.backward((await net(there)).sum())
        check_same(await net.gradients(ctx), grads_of(local))
        assert torch.equal(ctx.gradients()[there], torch.as_tensor(here.grad))
    assert seen == expected


async def test_arguments_are_the_modules_own_by_position_and_by_keyword(two: Pair) -> None:
    class Options(nn.Module):
        def forward(self, x: Tensor, *, timeout: int, name: str, self_: None = None) -> Any:
            return {"x": x * timeout, "name": [name]}

    net = await exposed(two, Options())
    found = await net(torch.ones(2), timeout=3, name="n")
    assert torch.equal(found["x"], torch.full((2,), 3.0))
    assert found["name"] == ["n"]
    assert net.parameters() == []
    assert await net.state_dict() == {}


# --- parameters ----------------------------------------------------------------------------------


async def test_parameters_are_described_and_shared_ones_appear_once(two: Pair) -> None:
    module = seeded(Tied)
    net = await exposed(two, module)
    two.bob.register(lambda rref: kept.append(rref.local_value()), "keep")
    kept: list[Any] = []
    expected = dict(module.named_parameters())
    assert "second.weight" not in expected
    assert [name for name, _ in net.named_parameters()] == list(expected)
    assert [parameter for _, parameter in net.named_parameters()] == net.parameters()
    for name, parameter in net.named_parameters():
        own = expected[name]
        assert (parameter.name, parameter.owner) == (name, two.remote_bob)
        assert (parameter.shape, parameter.dtype) == (own.shape, own.dtype)
        assert isinstance(parameter.shape, torch.Size)
        assert (parameter.numel(), parameter.requires_grad) == (own.numel(), own.requires_grad)
        assert torch.equal(await parameter.rref.to_here(), own)
        await two.remote_bob.call("keep", parameter.rref)
        assert kept[-1] is own
    assert (net.name, net.owner) == ("net", two.remote_bob)
    assert repr(net) == "<RemoteModule 'net' on 'bob'>"
    assert repr(net.parameters()[0]) == (
        "<RemoteParameter 'first.weight' on 'bob': [3, 3], torch.float32>"
    )


async def test_a_module_may_have_more_parameters_than_one_message_tells_of(two: Pair) -> None:
    module = nn.ParameterList(torch.full((1,), float(number)) for number in range(450))
    module.register_buffer("steps", torch.tensor(3))
    net = await exposed(two, nn.Sequential(module))
    assert [p.name for p in net.parameters()] == [f"0.{number}" for number in range(450)]
    assert torch.equal(await net.parameters()[449].rref.to_here(), torch.tensor([449.0]))
    assert len(await net.state_dict()) == 451


@pytest.mark.parametrize("how", ["dtype", "keyword", "tensor", "both"])
async def test_converting_keeps_the_parameters_and_what_is_known_of_them(
    two: Pair, how: str
) -> None:
    module, local = seeded(Tied), seeded(Tied)
    own = list(module.parameters())
    net = await exposed(two, module)
    before = net.parameters()
    args: dict[str, tuple[Any, ...]] = {
        "dtype": (torch.float64,),
        "tensor": (torch.ones(1, dtype=torch.float64),),
        "both": ("cpu", torch.float64, True),
    }
    keywords = {"dtype": torch.float64} if how == "keyword" else {}
    assert await net.to(*args.get(how, ()), **keywords) is net
    local.to(torch.float64)
    assert all(map(lambda a, b: a is b, module.parameters(), own))
    assert net.parameters() == before
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    check_same(await net.state_dict(), local.state_dict())
    async with two.alice.context() as ctx:
        x = batch().double()
        await ctx.backward((await net(x)).sum())
        local(x).sum().backward()
        check_same(await net.gradients(ctx), grads_of(local))
        # The RRefs lead to the parameters that are used now.
        assert torch.equal(await before[0].rref.to_here(), local.state_dict()["first.weight"])


@pytest.mark.parametrize(
    ("device", "said"), [("meta", "'meta' keeps no values"), ("cuda:99", "CUDA")]
)
async def test_a_device_that_the_owner_has_not_is_refused(
    two: Pair, device: str, said: str
) -> None:
    net = await exposed(two, seeded(Tied))
    with pytest.raises(za.RemoteError, match=said):
        await net.to(device)
    check_same(await net.state_dict(), seeded(Tied).state_dict())
    assert net.parameters()[0].dtype is torch.float32


async def test_what_cannot_be_converted_to_is_refused(two: Pair) -> None:
    net = await exposed(two, seeded(Tied))
    with pytest.raises(TypeError, match="memory format"):
        await net.to(memory_format=torch.channels_last)
    with pytest.raises(TypeError):
        await net.to("no", "such", "thing")
    with pytest.raises(za.RemoteError, match="unknown dtype 'elephant'"):
        await two.remote_bob.call("net.to", None, "elephant")
    check_same(await net.state_dict(), seeded(Tied).state_dict())


async def test_what_is_converted_is_not_of_the_mode_of_who_asks(two: Pair) -> None:
    net = await exposed(two, seeded(Tied))
    with torch.inference_mode():
        await net.to(torch.float64)
    async with two.alice.context() as ctx:
        await ctx.backward((await net(batch().double())).sum())
        assert len(await net.gradients(ctx)) == 2


async def test_an_owner_whose_conversions_replace_parameters_says_so(
    two: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await exposed(two, seeded(Tied))
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    with pytest.raises(za.RemoteError, match="replaced, not changed"):
        await net.to(torch.float64)


async def test_gradients_in_grad_are_cleared_where_it_lives(two: Pair) -> None:
    module, local = seeded(Tied), seeded(Tied)
    net = await exposed(two, module)
    async with two.alice.context() as ctx:
        await ctx.backward((await net(batch())).sum(), accumulate_grad=True)
    local(batch()).sum().backward()
    check_same(grads_of(module), grads_of(local))
    await net.zero_grad(set_to_none=False)
    local.zero_grad(set_to_none=False)
    check_same(grads_of(module), grads_of(local))
    await net.zero_grad()
    assert grads_of(module) == {}


# --- contexts ------------------------------------------------------------------------------------


async def test_sparse_gradients_are_told_as_they_are(two: Pair) -> None:
    module, local = (seeded(lambda: nn.Embedding(10, 3, sparse=True)) for _ in range(2))
    net = await exposed(two, module)
    indices = torch.tensor([[1, 2, 2], [9, 1, 0]])
    local(indices).sum().backward()
    async with two.alice.context() as ctx:
        await ctx.backward((await net(indices)).sum())
        grads = await net.gradients(ctx)
    assert grads["weight"].is_sparse
    expected = {name: grad.to_dense() for name, grad in grads_of(local).items()}
    check_same({name: grad.to_dense() for name, grad in grads.items()}, expected)


async def test_each_context_has_gradients_of_its_own(two: Pair) -> None:
    module, local = seeded(Tied), seeded(Tied)
    net = await exposed(two, module)

    async def train(times: int, other: asyncio.Event, mine: asyncio.Event) -> dict[str, Tensor]:
        async with two.alice.context() as ctx:
            await ctx.backward((await net(batch() * times)).sum())
            mine.set()
            await other.wait()
            grads: dict[str, Tensor] = await net.gradients(ctx)
            return grads

    first, second = asyncio.Event(), asyncio.Event()
    found = await asyncio.gather(train(1, second, first), train(3, first, second))
    for grads, times in zip(found, (1, 3), strict=True):
        local.zero_grad()
        local(batch() * times).sum().backward()
        check_same(grads, grads_of(local))


async def test_gradients_are_of_the_context_that_is_named(two: Pair) -> None:
    net = await exposed(two, seeded(Tied))
    async with two.alice.context() as ctx:
        assert await net.gradients(ctx) == {}
        await ctx.backward((await net(batch())).sum())
        grads = await net.gradients(ctx)
        assert "frozen.weight" not in grads
        grads["first.weight"].zero_()  # a copy
        # A task that began before the context was entered, say, is in none.
        in_none = contextvars.Context()
        outside = await asyncio.create_task(net.gradients(ctx), context=in_none)
        check_same(outside, await net.gradients(ctx))
        assert outside["first.weight"].any()
        assert za.current_context() is ctx
    with pytest.raises(za.ContextError, match="ended"):
        await net.gradients(ctx)
    assert za.current_context() is None
    async with two.bob.context() as foreign:
        with pytest.raises(za.ContextError, match="one worker"):
            await net.gradients(foreign)
    with pytest.raises(za.ConfigurationError, match=r"expected a context, .* got a NoneType"):
        await net.gradients(None)  # type: ignore[arg-type]
    with pytest.raises(za.RemoteError, match="within one"):
        await two.remote_bob.call("net.gradients")


async def test_asking_from_outside_the_context_mixes_no_messages_up(two: Pair) -> None:
    module, local = seeded(Tied), seeded(Tied)
    net = await exposed(two, module)
    async with two.alice.context() as ctx:
        x = batch().requires_grad_()
        loss = (await net(x)).sum()  # the first message on either side is on the graph
        for _ in range(2):
            task = asyncio.create_task(net.gradients(ctx), context=contextvars.Context())
            assert await task == {}
        await ctx.backward(loss)
        local(batch()).sum().backward()
        check_same(await net.gradients(ctx), grads_of(local))
