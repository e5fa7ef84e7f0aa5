"""The state of a module on another worker: loaded, of any size, of one moment, in the end gone."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import nn

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected, memory_endpoint
from tests.integration.fleets import until
from tests.integration.test_module import check_same, exposed, normalising, seeded
from zmq_autograd.node.states import MOST_STATES
from zmq_autograd.wire.limits import KIB

pytestmark = pytest.mark.timeout(60)

LAYERS = 20

SMALL = za.Limits(message_bytes=64 * KIB, frame_bytes=64 * KIB, header_bytes=16 * KIB)
"""Of a worker that takes in eight tensors of `Layers` at a time: half a message's bytes."""


class Layers(nn.Sequential):
    """A module with twenty weights of 4 KiB."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(32, 32, bias=False) for _ in range(LAYERS)))


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory: what travels is the same over the other transports."""
    async with connected() as pair:
        yield pair


@asynccontextmanager
async def small() -> AsyncIterator[Pair]:
    """Run two workers that take in little of one message."""
    async with (
        za.Worker("bob", listen=memory_endpoint(), limits=SMALL) as bob,
        za.Worker("alice", limits=SMALL) as alice,
    ):
        yield Pair(alice, bob, await alice.connect(bob.endpoints[0], timeout=DEADLINE))


async def left(worker: za.Worker, count: int) -> None:
    """Wait until so many values that live on `worker` are held."""

    def are_left() -> bool:
        gc.collect()  # an error that a coroutine raised holds on to what that knew
        return bool(worker.status()["rrefs"]["owned"] == count)

    await until(are_left)


def calls_of(worker: za.Worker) -> list[str]:
    """Return a list to which every function is added that `worker` is asked for from now on."""
    calls: list[str] = []

    async def forward(request: za.messages.ForwardRequest, peer: za.RemoteWorker) -> Any:
        calls.append(request.function)
        return await worker.default_handler(request, peer)

    worker.handler(za.messages.ForwardRequest)(forward)
    return calls


# --- what loads ----------------------------------------------------------------------------------


async def test_a_state_goes_there_and_back(pair: Pair) -> None:
    module, local = seeded(normalising), normalising()
    net = await exposed(pair, module)
    parameters = dict(module.named_parameters())
    for _ in range(3):
        local(torch.randn(4, 3))
    assert await net.load_state_dict(local.state_dict()) == ([], [])
    check_same(module.state_dict(), local.state_dict())
    assert all(parameters[name] is p for name, p in module.named_parameters())
    state = await net.state_dict()
    check_same(state, local.state_dict())
    assert not any(value.requires_grad for value in state.values())
    for value in state.values():
        value.zero_()  # copies
    check_same(module.state_dict(), local.state_dict())
    normalising().load_state_dict(await net.state_dict())
    # Parameters stand for their values.
    assert await net.load_state_dict(dict(local.named_parameters()), strict=False)
    check_same(module.state_dict(), local.state_dict())


async def test_loading_puts_nothing_on_the_graph(two: Pair) -> None:
    module, local = Layers(), Layers()
    net = await exposed(two, module)
    async with two.alice.context():
        await net.load_state_dict(dict(local.named_parameters()))
        await net.state_dict()
        for worker in (two.alice, two.bob):
            (context,) = worker.status()["contexts"]
            assert (context["sends"], context["receives"]) == (0, 0)
    check_same(module.state_dict(), local.state_dict())


@pytest.mark.parametrize("drop_metadata", [False, True])
async def test_what_does_not_match_is_said_in_torchs_words(two: Pair, drop_metadata: bool) -> None:
    module = seeded(normalising)
    net = await exposed(two, module)
    state: dict[str, Any] = seeded(normalising).state_dict()
    del state["1.num_batches_tracked"]
    state["other"] = torch.ones(1)
    state["1.weight"] = torch.ones(9)
    if drop_metadata:  # of a version that had no such buffer
        state = dict(state)
    for strict in (True, False):
        with pytest.raises(RuntimeError) as expected:
            seeded(normalising).load_state_dict(state, strict)
        with pytest.raises(za.RemoteError) as raised:
            await net.load_state_dict(state, strict)
        assert (raised.value.type_name, raised.value.message) == (
            "RuntimeError",
            str(expected.value),
        )
        assert ("num_batches_tracked" in raised.value.message) == (strict and not drop_metadata)
    del state["1.weight"]
    here = seeded(normalising).load_state_dict(state, strict=False)
    there = await net.load_state_dict(state, strict=False)
    assert there == tuple(here)
    assert there.missing_keys == here.missing_keys
    assert there.unexpected_keys == ["other"]


async def test_versions_and_extra_state_travel_with_it(two: Pair) -> None:
    class Versioned(nn.Module):
        _version = 7

        def __init__(self) -> None:
            super().__init__()
            self.extra: Any = {"seen": 3, "what": [torch.tensor([1.0]), "text"]}
            self.versions: list[Any] = []

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            self.versions.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    module, local = Versioned(), Versioned()
    local.extra = {"seen": 4, "what": None}
    net = await exposed(two, module)
    state = await net.state_dict()
    assert isinstance(state, OrderedDict)
    assert state["_extra_state"]["what"][0] == torch.tensor([1.0])
    assert local.state_dict()._metadata == state._metadata  # type: ignore[attr-defined]
    await net.load_state_dict(local.state_dict())
    assert module.extra == {"seen": 4, "what": None}
    assert module.versions == [7]


