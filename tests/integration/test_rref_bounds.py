"""RRefs where something is wrong: messages that never leave, references that lie, deadlines."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import weakref
from typing import Any

import pytest

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair
from tests.integration.counters import NOTHING, Counter, gone, offer_counter, offer_keeper
from tests.integration.fleets import running, until
from zmq_autograd.wire.objects import Reference

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


async def test_another_workers_own_rref_is_not_called_in_a_context(pair: Pair) -> None:
    """Two workers may live in one process, where nothing keeps their objects apart."""
    offer_counter(pair.bob)
    rref = pair.bob.rref(Counter())
    async with pair.alice.context():
        with pytest.raises(za.ContextError, match="is not of worker 'bob'"):
            await rref.call("add", 1)
    async with pair.bob.context():
        assert await rref.call("add", 1) == 1


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
