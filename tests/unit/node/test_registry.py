"""The table of what a worker offers: forms of registering, what is refused, turns."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from tests.helpers import DEADLINE
from zmq_autograd.errors import ConfigurationError, NotRegistered
from zmq_autograd.node import Registry
from zmq_autograd.node.compute import ComputePool


class Counter:
    """Something with methods, a property and an attribute."""

    rate = 1.5

    def __init__(self) -> None:
        self.total = 0

    def add(self, n: int) -> int:
        self.total += n
        return self.total

    async def add_async(self, n: int) -> int:
        return self.add(n)

    def secret(self) -> str:
        return "secret"


class CallableCounter(Counter):
    def __call__(self, n: int) -> int:
        return self.add(n)


@pytest.fixture
def registry() -> Registry:
    return Registry("bob")


@pytest.fixture
async def pool() -> AsyncIterator[ComputePool]:
    """A pool whose threads have ended when the test is over."""
    pool = ComputePool("bob")
    yield pool
    for thread in pool.close():
        await asyncio.to_thread(thread.join, DEADLINE)


class Caller:
    """Calls what a registry holds, as a peer does."""

    def __init__(self, registry: Registry, pool: ComputePool) -> None:
        self._registry = registry
        self._pool = pool

    async def __call__(self, name: str, *args: Any, peer: str = "alice", **kwargs: Any) -> Any:
        return await self._registry.find(name, peer).call(args, kwargs, self._pool)


@pytest.fixture
def call(registry: Registry, pool: ComputePool) -> Caller:
    return Caller(registry, pool)


# --- what can be registered ----------------------------------------------------------------------


def double(x: int) -> int:
    return 2 * x


async def double_async(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (double, "double"),
        (double_async, "double_async"),
        (len, "len"),
        (str.upper, "upper"),
        (torch.relu, "relu"),
    ],
)
def test_a_function_is_known_by_its_own_name(registry: Registry, target: Any, name: str) -> None:
    registry.register(target)
    assert registry.find(name, "alice").function is target


@pytest.mark.parametrize(
    "target",
    [
        double,
        double_async,
        functools.partial(double),
        functools.partial(double_async, x=21),
        lambda x: x * 2,
        lambda x: double_async(x),
    ],
)
async def test_every_kind_of_function_is_called(
    registry: Registry, call: Caller, target: Any
) -> None:
    registry.register(target, "f")
    assert await call("f", x=21) == 42


async def test_an_object_offers_the_methods_that_are_named_and_no_others(
    registry: Registry, call: Caller
) -> None:
    registry.register(Counter(), "counter", expose=("add", "add_async"))
    assert await call("counter.add", 2) == 2
    assert await call("counter.add_async", 3) == 5
    for name in ("counter", "counter.secret", "counter.total", "counter.__init__", "counter.add."):
        with pytest.raises(NotRegistered):
            registry.find(name, "alice")


async def test_a_callable_object_is_called_by_its_name(registry: Registry, call: Caller) -> None:
    registry.register(CallableCounter(), "counter")
    assert await call("counter", 2) == 2
    with pytest.raises(NotRegistered):
        registry.find("counter.add", "alice")


async def test_a_class_is_called_by_its_name(registry: Registry, call: Caller) -> None:
    registry.register(Counter)
    assert isinstance(await call("Counter"), Counter)


async def test_a_module_is_called_with_its_hooks(registry: Registry, call: Caller) -> None:
    net = torch.nn.Linear(2, 2)
    seen: list[int] = []
    net.register_forward_hook(lambda *_: seen.append(1))
    registry.register(net, "net", expose=("forward",))
    registry.register(net, "all", expose="module")
    x = torch.ones(1, 2)
    assert torch.equal(await call("net", x), net(x))
    assert torch.equal(await call("all", x), net(x))
    assert torch.equal(await call("all.forward", x), net(x))
    assert len(seen) == 6
    assert torch.equal(await call("net.forward", x), net.forward(x))  # what was named, as it is
    assert len(seen) == 6


async def test_an_exposed_module_offers_what_a_remote_module_needs(
    registry: Registry, call: Caller
) -> None:
    linear = torch.nn.Linear(2, 2)
    net = torch.nn.Sequential(linear, torch.nn.Dropout())
    registry.register(net, "net", expose="module")
    state = await call("net.state_dict")
    assert list(state) == ["0.weight", "0.bias"]
    assert not any(value.requires_grad for value in state.values())
    state["0.bias"].fill_(7)
    assert linear.bias[0] != 7
    assert await call("net.load_state_dict", state) == ([], [])
    assert linear.bias[0] == 7
    for method, args, training in (
        ("eval", (), False),
        ("train", (), True),
        ("train", (False,), False),
    ):
        assert await call(f"net.{method}", *args) is None
        assert net.training == training
    net(torch.ones(1, 2)).sum().backward()
    assert await call("net.zero_grad") is None
    assert linear.bias.grad is None


def test_names_may_be_anything_printable(registry: Registry) -> None:
    for name in ("a.b", "with space", "é", "x" * 200):
        registry.register(double, name)
        assert registry.find(name, "alice").function is double


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        (lambda: 1, {}, "has no name"),
        (Counter(), {}, "has no name"),
        (functools.partial(double), {}, "has no name"),
        (double, {"name": ""}, "name: expected"),
        (double, {"name": "x" * 201}, "name: expected"),
        (double, {"name": "a\nb"}, "name: expected"),
        (double, {"name": 3}, "name: expected"),
        (double, {"name": "za.double"}, "reserved"),
        (Counter(), {"name": "counter"}, "nothing to offer"),
        (3, {"name": "three"}, "nothing to offer"),
        (Counter(), {"name": "counter", "expose": "add"}, "expected names of methods"),
        (Counter(), {"name": "counter", "expose": ("missing",)}, "no method 'missing'"),
        (Counter(), {"name": "counter", "expose": ("rate",)}, "no method 'rate'"),
        (Counter(), {"name": "counter", "expose": ("add", 3)}, "no method 3"),
        (Counter(), {"name": "counter", "expose": "module"}, "expected an nn.Module"),
        (Counter, {"expose": "module"}, "expected an nn.Module"),
        (double, {"concurrency": 0}, "concurrency"),
        (double, {"concurrency": -1}, "concurrency"),
        (double, {"concurrency": 1.5}, "concurrency"),
        (double, {"concurrency": True}, "concurrency"),
        (double, {"allow": "alice"}, "allow"),
    ],
)
def test_what_cannot_work_is_refused(
    registry: Registry, target: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        registry.register(target, **options)
    registry.register(double)  # nothing was half registered


def test_a_name_is_given_once(registry: Registry) -> None:
    registry.register(Counter(), "counter", expose=("add",))
    with pytest.raises(ConfigurationError, match=r"'bob' has registered 'counter.add' already"):
        registry.register(double, "counter.add")
    with pytest.raises(ConfigurationError, match="already"):
        registry.register(CallableCounter(), "counter", expose=("add",))
    with pytest.raises(NotRegistered):
        registry.find("counter", "alice")  # the second was not half registered


def test_the_library_has_names_of_its_own(registry: Registry) -> None:
    registry.register(double, "za.double", internal=True)
    assert registry.find("za.double", "alice").function is double


# --- who may call --------------------------------------------------------------------------------


def test_what_is_not_for_a_peer_looks_like_what_is_not_there(registry: Registry) -> None:
    registry.register(Counter(), "counter", expose=("add",), allow={"carol", "dave"})
    registry.register(double, allow=())
    assert registry.find("counter.add", "carol")
    said = []
    for name in ("counter.add", "double", "missing"):
        with pytest.raises(NotRegistered) as raised:
            registry.find(name, "alice")
        assert raised.value.worker == "bob"
        said.append(str(raised.value).replace(name, "..."))
    assert said[0] == said[1] == said[2]


def test_it_says_what_was_asked_for_in_bounded_space(registry: Registry) -> None:
    with pytest.raises(NotRegistered) as raised:
        registry.find("x" * 100_000, "alice")
    assert len(str(raised.value)) < 1000


def test_what_may_be_retried_is_marked(registry: Registry) -> None:
    registry.register(double, idempotent=True)
    registry.register(double_async)
    assert registry.find("double", "alice").idempotent
    assert not registry.find("double_async", "alice").idempotent


# --- turns ---------------------------------------------------------------------------------------


class Gated:
    """A method in a thread that waits at a gate."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.finished = 0

    def plain(self) -> None:
        self.entered.release()
        assert self.gate.wait(DEADLINE)
        self.finished += 1

    async def coroutine(self) -> int:
        return self.finished

    def failing(self) -> None:
        raise ValueError("failed")


