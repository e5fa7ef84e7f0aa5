"""What goes through the surface without ``async``, and that all of it is there."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import zmq_autograd as za
from tests.helpers import DEADLINE
from tests.integration.blocking.checks import same
from zmq_autograd import blocking
from zmq_autograd.blocking.surface import Surface

# --- what is wrapped -----------------------------------------------------------------------------


def test_rrefs_travel_as_blocking_ones(
    bob: blocking.Worker, alice: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    class Counter:
        def __init__(self, start: int) -> None:
            self.total = start

        def add(self, other: blocking.RRef) -> int:
            assert isinstance(other, blocking.RRef)
            self.total += other.to_here()
            return self.total

    bob.register(Counter, expose=("add",))

    @bob.register
    def look(rrefs: dict[str, list[blocking.RRef]]) -> list[Any]:
        [first] = rrefs["some"]
        assert isinstance(first, blocking.RRef)
        assert first.owner == blocking.current_peer()
        return [first.to_here(), first]

    mine = alice.rref(5)
    assert mine.owner == alice
    value, again = remote.call("look", {"some": [mine]})
    assert (value, again.local_value()) == (5, 5)
    counter = remote.remote("Counter", 3)
    assert isinstance(counter, blocking.RRef)
    assert counter.owner == remote
    assert counter.call("add", mine) == 8
    assert counter.remote("add", mine).to_here() == 13


def test_codecs_pack_and_unpack_blocking_objects(
    bob: blocking.Worker, alice: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    @dataclass
    class Named:
        name: str
        rref: blocking.RRef

    for each in (alice, bob):
        each.codec(
            Named, "named", pack=lambda it: [it.name, it.rref], unpack=lambda packed: Named(*packed)
        )

    @bob.register
    def renamed(named: Named) -> Named:
        assert isinstance(named.rref, blocking.RRef)
        return Named(named.name.upper(), named.rref)

    mine = alice.rref(5)
    found = remote.call("renamed", Named("five", mine))
    assert found.name == "FIVE"
    assert found.rref.local_value() == 5


def test_gradients_flow_through_rrefs(bob: blocking.Worker, remote: blocking.RemoteWorker) -> None:
    w = torch.tensor(3.0, requires_grad=True)
    bob.register(lambda x: w * x * x, "stage")
    x = torch.tensor(2.0, requires_grad=True)
    with remote.context() as ctx:
        rref = remote.remote("stage", x)
        ctx.backward(rref)
        found = ctx.gradients()[x]
    torch.autograd.backward(w * x * x)
    assert same(found, x.grad)


def test_plain_handlers_run_in_compute_threads(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    seen: list[Any] = []

    @bob.handler(za.messages.PropagateGradientsRequest)
    def on_gradients(
        request: za.messages.PropagateGradientsRequest, peer: blocking.RemoteWorker
    ) -> za.messages.Reply:
        seen.append((peer.name, threading.current_thread().name, request.grads))
        reply: za.messages.Reply = bob.default_handler(request, peer)
        return reply

    bob.register(lambda x: 2 * x, "double")
    x = torch.tensor(1.0, requires_grad=True)
    with remote.context() as ctx:
        ctx.backward(3 * remote.call("double", x))
        assert ctx.gradients()[x] == 6
    [(peer, thread, grads)] = seen
    assert (peer, grads) == ("alice", [torch.tensor(3.0)])
    assert thread.startswith("bob-compute-")
    with pytest.raises(za.ConfigurationError, match="has a handler"):
        bob.handler(za.messages.PropagateGradientsRequest)(on_gradients)


def test_a_remote_function_is_a_plain_one(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    bob.register(lambda x, timeout: x * timeout, "scaled")
    scaled = remote.function("scaled", timeout=DEADLINE)
    assert not inspect.iscoroutinefunction(scaled)
    assert scaled.__name__ == "scaled"
    assert scaled(2, timeout=3) == 6


def test_modules_and_objects_can_be_registered(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    net = nn.Linear(2, 1)
    bob.register(net, "net", expose=("zero_grad",))
    x = torch.ones(1, 2)
    assert torch.equal(remote.call("net", x), net(x))
    remote.call("net.zero_grad")


def test_remote_modules_are_trained_by_a_scheduled_optimizer(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    torch.manual_seed(0)
    far, near = nn.Linear(3, 4), nn.Linear(4, 1)
    alone = copy.deepcopy(nn.Sequential(far, near))
    batches = [torch.randn(5, 3) for _ in range(4)]
    bob.register(far, "far", expose="module")

    net = remote.module("far")
    assert isinstance(net, blocking.RemoteModule)
    assert net.owner == remote
    [weight, bias] = net.parameters()
    assert isinstance(weight, blocking.RemoteParameter)
    assert isinstance(weight.rref, blocking.RRef)
    assert (weight.numel(), bias.shape) == (12, torch.Size([4]))
    optimizer = blocking.DistributedOptimizer.create(
        torch.optim.SGD, itertools.chain(net.parameters(), near.parameters()), lr=0.5, momentum=0.9
    )
    assert isinstance(optimizer, blocking.DistributedOptimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    assert net.train() is net
    for x in batches:
        with remote.context() as ctx:
            ctx.backward(near(net(x)).square().mean())
            assert set(net.gradients(ctx)) == {"weight", "bias"}
            optimizer.clip_grad_norm(ctx, 1.0)
            optimizer.step(ctx)
        scheduler.step()

    expected = torch.optim.SGD(alone.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(expected, step_size=2, gamma=0.1)
    for x in batches:
        expected.zero_grad()
        torch.autograd.backward(alone(x).square().mean())
        nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        expected.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
    state, expected_state = net.state_dict(), alone[0].state_dict()
    assert state.keys() == expected_state.keys()
    assert all(same(state[key], expected_state[key]) for key in state)
    assert all(map(same, near.parameters(), alone[1].parameters()))
    momenta = zip(
        optimizer.state_dict()["state"].values(),
        expected.state_dict()["state"].values(),
        strict=True,
    )
    assert all(same(a["momentum_buffer"], b["momentum_buffer"]) for a, b in momenta)


# --- the surface is all there --------------------------------------------------------------------


def async_classes() -> list[type]:
    """Return the classes of the package's surface that have something to await."""
    found = [value for name in za.__all__ if inspect.isclass(value := getattr(za, name))]
    return [c for c in found if any(map(inspect.iscoroutinefunction, vars(c).values()))]


