"""How a worker leaves, and serves until then: what is under way may finish."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from typing import Any

import pytest

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected, memory_endpoint
from zmq_autograd.wire.messages import Status

pytestmark = pytest.mark.timeout(30)


class Slow:
    """A function that has started, and ends when its gate is open."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.gate = asyncio.Event()

    async def slow(self) -> str:
        self.started.set()
        await self.gate.wait()
        return "done"


# --- leaving -------------------------------------------------------------------------------------


async def test_closing_twice_or_before_the_start_is_nothing(pair: Pair) -> None:
    await za.Worker("carol").close()
    await pair.bob.close()
    await pair.bob.close()
    assert pair.bob.endpoints == []


async def test_whoever_closes_at_the_same_time_waits_too() -> None:
    async with connected() as pair:
        slow = Slow()
        pair.bob.register(slow.slow)
        calling = asyncio.create_task(pair.remote_bob.call("slow"))
        await slow.started.wait()
        closings = [asyncio.create_task(pair.bob.close()) for _ in range(3)]
        with pytest.raises(za.WorkerLost):
            await asyncio.wait_for(ask_until_refused(pair.remote_bob), DEADLINE)
        assert not any(closing.done() for closing in closings)
        slow.gate.set()
        assert await calling == "done"
        await asyncio.gather(*closings)


async def ask_until_refused(remote: za.RemoteWorker) -> None:
    """Send requests: the first ones may arrive before the worker has begun to leave."""
    while True:
        await remote.request(Status())


async def test_leaving_lets_calls_under_way_finish_and_refuses_new_ones(pair: Pair) -> None:
    gate = asyncio.Event()
    thread_gate = threading.Event()
    started = asyncio.Barrier(3)
    loop = asyncio.get_running_loop()

    @pair.bob.register
    async def coroutine() -> str:
        await started.wait()
        await gate.wait()
        return "coroutine done"

    @pair.bob.register
    def plain() -> str:
        asyncio.run_coroutine_threadsafe(started.wait(), loop)
        assert thread_gate.wait(DEADLINE)
        return "plain done"

    calls = [asyncio.create_task(pair.remote_bob.call(name)) for name in ("coroutine", "plain")]
    await started.wait()
    closing = asyncio.create_task(pair.bob.close())
    with pytest.raises(za.WorkerLost, match="leaving") as raised:
        await ask_until_refused(pair.remote_bob)
    assert (raised.value.name, raised.value.incarnation) == ("bob", pair.remote_bob.incarnation)
    assert not closing.done()
    gate.set()
    thread_gate.set()
    assert await asyncio.gather(*calls) == ["coroutine done", "plain done"]
    await closing


async def test_what_takes_too_long_is_told_that_its_worker_leaves(endpoint: str) -> None:
    async with connected(endpoint, drain=0.05) as pair:
        started = asyncio.Barrier(4)
        cancelled = []

        @pair.bob.register
        async def endless() -> None:
            await started.wait()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(1)
                raise

        calls = [asyncio.create_task(pair.remote_bob.call("endless")) for _ in range(3)]
        await started.wait()
        incarnation = pair.bob.incarnation
        await pair.bob.close()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, za.WorkerLost)
            assert (outcome.name, outcome.incarnation) == ("bob", incarnation)
            assert "leaving" in str(outcome)
        assert len(cancelled) == 3


async def test_a_thread_that_takes_too_long_holds_nobody_up() -> None:
    gate = threading.Event()
    entered = threading.Event()

    def stuck() -> None:
        entered.set()
        assert gate.wait(DEADLINE)

    async with connected(drain=0.01) as pair:
        pair.bob.register(stuck)
        calling = asyncio.create_task(pair.remote_bob.call("stuck"))
        assert await asyncio.to_thread(entered.wait, DEADLINE)
        async with asyncio.timeout(5):
            await pair.bob.close()
        with pytest.raises(za.WorkerLost, match="leaving"):
            await calling
        gate.set()


async def test_ones_own_calls_end_when_one_leaves(pair: Pair) -> None:
    started = asyncio.Event()

    @pair.bob.register
    async def endless() -> None:
        started.set()
        await asyncio.Event().wait()

    calling = asyncio.create_task(pair.remote_bob.call("endless"))
    await started.wait()
    await pair.alice.close()
    with pytest.raises(za.WorkerLost, match=r"'alice' .* is lost: it left"):
        await calling


