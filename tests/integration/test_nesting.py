"""Calls that lead to calls: to any depth, back to where they came from, many chains at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, memory_endpoint

pytestmark = pytest.mark.timeout(60)

DEPTH = 100
CHAINS = 50
LIMIT = za.Limits().requests


def register_ping_pong(worker: za.Worker) -> None:
    """Offer functions that count down by calling whoever called, each in its own way."""
    loop = asyncio.get_running_loop()

    def back(name: str, depth: int) -> Any:
        peer = za.current_peer()
        assert peer is not None
        return peer.call(name, depth - 1, timeout=DEADLINE)

    @worker.register
    async def coroutine(depth: int) -> int:
        return 0 if depth == 0 else 1 + await back("coroutine", depth)

    @worker.register
    def handing_on(depth: int) -> Any:
        return back("handing_on", depth) if depth else 0

    @worker.register
    def blocking(depth: int) -> int:
        """Keep a thread for as long as everything below takes."""
        if depth == 0:
            return 0
        below = asyncio.run_coroutine_threadsafe(back("blocking", depth), loop)
        return 1 + int(below.result(DEADLINE))

    @worker.register
    async def computing(depth: int) -> int:
        left = await za.compute(lambda: depth - 1)
        return 0 if depth == 0 else 1 + await back("computing", left + 1)

    @worker.register
    async def mixed(depth: int) -> int:
        if depth == 0:
            return 0
        kinds = ("coroutine", "blocking", "mixed")
        return 1 + int(await back(kinds[depth % 3], depth))


@pytest.fixture
async def both_ways(pair: Pair) -> Pair:
    """Two workers that both play ping pong."""
    register_ping_pong(pair.alice)
    register_ping_pong(pair.bob)
    return pair


@pytest.mark.parametrize("kind", ["coroutine", "blocking", "computing"])
async def test_one_chain_goes_back_and_forth(both_ways: Pair, kind: str) -> None:
    assert await both_ways.remote_bob.call(kind, DEPTH, timeout=DEADLINE) == DEPTH


async def test_calls_that_are_handed_on_come_back(both_ways: Pair) -> None:
    assert await both_ways.remote_bob.call("handing_on", DEPTH, timeout=DEADLINE) == 0


async def test_threads_that_wait_for_each_other_do_not_starve(both_ways: Pair) -> None:
    calls = (both_ways.remote_bob.call("blocking", 10, timeout=DEADLINE) for _ in range(CHAINS))
    assert await asyncio.gather(*calls) == [10] * CHAINS


@pytest.mark.parametrize("kind", ["coroutine", "computing"])
async def test_many_deep_chains_at_once_do_not_starve(both_ways: Pair, kind: str) -> None:
    depth = 2 * LIMIT // CHAINS  # fills what each side lets run at once
    calls = (both_ways.remote_bob.call(kind, depth, timeout=DEADLINE) for _ in range(CHAINS))
    assert await asyncio.gather(*calls) == [depth] * CHAINS


async def test_both_sides_start_chains_at_once(both_ways: Pair) -> None:
    peers: list[za.RemoteWorker] = []

    @both_ways.bob.register
    async def remember() -> None:
        peer = za.current_peer()
        assert peer is not None
        peers.append(peer)

    await both_ways.remote_bob.call("remember")
    remotes = [both_ways.remote_bob, peers[0]] * 10
    assert await asyncio.gather(*(r.call("mixed", 30, timeout=DEADLINE) for r in remotes))


@pytest.fixture
async def ring() -> AsyncIterator[list[za.RemoteWorker]]:
    """Three workers, each with ``around``, which calls the next one; as the first sees them."""
    names = ("a", "b", "c")
    workers = {name: za.Worker(name, listen=memory_endpoint()) for name in names}
    async with workers["a"], workers["b"], workers["c"]:
        remotes = []
        for name, following in zip(names, ("b", "c", "a"), strict=True):
            remote = await workers[name].connect(workers[following].endpoints[0])
            remotes.append(remote)
            register_around(workers[name], remote)
        yield remotes


def register_around(worker: za.Worker, following: za.RemoteWorker) -> None:
    @worker.register
    async def around(path: list[str], depth: int) -> list[str]:
        path = [*path, worker.name]
        if depth == 0:
            return path
        result: list[str] = await following.call("around", path, depth - 1, timeout=DEADLINE)
        return result


async def test_a_chain_goes_round_a_ring_and_through_its_start(
    ring: list[za.RemoteWorker],
) -> None:
    path = await ring[0].call("around", [], 29, timeout=DEADLINE)
    assert path == ["b", "c", "a"] * 10


async def test_a_worker_may_call_itself(pair: Pair) -> None:
    itself = await pair.alice.connect(pair.bob.endpoints[0])
    assert itself is pair.remote_bob
    register_ping_pong(pair.bob)
    own = await pair.bob.connect(pair.bob.endpoints[0])
    assert own.name == "bob"
    assert own.incarnation == pair.bob.incarnation
    assert await own.call("coroutine", 50, timeout=DEADLINE) == 50
    assert await own.call("blocking", 20, timeout=DEADLINE) == 20


# --- called back over the connection that was dialled --------------------------------------------


async def test_a_worker_that_only_dials_is_called_back(pair: Pair) -> None:
    seen: list[tuple[str, str]] = []

    @pair.alice.register
    async def whoami(x: int) -> str:
        peer = za.current_peer()
        worker = za.current_worker()
        assert peer is not None
        assert worker is not None
        seen.append((worker.name, peer.name))
        return f"{worker.name} got {x}"

    @pair.bob.register
    async def call_back(x: int) -> str:
        peer = za.current_peer()
        assert peer is not None
        assert (peer.name, peer.incarnation) == ("alice", pair.alice.incarnation)
        return str(await peer.call("whoami", x + 1))

    assert not pair.alice.endpoints
    assert await pair.remote_bob.call("call_back", 1) == "alice got 2"
    assert seen == [("alice", "bob")]


async def test_a_peer_is_called_of_ones_own_accord(pair: Pair) -> None:
    """What a handler was given as its peer stays good after it has returned."""
    peers: list[za.RemoteWorker] = []
    pair.alice.register(lambda x: x + 1, "increment")

    @pair.bob.register
    async def hello() -> None:
        peer = za.current_peer()
        assert peer is not None
        peers.append(peer)

    await pair.remote_bob.call("hello")
    await pair.remote_bob.call("hello")
    assert peers[0] is peers[1]
    assert await asyncio.gather(*(peers[0].call("increment", n) for n in range(20))) == list(
        range(1, 21)
    )
    assert peers[0].endpoint


async def test_a_task_that_a_handler_left_behind_may_go_on_calling(pair: Pair) -> None:
    """It serves the call no longer, so what that call had left is no bound for it."""
    done = asyncio.Event()
    tasks = []
    pair.alice.register(lambda: "answer", "ask")
    answers: list[str] = []

    @pair.bob.register
    async def start() -> None:
        peer = za.current_peer()
        assert peer is not None

        async def later(peer: za.RemoteWorker) -> None:
            await done.wait()
            answers.append(await peer.call("ask"))

        tasks.append(asyncio.create_task(later(peer)))

    await pair.remote_bob.call("start", timeout=0.05)
    await asyncio.get_running_loop().run_in_executor(None, threading.Event().wait, 0.06)
    done.set()
    await tasks[0]
    assert answers == ["answer"]
