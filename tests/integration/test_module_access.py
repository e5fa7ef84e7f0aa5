"""Who may use a module on another worker, for what, and how its calls end; modules behind RRefs."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from tests.integration.fleets import running, until
from tests.integration.test_module import Tied, batch, check_same, exposed, grads_of, seeded
from zmq_autograd.wire.values import replaced

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory: what travels is the same over the other transports."""
    async with connected() as pair:
        yield pair


class Counting(nn.Module):
    """Counts the calls that are in it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.most = 0
        self.lock = threading.Lock()
        self.together = threading.Barrier(2)
        self.alone = threading.Event()

    def forward(self, x: Tensor, wait_for_another: bool = False) -> Tensor:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        if wait_for_another:
            self.together.wait(DEADLINE)
        else:
            self.alone.wait(0.01)
        with self.lock:
            self.inside -= 1
        return x


class Net(nn.Module):
    """A module that peers may make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = seeded(lambda: nn.Sequential(nn.Linear(size, size), nn.Tanh()))

    def forward(self, x: Tensor, *, timeout: int = 1) -> Any:
        return self.layers(x) * timeout


# --- who, and for what ---------------------------------------------------------------------------


async def test_only_what_is_exposed_as_a_module_is_one(two: Pair) -> None:
    module = seeded(Tied)
    two.bob.register(module, "callable")
    two.bob.register(module, "some", expose=("forward", "state_dict", "parameters"))
    two.bob.register(module, "others", expose="module", allow={"carol"})
    said = set()
    for name in ("callable", "some", "others", "missing"):
        with pytest.raises(za.NotRegistered) as raised:
            await two.remote_bob.module(name)
        assert (raised.value.worker, raised.value.path) == ("bob", ("bob",))
        said.add(str(raised.value).replace(repr(name), "NAME"))
    assert said == {
        "NotRegistered on worker 'bob': no module is registered as NAME with expose='module' for "
        "this worker"
    }


@pytest.mark.parametrize(
    "method",
    [
        *("register_buffer", "_apply", "apply", "half", "parameters", "named_modules", "__class__"),
        *("first", "first.forward", "first.weight", "_modules", "requires_grad_", "compile"),
    ],
)
async def test_nothing_else_of_it_is_reached(two: Pair, method: str) -> None:
    net = await exposed(two, seeded(Tied))
    with pytest.raises(za.NotRegistered):
        await two.remote_bob.call(f"net.{method}")
    with pytest.raises(za.NotRegistered):
        await net.parameters()[0].rref.call(method)
    assert method in dir(object) or method == "parameters" or not hasattr(net, method)


async def test_a_parameter_goes_to_whom_its_holder_gives_it() -> None:
    async with running("alice", "bob", "carol") as fleet:
        module = seeded(Tied)
        fleet["bob"].register(module, "net", expose="module", allow={"alice"})
        received: list[za.RRef] = []

        @fleet["carol"].register
        async def take(rref: za.RRef) -> Tensor:
            received.append(rref)
            value: Tensor = await rref.to_here()
            return value

        net = await (await fleet.way("alice", "bob")).module("net")
        to_carol = await fleet.way("alice", "carol")
        found = await to_carol.call("take", net.parameters()[0].rref)
        assert torch.equal(found, module.state_dict()["first.weight"])
        with pytest.raises(za.NotRegistered):
            await (await fleet.way("carol", "bob")).module("net")
        received.clear()


# --- at once -------------------------------------------------------------------------------------


async def test_two_workers_use_it_at_once_each_in_its_context() -> None:
    async with running("alice", "bob", "carol") as fleet:
        module = seeded(Tied)
        fleet["bob"].register(module, "net", expose="module")

        async def train(name: str, times: int) -> list[dict[str, Tensor]]:
            net = await (await fleet.way(name, "bob")).module("net")
            found = []
            for _ in range(5):
                async with fleet[name].context() as ctx:
                    await ctx.backward((await net(batch() * times)).sum())
                    found.append(await net.gradients(ctx))
            return found

        found = await asyncio.gather(train("alice", 1), train("carol", 2))
        for times, all_of_one in zip((1, 2), found, strict=True):
            local = seeded(Tied)
            local(batch() * times).sum().backward()
            for grads in all_of_one:
                check_same(grads, grads_of(local))


async def test_calls_wait_for_their_turn_unless_more_may_run(two: Pair) -> None:
    module = Counting()
    net = await exposed(two, module)
    await asyncio.gather(*(net(torch.ones(1)) for _ in range(5)), net.eval(), net.state_dict())
    assert module.most == 1
    two.bob.register(module, "both", expose="module", concurrency=2)
    both = await two.remote_bob.module("both", timeout=DEADLINE)
    await asyncio.gather(*(both(torch.ones(1), True) for _ in range(4)))
    assert module.most == 2


# --- how calls end -------------------------------------------------------------------------------


async def test_every_call_waits_as_long_as_was_said(two: Pair) -> None:
    gate = threading.Event()

    class Stuck(nn.Module):
        def forward(self) -> None:
            gate.wait(DEADLINE)

    two.bob.register(Stuck, expose="module")
    two.bob.register(Stuck(), "net", expose="module")
    for net in (
        await two.remote_bob.module("net", timeout=0.2),
        await za.RemoteModule.from_rref(await two.remote_bob.remote("Stuck"), timeout=0.2),
    ):
        with pytest.raises(za.DeadlineExceeded, match="bob"):
            await net()
    gate.set()
    for bad in (-1, "soon"):
        with pytest.raises(za.ConfigurationError):
            await two.remote_bob.module("net", timeout=bad)  # type: ignore[arg-type]


