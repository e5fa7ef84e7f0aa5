"""A worker that dies, freezes or is cut off: everybody who waits for it learns so, by its name.

Seconds are those of the defaults unless a test says otherwise; each test prints what it measured.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import zmq

import zmq_autograd as za
from tests.faults import zmtp_peer
from tests.faults.proxy import Proxy, proxied
from tests.faults.victims import ROOT, Callers, Victim, called_back, outcome, running_victim
from tests.faults.vitals import say
from tests.faults.wire_peer import Answer, impostor, silent_socket
from zmq_autograd import ids
from zmq_autograd.wire import Envelope, encode
from zmq_autograd.wire.limits import MIB
from zmq_autograd.wire.messages import (
    ErrorResponse,
    ForwardRequest,
    Heartbeat,
    Hello,
    PropagateGradientsResponse,
    Welcome,
)

DEAD_SECONDS: Final = 3.0
"""Within which a killed or cut off worker is noticed, at defaults."""

FROZEN_SECONDS: Final = 10.0
"""Within which a frozen one is."""

CALLERS: Final = 5


@dataclass
class Ring:
    """Alice has dialled bob and bob has dialled carol; five calls wait on bob from each of them.

    So bob is lost by the side that dialled and by the side that was dialled, at the same time.
    """

    bob: Victim
    callers: tuple[Callers, Callers]
    # Between bob and each of them, where the test is to strike there.
    lines: list[Proxy]

    async def losses(self, struck: float) -> list[float]:
        """Return the seconds after which each of the ten callers learned of it."""
        here = await asyncio.gather(*(callers.losses(struck) for callers in self.callers))
        for callers in self.callers:
            assert callers.remote.name == self.bob.name
            assert callers.remote.incarnation == self.bob.incarnation
        return [seconds for each in here for seconds in each]


@asynccontextmanager
async def waiting_ring(*, over_proxies: bool) -> AsyncIterator[Ring]:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        lines: list[Proxy] = []

        async def way_to(endpoint: str) -> str:
            if not over_proxies:
                return endpoint
            lines.append(await enter(proxied(endpoint)))
            return lines[-1].endpoint

        carol = za.Worker("carol", "tcp://127.0.0.1:0")
        caller = await enter(called_back(carol))
        bob = await enter(running_victim("bob", "--dial", await way_to(carol.endpoints[0])))
        alice = await enter(za.Worker("alice"))
        near, far = await alice.connect(await way_to(bob.endpoint)), await caller
        callers = Callers(near, CALLERS), Callers(far, CALLERS)
        await near.call("waiting", 2 * CALLERS)
        yield Ring(bob, callers, lines)


async def kill(ring: Ring) -> None:
    ring.bob.kill()


async def freeze(ring: Ring) -> None:
    ring.bob.freeze()


async def reset_lines(ring: Ring) -> None:
    for line in ring.lines:
        await line.reset()


async def end_lines(ring: Ring) -> None:
    for line in ring.lines:
        await line.finish()


async def hold_lines(ring: Ring) -> None:
    for line in ring.lines:
        line.hold()


@pytest.mark.parametrize(
    ("strike", "bound"),
    [
        pytest.param(kill, DEAD_SECONDS, id="killed"),
        pytest.param(reset_lines, DEAD_SECONDS, id="connection reset"),
        pytest.param(end_lines, DEAD_SECONDS, id="connection ended"),
        pytest.param(freeze, FROZEN_SECONDS, id="stopped"),
        # What holds the line still acknowledges: from afar that is a frozen process.
        pytest.param(hold_lines, FROZEN_SECONDS, id="line held"),
    ],
)
async def test_five_callers_on_each_side_learn_that_a_worker_is_lost(
    strike: Callable[[Ring], Awaitable[None]], bound: float
) -> None:
    over_proxies = strike not in (kill, freeze)
    async with waiting_ring(over_proxies=over_proxies) as ring:
        struck = time.monotonic()
        await strike(ring)
        losses = await ring.losses(struck)
        say(f"callers learned after {min(losses):.3f} to {max(losses):.3f} s, bound {bound:g} s")
        assert max(losses) < bound
        for callers in ring.callers:
            with pytest.raises(za.WorkerLost, match=r"worker 'bob' \(incarnation"):
                await callers.remote.call("note")


WHAT_A_WIRE_NEEDS: Final = "ip link add type veth && unshare --net nsenter --version"

# As root, and as anybody where users may make namespaces of their own.
WAYS_INTO_A_NAMESPACE: Final = (
    ("unshare", "--net"),
    ("unshare", "--user", "--map-root-user", "--net"),
)


def way_into_a_namespace() -> tuple[str, ...] | None:
    """Return the command that runs another in a network of its own, None if nothing may."""
    if shutil.which("unshare") is None:
        return None
    for way_in in WAYS_INTO_A_NAMESPACE:
        trial = [*way_in, "sh", "-c", WHAT_A_WIRE_NEEDS]
        if subprocess.run(trial, capture_output=True, timeout=10).returncode == 0:
            return way_in
    return None


def test_five_callers_on_each_side_learn_that_a_wire_was_pulled_out() -> None:
    """Nothing comes any more, not even an end of the connection."""
    way_in = way_into_a_namespace()
    if way_in is None:
        pytest.skip("network namespaces are not permitted here; proxies stand in for wires")
    run = subprocess.run(
        [*way_in, sys.executable, "-m", "tests.faults.severed_wire"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    losses = json.loads(run.stdout.splitlines()[-1])
    assert len(losses) == 2 * CALLERS
    say(f"callers learned after {min(losses):.3f} to {max(losses):.3f} s, by {' '.join(way_in)}")
    assert max(losses) < DEAD_SECONDS


async def test_a_lost_worker_is_named_across_another_and_what_it_asked_for_is_cancelled() -> None:
    """Alice asks bob, who asks carol, who asks dave; then carol is killed."""
    cancelled = asyncio.Event()
    asked = asyncio.Event()

    async def wait() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        dave = await enter(za.Worker("dave", "tcp://127.0.0.1:0"))
        dave.register(wait)
        carol = await enter(running_victim("carol", "--next", dave.endpoints[0]))
        bob = await enter(running_victim("bob", "--next", carol.endpoint))
        alice = await enter(za.Worker("alice"))
        remote = await alice.connect(bob.endpoint)
        call = asyncio.create_task(remote.call("ask_next", "ask_next", "wait"))
        await asked.wait()
        struck = time.monotonic()
        carol.kill()
        with pytest.raises(za.WorkerLost, match="by way of bob") as caught:
            await call
        learned = time.monotonic() - struck
        await cancelled.wait()
        stopped = time.monotonic() - struck
        assert (caught.value.name, caught.value.incarnation) == ("carol", carol.incarnation)
        assert caught.value.path == ("bob",)
        assert remote.is_connected
        say(f"alice learned after {learned:.3f} s, dave's handler ended after {stopped:.3f} s")
        assert max(learned, stopped) < DEAD_SECONDS


async def test_a_slow_line_is_not_taken_for_a_lost_worker() -> None:
    """A request and a reply take four times as long as silence may last, each on its own line."""
    impatient: dict[str, Any] = {"heartbeat": 0.2, "lost_after": 1.0}
    rate = 2 * MIB
    payload = torch.arange(8 * MIB, dtype=torch.uint8)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        bob = za.Worker("bob", "tcp://127.0.0.1:0", **impatient)

        @bob.register
        async def give() -> torch.Tensor:
            return payload

        @bob.register
        async def take(x: torch.Tensor) -> bool:
            return torch.equal(x, payload)

        await enter(bob)
        alice = await enter(za.Worker("alice", **impatient))
        lines = [await enter(proxied(bob.endpoints[0], bytes_per_second=rate)) for _ in range(2)]
        giver, taker = [await alice.connect(line.endpoint) for line in lines]
        started = time.monotonic()
        given, was_taken = await asyncio.gather(giver.call("give"), taker.call("take", payload))
        say(f"{len(payload) / MIB:g} MiB each way took {time.monotonic() - started:.2f} s")
        assert time.monotonic() - started > 3 * impatient["lost_after"]
        assert was_taken
        assert torch.equal(given, payload)


async def test_a_worker_whose_loop_is_held_up_is_not_lost() -> None:
    """Two seconds at defaults, with calls waiting for it and more coming."""
    async with running_victim("bob") as bob, za.Worker("alice") as alice:
        remote = await alice.connect(bob.endpoint)
        waiting = asyncio.create_task(remote.call("wait"))
        await remote.call("waiting", 1)
        blocked = asyncio.create_task(remote.call("block", 2.0))
        notes = [asyncio.create_task(remote.call("note")) for _ in range(200)]
        await blocked
        assert sorted(await asyncio.gather(*notes)) == list(range(1, 201))
        assert remote.is_connected
        assert not waiting.done()
        waiting.cancel()
        await remote.call("cancelled", 1)


async def test_a_worker_that_takes_nothing_in_for_a_while_is_not_lost() -> None:
    """To one that has no room left, acknowledgements are probes of the kernel's, ever rarer."""
    async with running_victim("bob") as bob, za.Worker("alice", heartbeat=0.2) as alice:
        remote = await alice.connect(bob.endpoint)
        blocked = asyncio.create_task(remote.call("block", 3.0))
        x = torch.zeros(MIB, dtype=torch.uint8)
        doubling = [asyncio.create_task(remote.call("double", x)) for _ in range(200)]
        await blocked
        await asyncio.gather(*doubling)
        assert remote.is_connected


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
async def test_who_was_held_up_itself_declares_nobody_lost(scheme: str, tmp_path: Path) -> None:
    listen = {"tcp": "tcp://127.0.0.1:0", "ipc": f"ipc://{tmp_path}/bob"}[scheme]
    async with (
        running_victim("bob", listen=listen) as bob,
        za.Worker("alice", heartbeat=0.2, lost_after=1.0) as alice,
    ):
        remote = await alice.connect(bob.endpoint)
        waiting = asyncio.create_task(remote.call("wait"))
        await remote.call("waiting", 1)
        time.sleep(2.0)  # noqa: ASYNC251  # the loop stands still: this is what it is about
        assert await remote.call("noted") == 0
        # Past the next heartbeats, and so past the checks that go with them.
        await remote.call("finish", 1.0)
        assert remote.is_connected
        assert not waiting.done()
        waiting.cancel()


