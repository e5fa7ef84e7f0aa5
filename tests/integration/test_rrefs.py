"""RRefs: made, passed on through other workers, used, differentiated, and let go of."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair
from tests.integration.fleets import Fleet, running, until
from zmq_autograd.wire.objects import Reference

NOTHING = {"owned": 0, "forks": 0, "held": 0, "pending": 0}


class Counter:
    """State that lives elsewhere."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def add(self, more: int) -> int:
        self.count += more
        return self.count

    def reset(self) -> None:
        self.count = 0

    def fail(self) -> None:
        raise ValueError("on purpose")

    async def slowly(self, started: str) -> int:
        """Let others run in the midst."""
        before = self.count
        await asyncio.sleep(0)
        self.count = before + 1
        return self.count


def offer_counter(worker: za.Worker) -> None:
    worker.register(Counter, expose=("add", "fail", "slowly"))


class Keeper:
    """Functions by which a worker keeps, uses, passes on and drops RRefs."""

    def __init__(self) -> None:
        self.kept: list[za.RRef] = []

    def keep(self, *rrefs: za.RRef) -> None:
        self.kept += rrefs

    def give(self) -> list[za.RRef]:
        return self.kept

    def drop(self) -> None:
        self.kept.clear()

    async def add(self, rref: za.RRef, more: int) -> Any:
        return await rref.call("add", more)


def offer_keeper(worker: za.Worker) -> Keeper:
    keeper = Keeper()
    worker.register(keeper, "keeper", expose=("keep", "give", "drop", "add"))
    return keeper


async def gone(fleet: Fleet) -> None:
    """Wait until no worker has anything to do with any RRef."""
    gc.collect()
    await until(lambda: all(w.status()["rrefs"] == NOTHING for w in fleet.workers.values()))


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


# --- gradients ------------------------------------------------------------------------------------


async def test_gradients_flow_through_rrefs_as_in_one_process() -> None:
    weight = torch.tensor([3.0, -1.0], requires_grad=True)

    async with running("alice", "bob", "carol") as fleet:
        fleet["bob"].register(lambda x: torch.tanh(weight * x), "stage")
        fleet["bob"].register(lambda: weight, "weight")

        @fleet["carol"].register
        async def product(left: za.RRef, right: za.RRef) -> Tensor:
            a, b = await left.to_here(), await right.to_here()
            return await za.compute(torch.mul, a, b)

        bob, carol = await fleet.way("alice", "bob"), await fleet.way("alice", "carol")
        x = torch.tensor([0.5, 2.0], requires_grad=True)
        async with fleet["alice"].context() as ctx:
            hidden = await bob.remote("stage", x)
            parameter = await bob.remote("weight")
            kept = await carol.remote("product", hidden, parameter)
            loss = (await kept.to_here() + await hidden.to_here()).sum()
            await ctx.backward(loss)
            mine = ctx.gradients()[x]
            (its,) = await bob.call("gradients")
        y = torch.tensor([0.5, 2.0], requires_grad=True)
        h = torch.tanh(weight * y)
        expected = torch.autograd.grad((h * weight + h).sum(), [y, weight])
        assert torch.equal(mine, expected[0])
        assert torch.equal(its, expected[1])


async def test_a_pass_is_run_from_an_rref_by_its_owner() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    async with running("alice", "bob", "carol") as fleet:
        fleet["bob"].register(lambda x: weight * x * x, "stage")

        @fleet["carol"].register
        async def on_bob(x: Tensor) -> za.RRef:
            return await (await fleet.way("carol", "bob")).remote("stage", x)

        carol = await fleet.way("alice", "carol")
        x = torch.tensor(2.0, requires_grad=True)
        async with fleet["alice"].context() as ctx:
            loss = await carol.call("on_bob", x)  # alice has never met bob in this context
            await ctx.backward(loss, retain_graph=True)
            assert ctx.gradients() == {x: torch.tensor(12.0)}
            await ctx.backward(loss)
            assert ctx.gradients() == {x: torch.tensor(24.0)}
            assert (await carol.call("ask", ["bob"], "gradients")) == [torch.tensor(8.0)]


