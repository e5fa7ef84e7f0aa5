"""RRefs: made, passed on through other workers, used, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair
from tests.integration.counters import NOTHING, Counter, gone, offer_counter, offer_keeper
from tests.integration.fleets import running, until

# --- made and used --------------------------------------------------------------------------------


async def test_a_result_is_kept_and_its_exposed_methods_are_called(pair: Pair) -> None:
    offer_counter(pair.bob)
    rref = await pair.remote_bob.remote("Counter", 3)
    assert (rref.owner, rref.is_owner) == (pair.remote_bob, False)
    assert await rref.call("add", 4) == 7
    assert await rref.method("add")(more=1) == 8
    assert pair.bob.status()["rrefs"] == NOTHING | {"owned": 1, "forks": 1}
    assert pair.alice.status()["rrefs"] == NOTHING | {"held": 1}


@pytest.mark.parametrize("method", ["reset", "__init__", "count", "__class__", "", "add.__call__"])
async def test_what_is_not_exposed_cannot_be_called(pair: Pair, method: str) -> None:
    offer_counter(pair.bob)
    rref = await pair.remote_bob.remote("Counter")
    with pytest.raises(za.NotRegistered, match="of a Counter is exposed to worker 'alice'"):
        await rref.call(method)


async def test_an_object_of_a_class_that_is_not_registered_has_no_methods(pair: Pair) -> None:
    pair.bob.register(lambda: Counter(), "make")
    rref = await pair.remote_bob.remote("make")
    with pytest.raises(za.NotRegistered, match="no method 'add' of a Counter"):
        await rref.call("add", 1)


async def test_an_error_of_the_function_is_raised_by_remote_and_nothing_is_kept(pair: Pair) -> None:
    offer_counter(pair.bob)
    with pytest.raises(za.RemoteError, match="TypeError"):
        await pair.remote_bob.remote("Counter", 1, 2, 3)
    with pytest.raises(za.NotRegistered):
        await pair.remote_bob.remote("Missing")
    assert pair.bob.status()["rrefs"] == NOTHING


async def test_an_error_of_a_method_leaves_the_object_as_it_is(pair: Pair) -> None:
    offer_counter(pair.bob)
    rref = await pair.remote_bob.remote("Counter", 3)
    with pytest.raises(za.RemoteError, match="on purpose"):
        await rref.call("fail")
    assert await rref.call("add", 1) == 4


async def test_methods_of_one_object_run_one_at_a_time(pair: Pair) -> None:
    offer_counter(pair.bob)
    rref = await pair.remote_bob.remote("Counter")
    await asyncio.gather(*(rref.call("slowly", "") for _ in range(10)))
    assert await rref.call("add", 0) == 10


async def test_a_value_is_fetched_as_a_copy(pair: Pair) -> None:
    pair.bob.register(lambda: {"x": torch.ones(2), "n": [1, (2.5, "s")]}, "make")
    rref = await pair.remote_bob.remote("make")
    first = await rref.to_here()
    first["x"].add_(1)
    second = await rref.to_here()
    assert torch.equal(second["x"], torch.ones(2))
    assert second["n"] == [1, (2.5, "s")]


async def test_what_cannot_travel_can_be_kept_but_not_fetched(pair: Pair) -> None:
    offer_counter(pair.bob)
    rref = await pair.remote_bob.remote("Counter")
    with pytest.raises(za.RemoteError, match="Counter cannot travel"):
        await rref.to_here()


async def test_a_method_s_result_is_kept_in_its_turn(pair: Pair) -> None:
    offer_counter(pair.bob)
    rref = await pair.remote_bob.remote("Counter", 1)
    total = await rref.remote("add", 4)
    assert await total.to_here() == 5


async def test_only_the_owner_has_the_value_itself(pair: Pair) -> None:
    value = object()
    rref = pair.bob.rref(value)
    assert rref.is_owner
    assert rref.owner is pair.bob
    assert rref.local_value() is value
    assert await rref.to_here() is value
    pair.bob.register(lambda: rref, "give")
    elsewhere = await pair.remote_bob.call("give")
    assert elsewhere.rref_id == rref.rref_id
    with pytest.raises(za.ConfigurationError, match=r"lives on worker 'bob': use .*to_here"):
        elsewhere.local_value()


# --- passed on ------------------------------------------------------------------------------------


async def test_an_rref_is_used_by_those_it_is_passed_to_and_comes_back() -> None:
    async with running("alice", "bob", "carol", "dave") as fleet:
        offer_counter(fleet["bob"])
        for name in ("carol", "dave"):
            offer_keeper(fleet[name])
        bob, carol = await fleet.way("alice", "bob"), await fleet.way("alice", "carol")
        rref = await bob.remote("Counter", 1)
        assert await carol.call("keeper.add", rref, 10) == 11
        await carol.call("keeper.keep", rref, rref)
        first, second = await carol.call("keeper.give")
        assert [await first.call("add", 1), await second.call("add", 1)] == [12, 13]
        # From carol to dave, who has met neither alice nor bob.
        assert await carol.call("ask", ["dave"], "keeper.add", rref, 10) == 23
        await carol.call("keeper.drop")
        del rref, first, second
        await gone(fleet)


async def test_an_rref_that_comes_home_is_the_owner_s_own(pair: Pair) -> None:
    offer_counter(pair.bob)

    @pair.bob.register
    def is_own(rref: za.RRef) -> bool:
        return rref.is_owner and isinstance(rref.local_value(), Counter)

    rref = await pair.remote_bob.remote("Counter")
    assert await pair.remote_bob.call("is_own", rref)


async def test_a_worker_that_does_not_listen_owns_what_others_hold() -> None:
    async with running("bob") as fleet, za.Worker("alice") as alice:
        keeper = offer_keeper(fleet["bob"])
        bob = await alice.connect(fleet["bob"].endpoints[0])
        alice.register(Counter, expose=("add",))
        counter = Counter(1)
        rref = alice.rref(counter)
        assert await bob.call("keeper.add", rref, 2) == 3
        await bob.call("keeper.keep", rref)
        del rref
        gc.collect()
        assert await keeper.kept[0].call("add", 1) == 4
        assert counter.count == 4
        keeper.drop()
        await gone(fleet)
        await until(lambda: alice.status()["rrefs"] == NOTHING)


async def test_rrefs_travel_at_any_depth_with_objects_of_a_codec(pair: Pair) -> None:
    offer_counter(pair.bob)

    class Box:
        def __init__(self, inside: Any) -> None:
            self.inside = inside

    for worker in (pair.alice, pair.bob):
        worker.codec(Box, "box", pack=lambda box: box.inside, unpack=Box)

    @pair.bob.register
    def opened(box: Box) -> Box:
        assert box.inside["c"][0].is_owner
        return Box([box.inside["c"][0], box.inside["x"] * 2])

    rref = await pair.remote_bob.remote("Counter", 1)
    x = torch.ones(2, requires_grad=True)
    async with pair.alice.context() as ctx:
        box = await pair.remote_bob.call("opened", Box({"c": [rref], "x": x}))
        assert await box.inside[0].call("add", 1) == 2
        await ctx.backward(box.inside[1].sum())
        assert torch.equal(ctx.gradients()[x], torch.full((2,), 2.0))


async def test_a_codec_that_the_other_side_does_not_have_is_an_error_of_the_call(
    pair: Pair,
) -> None:
    pair.alice.codec(Counter, pack=lambda counter: counter.count, unpack=Counter)
    pair.bob.register(lambda counter: 1, "take")
    with pytest.raises(za.RemoteError, match="worker 'bob' has no codec 'Counter'"):
        await pair.remote_bob.call("take", Counter())
    with pytest.raises(za.ConfigurationError, match="there is a codec for 'Counter'"):
        pair.alice.codec(Counter, pack=lambda counter: counter.count, unpack=Counter)


# --- let go of ------------------------------------------------------------------------------------


async def test_a_forgotten_rref_is_let_go_of(pair: Pair) -> None:
    offer_counter(pair.bob)
    for _ in range(20):
        await pair.remote_bob.remote("Counter")
    gc.collect()
    await until(lambda: pair.bob.status()["rrefs"] == NOTHING)
    assert pair.alice.status()["rrefs"] == NOTHING


async def test_a_lost_holder_s_rrefs_are_let_go_of() -> None:
    async with running("bob", "carol") as fleet:
        offer_counter(fleet["bob"])
        offer_keeper(fleet["carol"])
        alice = za.Worker("alice")
        async with alice:
            bob = await alice.connect(fleet["bob"].endpoints[0])
            carol = await alice.connect(fleet["carol"].endpoints[0])
            rrefs = [await bob.remote("Counter", n) for n in range(3)]
            await carol.call("keeper.keep", rrefs[0])
            assert fleet["bob"].status()["rrefs"]["forks"] == 4
        # Carol's remains.
        await until(lambda: fleet["bob"].status()["rrefs"] == NOTHING | {"owned": 1, "forks": 1})
        carol = await fleet.way("bob", "carol")
        await carol.call("keeper.drop")
        await gone(fleet)
        del rrefs


async def test_a_lost_owner_is_told_by_its_name() -> None:
    async with running("alice", "carol") as fleet:
        offer_keeper(fleet["carol"])
        async with za.Worker("bob", listen="memory://the-owner") as bob:
            offer_counter(bob)
            remote_bob = await fleet["alice"].connect(bob.endpoints[0])
            rref = await remote_bob.remote("Counter")
        with pytest.raises(za.WorkerLost, match="'bob'"):
            await rref.call("add", 1)
        with pytest.raises(za.WorkerLost, match="'bob'"):
            await rref.to_here()
        carol = await fleet.way("alice", "carol")
        async with za.Worker("bob", listen="memory://the-owner"):  # another life of that name
            with pytest.raises(za.WorkerLost, match=r"'bob'.*there is another worker"):
                await carol.call("keeper.add", rref, 1)
        del rref
        await gone(fleet)


async def test_a_cancelled_call_leaves_nothing(pair: Pair) -> None:
    started = asyncio.Event()

    @pair.bob.register
    async def make() -> Counter:
        started.set()
        await asyncio.Event().wait()
        return Counter()

    making = asyncio.create_task(pair.remote_bob.remote("make"))
    await asyncio.wait_for(started.wait(), DEADLINE)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    rref = pair.alice.rref(Counter())
    for _ in range(20):  # at whatever point of its way the call is
        passing = asyncio.create_task(pair.remote_bob.call("missing", rref))
        await asyncio.sleep(0)
        passing.cancel()
        with pytest.raises((asyncio.CancelledError, za.NotRegistered)):
            await passing
    del rref
    gc.collect()
    await until(lambda: pair.bob.status()["rrefs"] == NOTHING)
    await until(lambda: pair.alice.status()["rrefs"] == NOTHING)


async def test_a_reply_that_comes_too_late_leaves_nothing(pair: Pair) -> None:
    release = asyncio.Event()

    @pair.bob.register
    async def make() -> list[za.RRef]:
        with contextlib.suppress(asyncio.CancelledError):  # it replies all the same
            await release.wait()
        return [pair.bob.rref(Counter())]

    with pytest.raises(za.DeadlineExceeded):
        await pair.remote_bob.call("make", timeout=0.05)
    gc.collect()
    await until(lambda: pair.bob.status()["rrefs"] == NOTHING)


async def test_a_message_that_does_not_leave_counts_nothing(pair: Pair) -> None:
    rref = pair.alice.rref(1)
    with pytest.raises(za.SerializationError):
        await pair.remote_bob.call("missing", rref, object())
    assert pair.alice.status()["rrefs"] == NOTHING | {"owned": 1, "forks": 1}


async def test_whoever_holds_nothing_of_a_value_cannot_use_it() -> None:
    async with running("alice", "bob", "carol") as fleet:
        offer_counter(fleet["bob"])
        rref = await (await fleet.way("alice", "bob")).remote("Counter")
        stranger = await fleet.way("carol", "bob")
        for request in (
            za.messages.RRefFetchRequest(rref.rref_id),
            za.messages.ForwardRequest("add", (1,), target_id=rref.rref_id),
            za.messages.RRefBackwardRequest(rref.rref_id, 1),
        ):
            with pytest.raises(za.NotRegistered, match="worker 'carol' holds none"):
                await stranger.request(request)
        await stranger.request(za.messages.RRefDeleteRequest(rref.rref_id, rref.fork.fork_id))
        assert await rref.call("add", 1) == 1


async def test_what_is_registered_for_some_is_offered_to_them_alone() -> None:
    async with running("alice", "bob", "carol") as fleet:
        fleet["bob"].register(Counter, expose=("add",), allow={"alice"})
        offer_keeper(fleet["carol"])
        rref = await (await fleet.way("alice", "bob")).remote("Counter")
        assert await rref.call("add", 1) == 1
        carol = await fleet.way("alice", "carol")
        with pytest.raises(za.NotRegistered, match="exposed to worker 'carol'"):
            await carol.call("keeper.add", rref, 1)