async def test_a_worker_restarted_at_the_same_place_gets_nothing_meant_for_the_old_one() -> None:
    async with za.Worker("alice") as alice:
        async with running_victim("bob") as old:
            remote = await alice.connect(old.endpoint)
            calls = [asyncio.create_task(outcome(remote, "note")) for _ in range(500)]
            await remote.call("note")
            old.freeze()  # what is sent from here on waits in queues
            calls += [asyncio.create_task(outcome(remote, "note")) for _ in range(500)]
            held = asyncio.create_task(outcome(remote, "zeros", 1))
            old.kill()
            ended = await asyncio.gather(*calls, held)
        assert isinstance(ended[-1].error, za.WorkerLost)
        async with running_victim("bob", listen=old.endpoint) as new:
            assert new.endpoint == old.endpoint
            assert not remote.is_connected
            with pytest.raises(za.WorkerLost) as caught:
                await remote.call("note")
            assert caught.value.incarnation == old.incarnation
            again = await alice.connect(new.endpoint)
            assert again is not remote
            assert again.incarnation == new.incarnation != old.incarnation
            assert await again.call("noted") == 0
            assert not remote.is_connected
    lost = sum(isinstance(each.error, za.WorkerLost) for each in ended)
    say(f"{lost} of {len(ended)} calls on the old one were lost with it, none reached the new one")