async def test_what_the_module_raises_its_caller_raises(two: Pair) -> None:
    net = await exposed(two, seeded(Tied))
    with pytest.raises(RuntimeError) as expected:
        seeded(Tied)(torch.ones(2, 7))
    with pytest.raises(za.RemoteError) as raised:
        await net(torch.ones(2, 7))
    assert (raised.value.type_name, raised.value.message) == ("RuntimeError", str(expected.value))
    with pytest.raises(za.RemoteError, match="unexpected keyword argument 'y'"):
        await net(batch().detach(), y=3)
    with pytest.raises(za.SerializationError):
        await net(object())


async def test_a_lost_owner_is_named(two: Pair) -> None:
    net = await exposed(two, seeded(Tied))
    await two.bob.close()
    for use in (net(batch().detach()), net.state_dict(), net.train(), net.to(torch.float64)):
        with pytest.raises(za.WorkerLost, match="bob"):
            await use
    with pytest.raises(za.WorkerLost, match="bob"):
        await two.remote_bob.module("net")
    assert net.parameters()[0].shape == (3, 3)


async def test_nothing_is_left_once_nobody_uses_it(pair: Pair) -> None:
    module = seeded(Tied)
    net = await exposed(pair, module)
    again = await pair.remote_bob.module("net")
    await net.to(torch.float64)
    count = len(net.parameters())
    gc.collect()
    await until(lambda: pair.bob.status()["rrefs"]["owned"] == 2 * count)
    del net
    gc.collect()
    await until(lambda: pair.bob.status()["rrefs"]["owned"] == count)
    check_same(await again.state_dict(), module.state_dict())
    del again
    gc.collect()
    none = {"owned": 0, "forks": 0, "held": 0, "pending": 0}
    await until(lambda: pair.bob.status()["rrefs"] == pair.alice.status()["rrefs"] == none)


@pytest.mark.parametrize(
    "told",
    [
        None,
        [[3], False],
        [[], True],
        [[("w", "RRef", [2, "x"], "float32", True)], False],
        [[("w", "RRef", [2], "elephant", True)], False],
        [[("w", "RRef", [2], ["float32"], True)], False],
        [[("w", "RRef", [2], "float32")], False],
        [[("w", 3, [2], "float32", True)], False],
    ],
)
async def test_an_owner_that_tells_nonsense_broke_the_protocol(two: Pair, told: Any) -> None:
    async def remote_parameters(first: int) -> Any:
        worker = za.current_worker()
        assert worker is not None
        return replaced(told, str, lambda text: worker.rref(3) if text == "RRef" else text)

    two.bob.register(remote_parameters, "net.remote_parameters")
    with pytest.raises(za.ProtocolError, match="parameters"):
        await two.remote_bob.module("net")


@pytest.mark.parametrize(
    "told", [3, (1, 2), ([], None, "x"), (["x"], None, 1), ([(False, "a")], 1, 1), ([], None, 2)]
)
async def test_an_owner_that_hands_out_nonsense_broke_the_protocol(two: Pair, told: Any) -> None:
    two.bob.register(lambda *_: told, "fake.read_state")
    two.bob.register(lambda *_: told, "fake.read_piece")
    two.bob.register(lambda *_: ([], False), "fake.remote_parameters")
    net = await two.remote_bob.module("fake")
    with pytest.raises(za.ProtocolError, match="expected a"):
        await net.state_dict()


# --- behind an RRef ------------------------------------------------------------------------------


async def test_a_module_may_be_made_there_and_used_by_its_rref(pair: Pair) -> None:
    pair.bob.register(Net, expose="module")
    net = await za.RemoteModule.from_rref(await pair.remote_bob.remote("Net", 3))
    local = Net(3)
    assert (net.owner, net.name[:4]) == (pair.remote_bob, "RRef")
    assert [p.name for p in net.parameters()] == [name for name, _ in local.named_parameters()]
    async with pair.alice.context() as ctx:
        x = batch()
        await ctx.backward((await net(x, timeout=3)).sum())
        local(x, timeout=3).sum().backward()
        check_same(await net.gradients(ctx), grads_of(local))
        assert torch.equal(ctx.gradients()[x], torch.as_tensor(x.grad))
    await net.to(torch.float64)
    check_same(await net.state_dict(), local.double().state_dict())
    del net
    gc.collect()
    await until(lambda: pair.bob.status()["rrefs"]["owned"] == 0)


async def test_an_rref_leads_to_a_module_only_where_its_class_says_so(two: Pair) -> None:
    two.bob.register(Net, allow={"alice"}, expose=("forward",))
    two.bob.register(nn.Linear)
    for made in (two.remote_bob.remote("Net", 3), two.remote_bob.remote("Linear", 3, 3)):
        with pytest.raises(za.NotRegistered, match="'remote_parameters' of a "):
            await za.RemoteModule.from_rref(await made)
    with pytest.raises(za.ConfigurationError, match="local_value"):
        await za.RemoteModule.from_rref(two.alice.rref(Net(3)))
    with pytest.raises(za.ConfigurationError, match="expected an RRef, got a str"):
        await za.RemoteModule.from_rref("Net")  # type: ignore[arg-type]