async def test_peers_hear_at_once_that_a_worker_left(pair: Pair) -> None:
    peers: list[za.RemoteWorker] = []
    handled = asyncio.Event()

    @pair.bob.register
    async def wait_for_the_loss() -> None:
        peer = za.current_peer()
        assert peer is not None
        peers.append(peer)
        handled.set()
        await asyncio.Event().wait()

    calling = asyncio.create_task(pair.remote_bob.call("wait_for_the_loss"))
    await handled.wait()
    asking = asyncio.create_task(peers[0].call("nothing"))
    await pair.alice.close()
    with pytest.raises(za.ZmqAutogradError):
        await asking
    with pytest.raises(za.WorkerLost):
        await calling
    async with asyncio.timeout(2):
        while peers[0].is_connected:
            await asyncio.sleep(0)


async def test_a_handler_may_close_its_own_worker(pair: Pair) -> None:
    done = asyncio.Event()

    @pair.bob.register
    async def leave() -> str:
        await pair.bob.close()
        done.set()
        return "left"

    with pytest.raises(za.WorkerLost, match="'bob'"):
        await pair.remote_bob.call("leave")
    async with asyncio.timeout(DEADLINE):
        await done.wait()
    assert pair.bob.endpoints == []


async def test_a_close_that_is_cancelled_can_be_finished(pair: Pair) -> None:
    slow = Slow()
    pair.bob.register(slow.slow)
    calling = asyncio.create_task(pair.remote_bob.call("slow"))
    await slow.started.wait()
    closing = asyncio.create_task(pair.bob.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    slow.gate.set()
    await pair.bob.close()
    assert await calling == "done"
    assert pair.bob.endpoints == []


async def test_a_connect_under_way_ends_when_its_worker_leaves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        for target in (endpoint, memory_endpoint()):
            alice = za.Worker("alice")
            await alice.start()
            connecting = asyncio.create_task(alice.connect(target, timeout=DEADLINE))
            await asyncio.sleep(0)
            await alice.close()
            async with asyncio.timeout(5):
                with pytest.raises((za.WorkerLost, za.ConfigurationError)):
                    await connecting


async def test_starting_and_leaving_many_times_with_calls_under_way(endpoint: str) -> None:
    async with za.Worker("alice") as alice:
        for _ in range(20):
            async with za.Worker("bob", listen=endpoint, drain=0) as bob:
                bob.register(asyncio.Event().wait, "wait")
                remote = await alice.connect(bob.endpoints[0])
                calls = [asyncio.create_task(remote.call("wait")) for _ in range(3)]
                await remote.request(Status())
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(outcome, za.WorkerLost) for outcome in outcomes)


# --- serving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_serves_until_a_signal_comes(pair: Pair, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    serving = asyncio.create_task(pair.bob.serve_forever())
    await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    async with asyncio.timeout(DEADLINE):
        await serving
    assert signal.getsignal(number) in (before, signal.SIG_DFL, signal.default_int_handler)
    assert (await pair.remote_bob.request(Status())) is not None  # leaving is the block's part


async def test_a_signal_ends_all_that_serve(pair: Pair) -> None:
    workers = (pair.alice, pair.bob)
    serving = [asyncio.create_task(worker.serve_forever()) for worker in workers]
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(5):
        await asyncio.gather(*serving)


async def test_it_serves_until_it_is_closed(pair: Pair) -> None:
    serving = [asyncio.create_task(pair.bob.serve_forever()) for _ in range(2)]
    await asyncio.sleep(0)
    await pair.bob.close()
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*serving)
    with pytest.raises(za.ConfigurationError, match="not running"):
        await pair.bob.serve_forever()


async def test_a_worker_in_another_thread_serves_without_signals() -> None:
    endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    here = asyncio.get_running_loop()

    async def serve() -> None:
        async with za.Worker("bob", listen="tcp://127.0.0.1:0") as bob:

            @bob.register
            async def leave() -> None:
                task = asyncio.create_task(bob.close())
                task.add_done_callback(tasks.append)

            tasks: list[Any] = []
            here.call_soon_threadsafe(endpoint.set_result, bob.endpoints[0])
            await bob.serve_forever()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    async with za.connect(await endpoint) as bob:
        await bob.call("leave")
    await asyncio.to_thread(thread.join, DEADLINE)
    assert not thread.is_alive()


async def test_handlers_may_all_close_their_worker_at_once(pair: Pair) -> None:
    started = asyncio.Barrier(4)

    @pair.bob.register
    async def leave() -> None:
        await started.wait()
        await pair.bob.close()

    calls = [asyncio.create_task(pair.remote_bob.call("leave")) for _ in range(3)]
    await started.wait()
    async with asyncio.timeout(5):
        await pair.bob.close()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(o is None or isinstance(o, za.WorkerLost) for o in outcomes)
    assert pair.bob.endpoints == []
