"""`RemoteWorker.call` and `function`: what goes over, what comes back, and when it is read."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from zmq_autograd.wire.tensors import DTYPES

pytestmark = pytest.mark.timeout(30)

LARGE = 2 * 1024 * 1024

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    2**63,
    -(2**63),
    2**64 - 1,
    2**64,
    -(2**200),
    0.0,
    -0.0,
    1.5,
    math.inf,
    5e-324,
    1j,
    complex(-0.0, math.inf),
    "",
    "text",
    "\N{SNOWMAN}\0\n",
    "x" * 50_000,
    b"",
    b"\0\xff",
    [],
    (),
    {},
    [1, [2, [3, []]]],
    (1, (2, (3, ()))),
    [(1,), [1]],
    {"a": 1, b"b": 2, 3: 4, 4.5: 5, None: 6},
    {"tensor": 0},
    {"tuple": [1], "dict": {"int": b"x"}},
    list(range(1000)),
]


def same(left: Any, right: Any) -> bool:
    """Compare values by type too, and floats by their bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, Tensor):
        return same_bits(left, right)
    return repr(left) == repr(right)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Compare dtype, shape and every byte."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*bits)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
async def test_a_value_goes_over_and_back(value: Any) -> None:
    async with connected() as pair:
        seen = []

        @pair.bob.register
        def echo(*args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            return args[0]

        assert same(await pair.remote_bob.call("echo", value, [value], key=value), value)
        assert same(seen, [((value, [value]), {"key": value})])


async def test_subclasses_of_values_arrive_as_their_base() -> None:
    class Text(str):
        __slots__ = ()

    async with connected() as pair:
        pair.bob.register(lambda *args: list(args), "echo")
        value = [Text("x"), OrderedDict(a=1), torch.Size([2, 3])]
        assert same(await pair.remote_bob.call("echo", *value), ["x", {"a": 1}, (2, 3)])


async def test_every_keyword_but_timeout_is_the_callees(pair: Pair) -> None:
    pair.bob.register(lambda **kwargs: kwargs, "echo")
    given = {"self": 1, "function": 2, "args": 3, "name": 4, "kwargs": 5, "not a name": 6}
    assert await pair.remote_bob.call("echo", **given) == given
    assert await pair.remote_bob.call("echo", timeout=DEADLINE, **given) == given
    echo = pair.remote_bob.function("echo")
    assert await echo(timeout=7, **given) == {"timeout": 7, **given}


async def test_a_function_looks_like_the_one_that_it_calls(pair: Pair) -> None:
    pair.bob.register(lambda x, by: x * by, "scale")
    scale = pair.remote_bob.function("scale", timeout=DEADLINE)
    assert scale.__name__ == "scale"
    assert await scale(2, by=3) == 6
    assert await asyncio.gather(*(scale(n, 2) for n in range(10))) == list(range(0, 20, 2))


def make_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return random bytes as a tensor."""
    count = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(count + 1)
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (count,), generator=generator).to(torch.uint8)
    return data.view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
async def test_tensors_of_every_dtype_and_shape_arrive_bit_for_bit(pair: Pair) -> None:
    pair.bob.register(lambda *tensors: tensors, "echo")
    shapes = [(), (0,), (1,), (3, 0, 2), (2, 3), (1, 1, 1, 1, 1, 7), (300, 301)]
    for dtype in DTYPES.values():
        tensors = [make_tensor(dtype, shape) for shape in shapes]
        if dtype != getattr(torch, "float4_e2m1fn_x2", None):  # which torch cannot copy by strides
            tensors += [tensors[-1].t(), tensors[-1][::7, 1::2], tensors[2].expand(5, 1)]
        returned = await pair.remote_bob.call("echo", *tensors)
        assert all(map(same_bits, returned, tensors)), dtype
        assert all(tensor.is_contiguous() for tensor in returned)


async def test_what_is_computed_there_equals_what_is_computed_here(pair: Pair) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3))
    pair.bob.register(net, "net")
    for batch in (1, 7, 400):
        x = torch.randn(batch, 20)
        assert same_bits(await pair.remote_bob.call("net", x), net(x))
        assert same_bits(await pair.remote_bob.call("net", x.double().float().t().t()), net(x))


async def test_one_tensor_given_twice_is_one_tensor_there(pair: Pair) -> None:
    @pair.bob.register
    def add_to_first(x: Tensor, pair: list[Tensor]) -> tuple[bool, Tensor]:
        x += 1
        return x is pair[0], pair[0]

    shared = torch.zeros(3)
    is_shared, changed = await pair.remote_bob.call("add_to_first", shared, [shared, shared])
    assert is_shared
    assert changed.tolist() == [1, 1, 1]
    assert shared.tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 1000, LARGE])
async def test_received_tensors_are_their_receivers_own(pair: Pair, count: int) -> None:
    kept = []

    @pair.bob.register
    def work(x: Tensor) -> Tensor:
        kept.append(x)
        x.add_(1).mul_(2)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((x * 3).sum(), x)
        with torch.no_grad():
            x[:1] = 7
        kept.append(gradient)
        return gradient

    x = torch.ones(count)
    gradient = await pair.remote_bob.call("work", x)
    assert x.eq(1).all()
    assert gradient.eq(3).all()
    gradient.zero_()
    assert kept[1].eq(3).all()
    assert kept[0].tolist()[:2] == [7, 4][:count]


async def test_outside_a_context_a_call_carries_values_alone(pair: Pair) -> None:
    @pair.bob.register
    def work(x: Tensor) -> tuple[bool, Tensor]:
        return x.requires_grad, torch.ones(2, requires_grad=True) * 2

    required_grad, result = await pair.remote_bob.call("work", torch.ones(2))
    assert not required_grad
    assert not result.requires_grad


async def test_outside_a_context_the_graph_is_not_cut_silently(pair: Pair) -> None:
    pair.bob.register(lambda x: (x.requires_grad, 2 * x, len(x)), "work")
    parameter = torch.nn.Parameter(torch.ones(2))
    required_grad, result, length = await pair.remote_bob.call("work", parameter)
    assert (required_grad, result.tolist(), length) == (False, [2, 2], 2)
    with pytest.raises(za.ContextError, match="make the call inside"):
        (result.sum() + parameter.sum()).backward()
    for argument in (parameter.detach(), parameter):
        with torch.set_grad_enabled(argument is not parameter):
            _, result, _ = await pair.remote_bob.call("work", argument)
        assert not result.requires_grad


@pytest.mark.parametrize("function", [len, None, b"work"])
async def test_a_function_goes_by_its_name(pair: Pair, function: Any) -> None:
    """In torch.distributed.rpc it goes itself."""
    pair.bob.register(lambda: 1, "one")
    rref = await pair.remote_bob.remote("one")
    for call in (pair.remote_bob.call, pair.remote_bob.remote, rref.call, rref.remote):
        with pytest.raises(za.ConfigurationError, match="expected the name of what is registered"):
            await call(function)


# --- when what is sent is read -------------------------------------------------------------------


def views_of(x: Tensor) -> list[Tensor]:
    """Return tensors that share the memory of `x`, and travel each in its own way."""
    return [x, x.view(2, -1), x.view(2, -1).t(), x[::2]]


@pytest.mark.parametrize("count", [4, 10_000, LARGE])
async def test_arguments_are_read_before_the_call_first_suspends(pair: Pair, count: int) -> None:
    pair.bob.register(lambda *tensors: [tensor.sum().item() for tensor in tensors], "sums")
    x = torch.ones(count)
    calling = asyncio.ensure_future(pair.remote_bob.call("sums", *views_of(x)))
    asyncio.get_running_loop().call_soon(x.zero_)  # runs when the call has suspended once
    assert await calling == [count, count, count, count // 2]
    assert not x.any()


async def test_arguments_of_many_calls_at_once_have_all_been_read(pair: Pair) -> None:
    """More than the network takes in one go."""
    pair.bob.register(lambda x: x.sum().item(), "total")
    x = torch.ones(1000)
    calls = [asyncio.ensure_future(pair.remote_bob.call("total", x)) for _ in range(1000)]
    asyncio.get_running_loop().call_soon(x.zero_)
    assert await asyncio.gather(*calls) == [1000] * 1000


@pytest.mark.parametrize("count", [4, LARGE // 8])
async def test_arguments_that_wait_for_their_turn_have_been_read(count: int) -> None:
    async with connected(limits=za.Limits(requests=1)) as pair:
        go = asyncio.Event()

        @pair.bob.register
        async def total(x: Tensor) -> float:
            await go.wait()
            return x.sum().item()

        x = torch.ones(count)
        calls = [asyncio.ensure_future(pair.remote_bob.call("total", x)) for _ in range(3)]
        await asyncio.sleep(0)
        x.zero_()
        go.set()
        assert await asyncio.gather(*calls) == [count] * 3


@pytest.mark.parametrize("count", [4, 10_000, LARGE])
async def test_a_reply_is_read_before_its_object_runs_again(pair: Pair, count: int) -> None:
    class Counter:
        def __init__(self) -> None:
            self.total = torch.zeros(count)

        def add(self) -> Tensor:
            self.total += 1
            return self.total

        async def add_async(self) -> Tensor:
            self.total += 1
            return self.total

    pair.bob.register(Counter(), "counter", expose=("add", "add_async"))
    for method in ("counter.add", "counter.add_async"):
        replies = await asyncio.gather(*(pair.remote_bob.call(method) for _ in range(20)))
        first = replies[0][0].item()
        for index, reply in enumerate(replies):
            assert reply.eq(first + index).all()


# --- where it runs -------------------------------------------------------------------------------


async def test_a_plain_function_runs_in_a_thread_and_a_coroutine_on_the_loop(pair: Pair) -> None:
    @pair.bob.register
    def plain() -> int:
        return threading.get_ident()

    @pair.bob.register
    async def coroutine() -> int:
        return threading.get_ident()

    class Both:
        def plain(self) -> int:
            return threading.get_ident()

        async def coroutine(self) -> int:
            return threading.get_ident()

        async def __call__(self) -> int:
            return threading.get_ident()

    pair.bob.register(Both(), "both", expose=("plain", "coroutine"))
    here = threading.get_ident()
    call = pair.remote_bob.call
    assert await call("coroutine") == await call("both") == await call("both.coroutine") == here
    assert here not in (await call("plain"), await call("both.plain"))


async def test_a_plain_function_may_hand_on_a_call(pair: Pair) -> None:
    async with za.Worker("carol") as carol:
        remote_bob = await carol.connect(pair.bob.endpoints[0])
        pair.bob.register(lambda x: x + 1, "increment")
        itself = await pair.bob.connect(pair.bob.endpoints[0])
        pair.bob.register(lambda x: itself.call("increment", x), "forward")
        assert await remote_bob.call("forward", 1) == 2


async def test_functions_run_in_parallel(pair: Pair) -> None:
    barrier = threading.Barrier(8)
    pair.bob.register(lambda: barrier.wait(DEADLINE), "meet")
    met = await asyncio.gather(*(pair.remote_bob.call("meet") for _ in range(8)))
    assert sorted(met) == list(range(8))


async def test_methods_of_one_object_run_one_at_a_time(pair: Pair) -> None:
    class Exclusive:
        def __init__(self) -> None:
            self.running = 0
            self.most = 0

        def enter(self) -> None:
            self.running += 1
            self.most = max(self.most, self.running)

        def plain(self) -> None:
            self.enter()
            torch.ones(10_000).cumsum(0)
            self.running -= 1

        async def coroutine(self) -> None:
            self.enter()
            await asyncio.sleep(0)
            self.running -= 1

        def handing_on(self) -> Any:
            return self.coroutine()

    exclusive = Exclusive()
    pair.bob.register(exclusive, "object", expose=("plain", "coroutine", "handing_on"))
    methods = ["object.plain", "object.coroutine", "object.handing_on"] * 10
    await asyncio.gather(*(pair.remote_bob.call(method) for method in methods))
    assert exclusive.most == 1


async def test_concurrency_bounds_how_many_run_at_once(pair: Pair) -> None:
    running = 0
    most = 0
    two_run = asyncio.Event()

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            two_run.set()
        await two_run.wait()
        running -= 1

    pair.bob.register(work, concurrency=2)
    await asyncio.gather(*(pair.remote_bob.call("work") for _ in range(9)))
    assert most == 2


async def test_calls_begin_in_the_order_in_which_they_were_made(pair: Pair) -> None:
    seen: list[int] = []

    @pair.bob.register
    async def note(number: int) -> None:
        seen.append(number)

    await asyncio.gather(*(pair.remote_bob.call("note", number) for number in range(500)))
    assert seen == list(range(500))