@pytest.fixture
async def alice() -> AsyncIterator[za.Worker]:
    async with za.Worker("alice") as worker:
        yield worker


PATIENCE: Final = 0.5


async def refusal(alice: za.Worker, endpoint: str) -> za.ZmqAutogradError:
    """Connect in vain, and return what that raised, in time and in words."""
    started = time.monotonic()
    with pytest.raises(za.ZmqAutogradError) as caught:
        await alice.connect(endpoint, timeout=PATIENCE)
    seconds = time.monotonic() - started
    say(f"{type(caught.value).__name__} after {seconds:.2f} s: {caught.value}")
    assert seconds < PATIENCE + 1
    assert endpoint in str(caught.value) or "'bob'" in str(caught.value)
    return caught.value


async def test_connecting_to_a_closed_port_says_so(alice: za.Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    error = await refusal(alice, endpoint)
    assert isinstance(error, za.WorkerLost)
    assert "refused" in str(error)


ANSWERS_OF_STRANGERS: Final = {
    "nothing": b"",
    "http": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.6\r\n",
    "zeros": bytes(100),
    "random": random.Random(1).randbytes(10_000),
    "half a greeting": zmtp_peer.GREETING[:20],
    "a greeting": zmtp_peer.GREETING,
}


@pytest.mark.parametrize("answer", ANSWERS_OF_STRANGERS)
async def test_connecting_to_what_is_no_worker_ends_in_time(alice: za.Worker, answer: str) -> None:
    with zmtp_peer.hostile_server(ANSWERS_OF_STRANGERS[answer]) as server:
        error = await refusal(alice, server.endpoint)
    assert isinstance(error, za.WorkerLost | za.DeadlineExceeded)


@pytest.mark.parametrize("kind", [zmq.PUB, zmq.REP, zmq.DEALER, zmq.PULL, zmq.ROUTER])
async def test_connecting_to_another_kind_of_socket_ends_in_time(
    alice: za.Worker, kind: zmq.SocketType
) -> None:
    with silent_socket(kind) as endpoint:
        error = await refusal(alice, endpoint)
    assert isinstance(error, za.WorkerLost | za.DeadlineExceeded)


def wrong_welcome(**wrong: Any) -> Welcome:
    return dataclasses.replace(Welcome("bob", ids.new_incarnation()), **wrong)


WRONG_WELCOMES: Final[dict[str, Answer]] = {
    "an error": lambda its: encode(ErrorResponse("protocol_error", "go away", "bob"), its),
    "another error": lambda its: encode(ErrorResponse("remote_error", "go away", "bob"), its),
    "another version": lambda its: encode(wrong_welcome(version=99), Envelope(7, its.request_id)),
    "no session": lambda its: encode(wrong_welcome(), Envelope(0, its.request_id)),
    "to another request": lambda its: encode(wrong_welcome(), Envelope(7, its.request_id + 1)),
    "a request": lambda its: encode(ForwardRequest("double", [1]), Envelope(7, 1)),
    "a hello": lambda its: encode(Hello("bob", ids.new_incarnation()), its),
    "a heartbeat": lambda its: encode(Heartbeat()),
    "a reply": lambda its: encode(PropagateGradientsResponse(), Envelope(7, its.request_id)),
    "garbage": lambda its: [b"\xc1 no msgpack"],
    "an empty frame": lambda its: [b""],
    "a frame too many": lambda its: [
        *encode(wrong_welcome(), Envelope(7, its.request_id)),
        b"extra",
    ],
    "a huge header": lambda its: [bytes(2 * MIB)],
}


@pytest.mark.parametrize("answer", WRONG_WELCOMES)
async def test_a_wrong_answer_to_hello_is_refused_at_once(alice: za.Worker, answer: str) -> None:
    with impostor(WRONG_WELCOMES[answer]) as endpoint:
        error = await refusal(alice, endpoint)
    assert not isinstance(error, za.DeadlineExceeded)