async def test_a_cancelled_call_keeps_its_turn_until_its_thread_is_done(
    registry: Registry, call: Caller
) -> None:
    gated = Gated()
    registry.register(gated, "gated", expose=("plain", "coroutine"))
    first = asyncio.create_task(call("gated.plain"))
    await asyncio.to_thread(gated.entered.acquire)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    second = asyncio.create_task(call("gated.coroutine"))
    await asyncio.sleep(0)
    assert not second.done()
    gated.gate.set()
    assert await asyncio.wait_for(second, DEADLINE) == 1


async def test_a_call_cancelled_while_it_waits_takes_no_turn(
    registry: Registry, call: Caller
) -> None:
    gated = Gated()
    registry.register(gated, "gated", expose=("plain", "coroutine"))
    first = asyncio.create_task(call("gated.plain"))
    await asyncio.to_thread(gated.entered.acquire)
    waiting = [asyncio.create_task(call("gated.plain")) for _ in range(3)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    gated.gate.set()
    await asyncio.wait_for(first, DEADLINE)
    assert await asyncio.wait_for(call("gated.coroutine"), DEADLINE) == 1


async def test_a_failing_call_gives_its_turn_back(registry: Registry, call: Caller) -> None:
    registry.register(Gated(), "gated", expose=("failing", "coroutine"))
    for _ in range(3):
        with pytest.raises(ValueError, match="failed"):
            await asyncio.wait_for(call("gated.failing"), DEADLINE)
    assert await asyncio.wait_for(call("gated.coroutine"), DEADLINE) == 0


def test_turns_hold_in_one_loop_after_the_other() -> None:
    registry = Registry("bob")
    gated = Gated()
    gated.gate.set()
    registry.register(gated, "gated", expose=("plain",))

    async def contend() -> None:
        pool = ComputePool("bob")
        call = Caller(registry, pool)
        await asyncio.gather(*(call("gated.plain") for _ in range(5)))
        for thread in pool.close():
            thread.join(DEADLINE)

    for _ in range(3):
        asyncio.run(contend())
    assert gated.finished == 15
