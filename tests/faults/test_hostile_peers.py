"""Hostile peers at a live port: good ones are served meanwhile and afterwards, and nothing is left.

The worker under attack runs in a process of its own and measures itself; the attacks are in
`attacks`, and each prints its seed and what it did to the worker.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch

import zmq_autograd as za
from tests.faults import attacks
from tests.faults.attacks import Attack
from tests.faults.victims import DEADLINE_SECONDS, Victim
from tests.faults.vitals import say
from tests.faults.wire_peer import WirePeer
from zmq_autograd.node.compute import MAX_THREADS
from zmq_autograd.session import LOST_AFTER_SECONDS
from zmq_autograd.wire import Envelope, encode
from zmq_autograd.wire.limits import DEFAULT_LIMITS, MIB
from zmq_autograd.wire.messages import (
    Cancel,
    ErrorResponse,
    ForwardRequest,
    ForwardResponse,
    Reply,
    Status,
)

LONGEST_STALL_SECONDS: Final = 0.1

MOST_BYTES: Final = 512 * MIB
"""By which an attack may make the worker grow."""

MOST_THREADS: Final = MAX_THREADS + 10
"""Compute threads, and some for the rest."""


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    victim = Victim("bob")
    try:
        victim.started()
        yield victim
    finally:
        victim.close()


@pytest.fixture
async def nothing_left(victim: Victim, nothing_left: None) -> None:
    """Begin to count what a test leaves after the module's victim, which outlives it."""


@dataclass
class Siege:
    """Bob, and a good peer that was there before anything happened."""

    endpoint: str
    bob: za.RemoteWorker
    before: dict[str, Any]

    async def check_newcomer(self) -> None:
        """A good peer comes, and is served."""
        async with za.connect(self.endpoint, timeout=DEADLINE_SECONDS) as bob:
            await check_call(bob)

    async def keep_calling(self) -> None:
        while True:
            await check_call(self.bob)

    async def nobody_waits(self) -> None:
        """Return once all calls of `wait` have ended, before silence alone would end them."""
        await self.bob.call("waiting", 0, timeout=LOST_AFTER_SECONDS / 2)

    async def vitals(self) -> dict[str, Any]:
        vitals: dict[str, Any] = await self.bob.call("vitals")
        return vitals

    async def settled(self) -> dict[str, Any]:
        """Wait until nothing that came with an attack is left."""
        counts = ("descriptors", "tasks", "waiting")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while True:
                vitals = await self.vitals()
                if all(vitals[each] <= self.before[each] for each in counts):
                    return vitals
                await asyncio.sleep(0.05)


async def check_call(bob: za.RemoteWorker) -> None:
    x = torch.rand(3)
    assert torch.equal(await bob.call("double", x, timeout=DEADLINE_SECONDS), 2 * x)


@pytest.fixture
async def siege(victim: Victim) -> AsyncIterator[Siege]:
    async with za.connect(victim.endpoint) as bob:
        siege = Siege(victim.endpoint, bob, await bob.call("vitals"))
        await siege.check_newcomer()
        await bob.call("restart_measuring")
        yield siege