# --- of any size ---------------------------------------------------------------------------------


async def test_a_state_may_be_larger_than_a_message() -> None:
    module, other = Layers(), Layers()
    async with small() as two:
        net = await exposed(two, module)
        calls = calls_of(two.bob)
        check_same(await net.state_dict(), module.state_dict())
        assert calls == ["net.read_state", *["net.read_piece"] * 2]
        await net.load_state_dict(other.state_dict())
        check_same(module.state_dict(), other.state_dict())
        assert await net.load_state_dict({}, strict=False) == (list(other.state_dict()), [])
        with pytest.raises(za.RemoteError, match="Unexpected key"):
            await net.load_state_dict({**other.state_dict(), "other": torch.ones(1)})
        async with two.alice.context() as ctx:
            await ctx.backward((await net(torch.ones(1, 32))).sum())
            other(torch.ones(1, 32)).sum().backward()
            grads = await net.gradients(ctx)
        check_same(grads, {name: p.grad for name, p in other.named_parameters()})
        del net
        await left(two.bob, 0)


async def test_a_state_is_of_one_moment_and_loaded_at_once() -> None:
    module = Layers()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    async with small() as two:
        await exposed(two, module)
        call = two.remote_bob.call
        items, kept, count = await call("net.read_state")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        for number in range(1, count):
            items += await call("net.read_piece", kept, number)
        check_same({key: value for is_meta, key, value in items if not is_meta}, before)
        tensors = [item for item in items if not item[0]]
        kept = await call("net.add_piece", tensors[:8])
        await call("net.add_piece", tensors[8:16], kept)
        assert not any(value.any() for value in module.state_dict().values())
        await call("net.load_pieces", tensors[16:], kept)
        check_same(module.state_dict(), before)
        del kept
        await left(two.bob, 0)


async def test_a_tensor_that_no_message_has_room_for_is_an_error_that_says_so() -> None:
    module = nn.Linear(256, 256, bias=False)
    async with small() as two:
        net = await exposed(two, module)
        with pytest.raises(za.ResourceExhausted, match="262144 bytes"):
            await net.load_state_dict(module.state_dict())
        with pytest.raises(za.ZmqAutogradError, match="alice"):
            await net.state_dict()
        assert (await two.remote_bob.call("net.train")) is None  # the session lasts
        del net
        await left(two.bob, 0)


async def test_an_owner_keeps_no_more_than_a_few_states() -> None:
    async with small() as two:
        net = await exposed(two, Layers())
        kept = [await two.remote_bob.call("net.read_state") for _ in range(MOST_STATES)]
        for use in (net.state_dict(), net.load_state_dict(Layers().state_dict())):
            with pytest.raises(za.ResourceExhausted, match="8 times what the module's own takes"):
                await use
        kept.clear()
        await left(two.bob, LAYERS)
        await net.load_state_dict(Layers().state_dict())
        large = OrderedDict((str(i), torch.ones(32, 32)) for i in range(20 * LAYERS))
        with pytest.raises(za.ResourceExhausted, match="8 times"):
            await net.load_state_dict(large, strict=False)
        await left(two.bob, LAYERS)
        assert len(await net.state_dict()) == LAYERS
        del net
        await left(two.bob, 0)


@pytest.mark.parametrize("is_made_there", [False, True])
async def test_what_is_no_tensor_is_not_kept_without_end(is_made_there: bool) -> None:
    async with small() as two:
        two.bob.register(Layers, expose="module")
        two.bob.register(Layers(), "net", expose="module")
        made = await two.remote_bob.remote("Layers")
        add = (
            made.method("add_piece") if is_made_there else two.remote_bob.function("net.add_piece")
        )
        piece = [(False, "key", "x" * 8 * KIB)]
        kept = await add(piece)
        for _ in range(MOST_STATES * (80 + 3 * 16) // 16 - 1):
            await add(piece, kept)
        with pytest.raises(za.ResourceExhausted, match="8 times"):
            await add(piece, kept)


@pytest.mark.parametrize("piece", [3, [3], [(1, "key", 2)], [(False, 2, 3)], [(False, "key")], {}])
async def test_what_is_no_state_is_refused(two: Pair, piece: Any) -> None:
    net = await exposed(two, Layers())
    for function in ("net.add_piece", "net.load_pieces"):
        with pytest.raises(za.ZmqAutogradError, match="state: expected a list"):
            await two.remote_bob.call(function, piece)
    for reference in (3, net.parameters()[0].rref):
        with pytest.raises(za.ZmqAutogradError, match="an RRef to a state"):
            await two.remote_bob.call("net.read_piece", reference, 0)
    kept = await two.remote_bob.call("net.add_piece", [])
    for number in (1, -1, 0.0, False, "text"):
        with pytest.raises(za.ProtocolError, match="expected a piece below 1"):
            await two.remote_bob.call("net.read_piece", kept, number)
