"""A worker's life: starting and connecting; where it may listen."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, memory_endpoint
from zmq_autograd.wire.messages import Status, StatusResponse

pytestmark = pytest.mark.timeout(30)


# --- what it is ----------------------------------------------------------------------------------


async def test_a_worker_is_known_while_it_runs(endpoint: str) -> None:
    worker = za.Worker("bob", listen=endpoint)
    assert (worker.name, worker.endpoints, worker.incarnation) == ("bob", [], "")
    assert repr(worker) == "<Worker 'bob' (not listening)>"
    async with worker as entered:
        assert entered is worker
        assert len(worker.incarnation) == 32
        (listening,) = worker.endpoints
        assert not listening.endswith(":0")
        assert repr(worker) == f"<Worker 'bob' ({listening})>"
    assert (worker.endpoints, worker.incarnation) == ([], "")


async def test_it_listens_on_several_endpoints(endpoint: str) -> None:
    endpoints = [endpoint, memory_endpoint(), "tcp://127.0.0.1:0", "tcp://[::1]:0"]
    async with za.Worker("bob", listen=endpoints) as bob, za.Worker("alice") as alice:
        bob.register(lambda: "here", "f")
        assert len(set(bob.endpoints)) == 4
        for listening in bob.endpoints:
            remote = await alice.connect(listening)
            assert remote.name == "bob"
            assert remote.endpoint == listening
            assert remote.incarnation == bob.incarnation
            assert await remote.call("f") == "here"


async def test_what_is_registered_before_and_after_is_offered(endpoint: str) -> None:
    bob = za.Worker("bob", listen=endpoint)

    @bob.register
    def plain() -> str:
        return "plain"

    @bob.register(name="renamed", concurrency=2)
    def other() -> str:
        return "renamed"

    @bob.register()
    async def empty() -> str:
        return "empty"

    async with bob, za.Worker("alice") as alice:
        remote = await alice.connect(bob.endpoints[0])
        assert bob.register(plain, "later") is plain
        net = torch.nn.Linear(1, 1)
        assert bob.register(net, name="net") is net
        for name, expected in (("plain", "plain"), ("renamed", "renamed"), ("empty", "empty")):
            assert await remote.call(name) == expected
        assert await remote.call("later") == "plain"
        with pytest.raises(za.NotRegistered):
            await remote.call("other")
    assert plain() == "plain"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": 3}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"heartbeat": 0}, "heartbeat"),
        ({"heartbeat": float("nan")}, "heartbeat"),
        ({"heartbeat": 5, "lost_after": 5}, "heartbeat"),
        ({"lost_after": float("nan")}, "lost_after"),
        ({"drain": -1}, "drain"),
        ({"drain": float("nan")}, "drain"),
        ({"listen": "nonsense"}, "endpoint"),
        ({"listen": "tcp://127.0.0.1"}, "endpoint"),
        ({"listen": ["tcp://127.0.0.1:0", "udp://127.0.0.1:0"]}, "endpoint"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(za.ConfigurationError, match=said):
        za.Worker(**{"name": "bob"} | options)


# --- where it may listen -------------------------------------------------------------------------

BEYOND = [
    "tcp://0.0.0.0:0",
    "tcp://*:0",
    "tcp://[::]:0",
    "tcp://192.168.1.5:0",
    "tcp://10.0.0.1:5555",
    "tcp://[2001:db8::1]:0",
    "tcp://0:0",
    "tcp://eth0:0",
    "tcp://lo:0",
    "tcp://no-such-host.invalid:0",
    "tcp://255.255.255.255:0",
    "tcp://[::ffff:192.168.1.5]:0",
    "tcp://[::ffff:0.0.0.0]:0",
    "tcp://2130706432:0.0.0.0:0",
]


@pytest.mark.parametrize("endpoint", BEYOND)
def test_listening_beyond_this_machine_is_refused(endpoint: str) -> None:
    with pytest.raises(za.ConfigurationError) as raised:
        za.Worker("bob", listen=["tcp://127.0.0.1:0", endpoint])
    assert isinstance(raised.value, ValueError)


async def test_the_refusal_says_what_to_do() -> None:
    with pytest.raises(za.ConfigurationError, match=r"'bob'.*tcp://0.0.0.0:0.*insecure=True"):
        za.Worker("bob", listen="tcp://0.0.0.0:0")


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:0", "tcp://*:*", "tcp://[::]:0"])
async def test_it_listens_beyond_this_machine_when_told_to(endpoint: str) -> None:
    async with za.Worker("bob", listen=endpoint, insecure=True) as bob, za.Worker("alice") as alice:
        port = bob.endpoints[0].rpartition(":")[2]
        host = "[::1]" if "[" in endpoint else "127.0.0.1"
        assert (await alice.connect(f"tcp://{host}:{port}")).name == "bob"


@pytest.mark.parametrize("endpoint", ["tcp://localhost:0", "tcp://127.3.2.1:0", "tcp://[::1]:0"])
async def test_every_way_to_say_loopback_is_fine(endpoint: str) -> None:
    async with za.Worker("bob", listen=endpoint) as bob, za.Worker("alice") as alice:
        assert (await alice.connect(bob.endpoints[0])).name == "bob"


# --- starting ------------------------------------------------------------------------------------


async def test_it_starts_once(pair: Pair) -> None:
    with pytest.raises(za.ConfigurationError, match="'bob' is running already"):
        await pair.bob.start()
    with pytest.raises(za.ConfigurationError, match="'bob' is running"):
        pair.bob.configure(name="robert")
    assert (await pair.remote_bob.request(Status())) is not None


async def test_an_endpoint_that_is_taken_leaves_nothing_open(pair: Pair) -> None:
    taken = pair.bob.endpoints[0]
    other = memory_endpoint()
    carol = za.Worker("carol", listen=[other, taken])
    for _ in range(2):
        with pytest.raises(za.ConfigurationError):
            await carol.start()
    assert carol.endpoints == []
    async with za.Worker("dave", listen=other):
        pass


async def test_a_restart_is_another_life(endpoint: str) -> None:
    bob = za.Worker("bob", listen=endpoint)
    bob.register(lambda: "here", "f")
    lives = set()
    async with za.Worker("alice") as alice:
        remotes = []
        for _ in range(3):
            async with bob:
                remote = await alice.connect(bob.endpoints[0])
                lives.add(remote.incarnation)
                remotes.append(remote)
                assert await remote.call("f") == "here"
        for remote in remotes:
            assert not remote.is_connected
            with pytest.raises(za.WorkerLost) as raised:
                await remote.call("f")
            assert raised.value.incarnation == remote.incarnation
    assert len(lives) == 3


def test_it_runs_in_one_loop_after_the_other() -> None:
    bob = za.Worker("bob", listen=memory_endpoint())
    bob.register(torch.nn.Linear(1, 1), "net")

    async def contend() -> None:
        async with bob, za.Worker("alice") as alice:
            remote = await alice.connect(bob.endpoints[0])
            await asyncio.gather(*(remote.call("net", torch.ones(1)) for _ in range(10)))

    for _ in range(3):
        asyncio.run(contend())


# --- connecting ----------------------------------------------------------------------------------


async def test_connecting_again_gives_the_same_worker(pair: Pair) -> None:
    assert await pair.alice.connect(pair.bob.endpoints[0]) is pair.remote_bob
    assert repr(pair.remote_bob) == f"<RemoteWorker 'bob' at {pair.bob.endpoints[0]}>"


async def test_connecting_at_once_gives_one_session(endpoint: str) -> None:
    async with za.Worker("bob", listen=endpoint) as bob, za.Worker("alice") as alice:
        remotes = await asyncio.gather(*(alice.connect(bob.endpoints[0]) for _ in range(20)))
        assert len(set(map(id, remotes))) == 1
        reply = await remotes[0].request(Status())
        assert isinstance(reply, StatusResponse)
        assert reply.status["peers"] == ["alice"]


async def test_a_connect_that_is_cancelled_takes_nobody_along(endpoint: str) -> None:
    async with za.Worker("bob", listen=endpoint) as bob, za.Worker("alice") as alice:
        first = asyncio.create_task(alice.connect(bob.endpoints[0]))
        second = asyncio.create_task(alice.connect(bob.endpoints[0]))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).name == "bob"
        with pytest.raises(asyncio.CancelledError):
            await first


def free(endpoint: str) -> str:
    """Return `endpoint` with a port on which nobody listens where it asks for any."""
    if not endpoint.endswith(":0"):
        return endpoint
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


async def test_it_keeps_trying_until_somebody_listens(endpoint: str) -> None:
    endpoint = free(endpoint)
    async with za.Worker("alice") as alice, za.Worker("carol") as carol:
        connecting = asyncio.create_task(alice.connect(endpoint, timeout=DEADLINE))
        with pytest.raises(za.WorkerLost):
            await carol.connect(endpoint, timeout=0.05)
        assert not connecting.done()
        async with za.Worker("bob", listen=endpoint):
            assert (await connecting).name == "bob"


@pytest.mark.parametrize("timeout", [0, 0.05])
async def test_nobody_there_is_a_lost_worker(endpoint: str, timeout: float) -> None:
    endpoint = free(endpoint)
    async with za.Worker("alice") as alice:
        with pytest.raises(za.WorkerLost) as raised:
            await alice.connect(endpoint, timeout=timeout)
        assert endpoint in str(raised.value)
        assert raised.value.name == endpoint


async def test_somebody_silent_is_a_deadline() -> None:
    async with za.Worker("alice") as alice:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises((za.DeadlineExceeded, za.WorkerLost)) as raised:
                await alice.connect(endpoint, timeout=0.1)
            assert endpoint in str(raised.value)


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "tcp://", "tcp://127.0.0.1:0", "tcp://*:5555", "ipc://", "", None]
)
async def test_an_endpoint_that_nobody_can_have_is_refused(endpoint: Any) -> None:
    async with za.Worker("alice") as alice:
        with pytest.raises(za.ConfigurationError, match="endpoint"):
            await alice.connect(endpoint, timeout=1)


async def test_only_a_running_worker_connects() -> None:
    alice = za.Worker("alice")
    for _ in range(2):
        with pytest.raises(za.ConfigurationError, match="'alice' is not running"):
            await alice.connect("tcp://127.0.0.1:5555")
        async with alice:
            pass


async def test_a_lost_worker_stays_lost_and_connecting_again_finds_the_next(endpoint: str) -> None:
    async with za.Worker("alice") as alice:
        async with za.Worker("bob", listen=endpoint) as bob:
            listening = bob.endpoints[0]
            first = await alice.connect(listening)
        with pytest.raises(za.WorkerLost, match="'bob'"):
            await first.call("f")
        assert repr(first) == f"<RemoteWorker 'bob' at {listening}, lost>"
        async with za.Worker("bob", listen=listening) as bob:
            bob.register(lambda: "new", "f")
            second = await alice.connect(listening)
            assert second is not first
            assert second.incarnation != first.incarnation
            assert await second.call("f") == "new"
            with pytest.raises(za.WorkerLost):
                await first.call("f")
            with pytest.raises(za.WorkerLost):
                await first.function("f")()
            with pytest.raises(za.WorkerLost):
                await first.request(Status())
            with pytest.raises(za.WorkerLost):
                await first.propagate_gradients([], context_id=1, message_id=1)


async def test_a_worker_belongs_to_the_loop_that_connected_it(pair: Pair) -> None:
    def elsewhere() -> None:
        with pytest.raises(za.ConfigurationError, match="another event loop"):
            asyncio.run(pair.remote_bob.call("f"))

    await asyncio.to_thread(elsewhere)


async def test_two_of_one_name_are_two_workers(pair: Pair) -> None:
    async with za.Worker("alice") as other:
        await other.connect(pair.bob.endpoints[0])
        reply = await pair.remote_bob.request(Status())
        assert isinstance(reply, StatusResponse)
        assert reply.status["peers"] == ["alice", "alice"]


async def test_a_client_needs_no_worker_of_its_own(pair: Pair) -> None:
    @pair.bob.register
    async def who() -> str:
        peer = za.current_peer()
        assert peer is not None
        return peer.name

    async with za.connect(pair.bob.endpoints[0], name="carol") as bob:
        assert isinstance(bob, za.RemoteWorker)
        assert await bob.call("who") == "carol"
    assert not bob.is_connected
    async with za.connect(pair.bob.endpoints[0]) as bob:
        assert (await bob.call("who")).startswith("client-")
    with pytest.raises(za.WorkerLost):
        async with za.connect(memory_endpoint(), timeout=0.01):
            pass


async def test_the_current_worker_and_peer_are_those_of_the_call(pair: Pair) -> None:
    seen: list[tuple[Any, Any]] = []

    async def handler() -> None:
        await asyncio.sleep(0)
        seen.append((za.current_worker(), za.current_peer()))
        await za.compute(lambda: seen.append((za.current_worker(), za.current_peer())))
        async with asyncio.TaskGroup() as group:
            group.create_task(task())

    async def task() -> None:
        seen.append((za.current_worker(), za.current_peer()))

    def plain() -> None:
        seen.append((za.current_worker(), za.current_peer()))

    pair.bob.register(handler)
    pair.bob.register(plain)
    await asyncio.gather(pair.remote_bob.call("handler"), pair.remote_bob.call("plain"))
    assert len(seen) == 4
    assert all(worker is pair.bob for worker, _ in seen)
    assert {peer.name for _, peer in seen} == {"alice"}
    assert len({id(peer) for _, peer in seen}) == 1
    assert za.current_worker() is None
    assert za.current_peer() is None