def report(name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    grown = (after["bytes"] - before["bytes"]) / MIB
    say(
        f"{name}: longest stall {after['stall'] * 1000:.1f} ms "
        f"({after['stall on the clock'] * 1000:.1f} ms on the clock), grown by {grown:.0f} MiB"
    )


@pytest.mark.parametrize(
    "attack",
    [
        attacks.random_bytes,
        attacks.half_handshakes,
        attacks.http,
        attacks.drops_of_greetings,
        attacks.claims_of_gigabytes,
        attacks.random_frames,
        attacks.mutated_messages,
        attacks.huge_headers,
        attacks.many_tiny_frames,
        attacks.no_hello,
        attacks.hellos,
        attacks.many_sessions,
        attacks.replies_to_nothing,
        attacks.cancels,
        attacks.requests_cancelled_in_threads,
        attacks.requests_without_reading,
    ],
    ids=lambda attack: attack.__name__,
)
async def test_good_peers_are_served_under_attack(siege: Siege, attack: Attack) -> None:
    seed = random.randrange(2**32)
    say(f"seed {seed}")
    calling = asyncio.create_task(siege.keep_calling())
    with ExitStack() as stack:
        await asyncio.to_thread(attack, siege.endpoint, random.Random(seed), stack)
        await siege.check_newcomer()
        during = await siege.vitals()
    await siege.check_newcomer()
    assert not calling.done()
    calling.cancel()
    await asyncio.wait([calling])
    after = await siege.settled()
    report(attack.__name__, siege.before, after)
    for vitals in (during, after):
        assert vitals["stall"] < LONGEST_STALL_SECONDS
        assert vitals["bytes"] - siege.before["bytes"] < MOST_BYTES
        assert vitals["threads"] < MOST_THREADS


@pytest.fixture
async def mallory(siege: Siege) -> AsyncIterator[WirePeer]:
    """A peer in a session with bob that may say anything."""
    with WirePeer(siege.endpoint) as peer:
        await asyncio.to_thread(peer.shake_hands)
        yield peer


async def test_a_request_id_runs_once_however_often_it_comes(
    siege: Siege, mallory: WirePeer
) -> None:
    before = await siege.bob.call("noted")
    note = ForwardRequest("note")
    first = mallory.request(note)
    reply = mallory.reply_to(first)
    assert isinstance(reply, ForwardResponse)
    assert reply.result == before + 1
    for request_id in (first, first, 1, 0):
        mallory.send(note, Envelope(mallory.session_id, request_id))
        refusal = mallory.reply_to(request_id)
        assert isinstance(refusal, ErrorResponse)
        assert refusal.code == "protocol_error"
    last = 2**64 - 1
    mallory.send(note, Envelope(mallory.session_id, last))
    assert isinstance(mallory.reply_to(last), ForwardResponse)
    mallory.send(note, Envelope(mallory.session_id, 3))
    assert isinstance(mallory.reply_to(3), ErrorResponse)
    assert await siege.bob.call("noted") == before + 2
    await siege.check_newcomer()


async def test_a_request_that_comes_again_while_it_runs_is_not_run_again(
    siege: Siege, mallory: WirePeer
) -> None:
    request_id = mallory.request(ForwardRequest("wait"))
    mallory.send(ForwardRequest("wait"), Envelope(mallory.session_id, request_id))
    status_id = mallory.request(Status())
    assert request_id not in mallory.ids_until(status_id)
    assert (await siege.vitals())["waiting"] == 1
    mallory.send(Cancel(request_id), Envelope(mallory.session_id))
    await siege.nobody_waits()


async def test_a_reply_to_what_was_never_asked_ends_its_session(
    siege: Siege, mallory: WirePeer
) -> None:
    mallory.request(ForwardRequest("wait"))
    await siege.bob.call("waiting", 1)
    mallory.send(ForwardResponse(), Envelope(mallory.session_id, 2**64 - 1))
    await siege.nobody_waits()
    await siege.check_newcomer()


async def test_what_is_said_in_the_name_of_another_session_is_refused(
    siege: Siege, mallory: WirePeer
) -> None:
    before = await siege.bob.call("noted")
    with WirePeer(siege.endpoint) as other:
        await asyncio.to_thread(other.shake_hands)
        waiting = other.request(ForwardRequest("wait"))
        other.reply_to(other.request(Status()))
        for session_id in (other.session_id, 0, mallory.session_id ^ 1):
            mallory.send(ForwardRequest("note"), Envelope(session_id, 100))
            refusal = mallory.reply_to(100)
            assert isinstance(refusal, ErrorResponse)
            assert refusal.code == "protocol_error"
            mallory.send(Cancel(waiting), Envelope(session_id))
        mallory.reply_to(mallory.request(Status()))
        assert (await siege.vitals())["waiting"] == 1
        assert await siege.bob.call("noted") == before
    await siege.nobody_waits()
    await siege.check_newcomer()


async def test_calls_whose_caller_vanishes_are_cancelled(siege: Siege) -> None:
    """Two hundred at once; some of them wait for a thread, which nobody can cancel."""
    for _ in range(2):
        with WirePeer(siege.endpoint) as peer:
            await asyncio.to_thread(peer.shake_hands)
            for _ in range(200):
                peer.request(ForwardRequest("wait"))
                peer.request(ForwardRequest("finish", [0.1]))
            await siege.bob.call("waiting", 200)
        await siege.nobody_waits()
        await siege.check_newcomer()
    after = await siege.settled()
    report("callers that vanish", siege.before, after)


async def test_more_requests_than_the_limit_are_refused_one_by_one(
    siege: Siege, mallory: WirePeer
) -> None:
    limit = DEFAULT_LIMITS.requests
    wanted = [mallory.request(ForwardRequest("wait")) for _ in range(limit + 100)]
    for request_id in wanted[limit:]:
        refusal = mallory.reply_to(request_id)
        assert isinstance(refusal, ErrorResponse)
        assert refusal.code == "resource_exhausted"
        assert refusal.retryable
    assert (await siege.vitals())["waiting"] == limit
    await siege.check_newcomer()
    mallory.close()
    await siege.nobody_waits()


async def test_a_wrong_reply_ends_that_call_and_nothing_else(
    siege: Siege, mallory: WirePeer
) -> None:
    """Bob asks back; what comes is of every other type, no message at all, or an error."""
    truth = ForwardResponse(torch.ones(2))
    wrong = [sample for sample in attacks.SAMPLES if isinstance(sample, Reply)]
    for reply in [*(each for each in wrong if not isinstance(each, ForwardResponse)), None, truth]:
        asking = mallory.request(ForwardRequest("ask_back"))
        envelope, question = mallory.receive()
        assert isinstance(question, ForwardRequest)
        if reply is None:
            mallory.send_frames([encode(truth, envelope)[0], b"not eight bytes"])
        else:
            mallory.send(reply, envelope)
        answer = mallory.reply_to(asking)
        if reply is truth:
            assert isinstance(answer, ForwardResponse)
        else:
            assert isinstance(answer, ErrorResponse)
            expected = "remote_error" if isinstance(reply, ErrorResponse) else "protocol_error"
            assert answer.code == expected
            assert mallory.name in answer.text or answer.origin == "origin"
    await siege.check_newcomer()