def public(of: type) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


@pytest.mark.parametrize("of", async_classes(), ids=lambda of: of.__name__)
def test_every_class_has_a_blocking_one(of: type) -> None:
    made = getattr(blocking, of.__name__)
    assert Surface._classes[of] is made
    assert made.__name__ in blocking.__all__
    assert public(made) == public(of)
    for name in public(of):
        ours, theirs = getattr(made, name), getattr(of, name)
        assert not inspect.iscoroutinefunction(ours)
        if inspect.isfunction(theirs):
            assert inspect.signature(ours) == inspect.signature(theirs)
            assert (ours.__doc__ is None) == (theirs.__doc__ is None)
    texts = [made.__doc__, *(getattr(made, name).__doc__ for name in public(made))]
    assert not [text for text in texts if text and ("await " in text or "async with" in text)]


def test_every_function_has_a_blocking_one() -> None:
    functions = {name for name in za.__all__ if inspect.isfunction(getattr(za, name))}
    assert functions - {"compute"} <= set(blocking.__all__)


def test_constructors_tell_their_arguments() -> None:
    of = inspect.signature(za.Worker)
    assert inspect.signature(blocking.Worker).parameters.keys() == of.parameters.keys()
    assert "Make a worker" in (blocking.Worker.__init__.__doc__ or "")


def test_attributes_are_those_of_the_object(remote: blocking.RemoteWorker) -> None:
    assert (remote.name, remote.is_connected) == ("bob", True)
    assert {"name", "endpoint", "call"} <= set(dir(remote))
    assert "bob" in repr(remote)
    assert {remote: 1}[blocking.of(remote._object)] == 1
    with pytest.raises(AttributeError, match="nothing"):
        _ = remote.nothing


def test_attributes_are_set_on_the_object(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    bob.register(nn.Linear(3, 4), "net", expose="module")
    net = remote.module("net")
    optimizer = blocking.DistributedOptimizer.create(torch.optim.SGD, net.parameters(), lr=0.5)
    before = net.state_dict()
    stopped = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    optimizer.param_groups = stopped
    assert optimizer.param_groups is stopped
    with remote.context() as ctx:
        ctx.backward(net(torch.ones(1, 3)).sum())
        optimizer.step(ctx)
    assert all(map(same, net.state_dict().values(), before.values()))
    weight: Any = net.parameters()[0]
    weight.rref = weight.rref
    assert isinstance(weight._object.rref, za.RRef)
    with pytest.raises(AttributeError, match="no setter"):
        remote.is_connected = False  # type: ignore[misc]


def test_what_a_subclass_sets_is_its_own(remote: blocking.RemoteWorker) -> None:
    class Party(blocking.Worker):
        def __init__(self) -> None:
            self.peers: list[Any] = []
            super().__init__("party")
            self.peers = [remote]

    assert Party().peers == [remote]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_they_cannot_be_copied_or_pickled(
    alice: blocking.Worker, remote: blocking.RemoteWorker, copied: Callable[[object], object]
) -> None:
    with remote.context() as ctx:
        for each in (remote, alice, ctx, alice.rref(5)):
            with pytest.raises(TypeError, match=f"{type(each).__name__} cannot be copied"):
                copied(each)