async def test_backward_from_an_rref_says_what_is_wrong(pair: Pair) -> None:
    offer_counter(pair.bob)
    pair.bob.register(lambda x: x.detach(), "detached")
    rref = await pair.remote_bob.remote("Counter")
    async with pair.alice.context() as ctx:
        x = torch.ones((), requires_grad=True)
        await pair.remote_bob.call("detached", x)
        with pytest.raises(za.RemoteError, match="expected a tensor or several"):
            await ctx.backward(rref)
        cut = await pair.remote_bob.remote("detached", x)
        with pytest.raises(za.RemoteError, match="does not require grad"):
            await ctx.backward(cut)
        with pytest.raises(za.ConfigurationError, match="from an RRef: expected no grad_tensors"):
            await ctx.backward(cut, torch.ones(()))


async def test_backward_from_another_workers_own_rref_says_so(pair: Pair) -> None:
    """Two workers may live in one process, where nothing keeps their objects apart."""
    w = torch.ones((), requires_grad=True)
    kept: list[za.RRef] = []

    @pair.bob.register
    def keep(x: Tensor) -> None:
        kept.append(pair.bob.rref(w * x))

    async with pair.alice.context() as ctx:
        await pair.remote_bob.call("keep", torch.ones((), requires_grad=True))
        with pytest.raises(za.ContextError, match="is held by worker 'bob', not by this one"):
            await ctx.backward(kept[0])


async def test_backward_from_an_rref_adds_to_grad_where_asked(pair: Pair) -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    pair.bob.register(lambda x: weight * x, "stage")
    x = torch.tensor(2.0, requires_grad=True)
    async with pair.alice.context() as ctx:
        await ctx.backward(await pair.remote_bob.remote("stage", x), accumulate_grad=True)
    assert (weight.grad, x.grad) == (torch.tensor(2.0), torch.tensor(3.0))


async def test_an_rref_that_is_never_fetched_costs_a_pass_nothing(pair: Pair) -> None:
    pair.bob.register(lambda x: x * 2, "stage")
    x = torch.tensor(2.0, requires_grad=True)
    async with pair.alice.context() as ctx:
        unused = await pair.remote_bob.remote("stage", x)
        await ctx.backward(await pair.remote_bob.call("stage", x), timeout=DEADLINE)
        assert ctx.gradients() == {x: torch.tensor(2.0)}
        del unused


# --- what the owner itself does -------------------------------------------------------------------


async def test_the_owner_s_own_calls_have_a_deadline_and_need_no_leave() -> None:
    class Slow:
        async def wait(self) -> None:
            await asyncio.Event().wait()

        def raise_timeout(self) -> None:
            raise TimeoutError("of its own")

    async with za.Worker("bob") as bob:
        bob.register(Slow, expose=("wait", "raise_timeout"), allow={"alice"})
        rref = bob.rref(Slow())
        with pytest.raises(za.DeadlineExceeded, match=r"'wait' on worker 'bob' .* within 0.01 s"):
            await rref.call("wait", timeout=0.01)
        with pytest.raises(TimeoutError, match="of its own"):
            await rref.call("raise_timeout")


# --- bounds ---------------------------------------------------------------------------------------


async def test_a_request_that_never_left_counts_nothing(pair: Pair) -> None:
    release = asyncio.Event()
    limits = za.Limits(requests=1)
    async with za.Worker("carol", listen="memory://busy", limits=limits) as carol:

        @carol.register
        async def wait(*args: Any) -> None:
            await release.wait()

        remote_carol = await pair.alice.connect(carol.endpoints[0])
        first = asyncio.create_task(remote_carol.call("wait"))
        await until(lambda: carol.status()["sessions"][0]["requests_received"])
        rref = pair.alice.rref(1)
        with pytest.raises(za.DeadlineExceeded):
            await remote_carol.call("wait", rref, timeout=0.05)
        assert pair.alice.status()["rrefs"] == NOTHING | {"owned": 1, "forks": 1}
        release.set()
        await first


async def test_references_to_nowhere_do_not_keep_others_from_their_owners() -> None:
    """Thousands of owners that nobody answers for are dialled a few at a time."""
    async with running("alice", "bob", "carol") as fleet:
        offer_counter(fleet["bob"])
        keeper = offer_keeper(fleet["carol"])
        liar = await fleet.way("bob", "carol")
        nowhere = [
            Reference("nobody", f"{number:032x}", number, number, (f"memory://nowhere-{number}",))
            for number in range(1, 3000)
        ]
        lying = asyncio.create_task(
            liar.request(za.messages.ForwardRequest("keeper.keep", (nowhere,)))
        )
        rref = await (await fleet.way("alice", "bob")).remote("Counter")
        carol = await fleet.way("alice", "carol")
        assert await carol.call("keeper.add", rref, 1, timeout=DEADLINE / 4) == 1
        lying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lying
        assert keeper.kept == []


async def test_a_value_is_packed_in_the_context_that_it_is_fetched_in(pair: Pair) -> None:
    contexts: list[int] = []

    def pack(counter: Counter) -> int:
        context = za.current_context()
        contexts.append(0 if context is None else context.context_id)
        return counter.count

    for worker in (pair.alice, pair.bob):
        worker.codec(Counter, pack=pack, unpack=Counter)
    offer_counter(pair.bob)
    rref = await pair.remote_bob.remote("Counter", 3)
    assert (await rref.to_here()).count == 3
    async with pair.alice.context() as ctx:
        assert (await rref.to_here()).count == 3
        assert contexts == [0, ctx.context_id]


async def test_a_session_that_a_wrong_endpoint_led_to_does_not_stay() -> None:
    async with running("alice", "bob", "carol") as fleet:
        offer_keeper(fleet["carol"])
        first, second = (
            Reference("dave", "f" * 32, 1, fork_id, (fleet["bob"].endpoints[0],))
            for fork_id in (2, 3)
        )
        carol = await fleet.way("alice", "carol")
        with pytest.raises(za.WorkerLost, match=r"'dave'.*there is another worker, 'bob'"):
            await carol.request(za.messages.ForwardRequest("keeper.keep", (first,)))
        await until(lambda: fleet["bob"].status()["peers"] == [])
        bob = await fleet.way("carol", "bob")  # hers, and so it stays
        with pytest.raises(za.WorkerLost, match="'dave'"):
            await carol.request(za.messages.ForwardRequest("keeper.keep", (second,)))
        assert await bob.call("ask", ["carol"], "keeper.give") == []


async def test_an_rref_is_neither_copied_nor_pickled(pair: Pair) -> None:
    rref = pair.alice.rref(1)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="pass it on"):
            copied(rref)


async def test_an_rref_that_comes_home_from_one_who_lost_it_is_refused_alone() -> None:
    async with running("alice", "bob") as fleet:
        offer_counter(fleet["bob"])
        keeper = offer_keeper(fleet["bob"])
        alice = fleet["alice"]
        bob = await fleet.way("alice", "bob")
        mine = alice.rref(1)
        # As after a lost session: nobody holds it there by what bob knows.
        lost = Reference("bob", fleet["bob"].incarnation, 1, 2)
        with pytest.raises(za.NotRegistered, match="worker 'bob' has no RRef 1"):
            await bob.request(za.messages.ForwardRequest("keeper.keep", (lost, [mine])))
        assert keeper.kept == []
        gc.collect()
        await until(lambda: alice.status()["rrefs"] == NOTHING | {"owned": 1, "forks": 1})
        assert await bob.call("keeper.give") == []  # the session goes on
        del mine
        await gone(fleet)


async def test_one_fork_cannot_be_two_objects() -> None:
    """Letting go of either would leave the other one with nothing."""
    async with running("alice", "bob") as fleet:
        keeper = offer_keeper(fleet["bob"])
        alice = fleet["alice"]
        bob = await fleet.way("alice", "bob")
        mine = alice.rref(1)
        twice = Reference("alice", alice.incarnation, mine.rref_id, 2)
        with pytest.raises(za.ProtocolError, match="fork 2 of an RRef came twice"):
            await bob.request(za.messages.ForwardRequest("keeper.keep", (twice, [twice])))
        await bob.call("keeper.keep", mine)
        gc.collect()
        await until(lambda: fleet["bob"].status()["rrefs"]["held"] == 1)
        assert await keeper.kept[0].to_here() == 1
        keeper.drop()
        del mine
        await gone(fleet)


async def test_a_closed_worker_goes_though_what_it_registered_holds_its_rrefs() -> None:
    async def life() -> list[weakref.ref[Any]]:
        async with za.Worker("bob") as bob:
            keeper = offer_keeper(bob)
            keeper.kept = [bob.rref(Counter()) for _ in range(3)]
            return [weakref.ref(keeper), weakref.ref(bob), weakref.ref(keeper.kept[0])]

    left = await life()
    await asyncio.sleep(0)
    gc.collect()
    assert [reference() for reference in left] == [None, None, None]
