"""What a worker says of itself, and `zmq-autograd status`, which shows it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected, memory_endpoint
from zmq_autograd.cli import main
from zmq_autograd.node.status import as_text
from zmq_autograd.wire.messages import Reply, Status, StatusResponse

pytestmark = pytest.mark.timeout(30)


async def asked(remote: za.RemoteWorker) -> Any:
    """Return what `remote` says of itself."""
    reply = await remote.request(Status())
    assert isinstance(reply, StatusResponse)
    return reply.status


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


# --- sessions and contexts -----------------------------------------------------------------------


async def test_it_tells_of_its_sessions(pair: Pair) -> None:
    alice, bob = pair.alice, pair.bob
    nbytes = 1_000_000
    bob.register(lambda x: None, "take")
    await pair.remote_bob.call("take", torch.zeros(nbytes, dtype=torch.uint8))
    status = bob.status()
    (session,) = status.pop("sessions")
    assert nbytes < session.pop("bytes_received") < nbytes + 2000
    assert 0 < session.pop("bytes_sent") < 2000
    assert session.pop("address")
    assert session == {
        "peer": "alice",
        "incarnation": alice.incarnation,
        "requests_sent": 0,
        "requests_received": 0,
    }
    assert status == {
        "name": "bob",
        "incarnation": bob.incarnation,
        "endpoints": bob.endpoints,
        "peers": ["alice"],
        "sessions_left_out": 0,
        "contexts": [],
        "contexts_left_out": 0,
        "rrefs": {"owned": 0, "forks": 0, "held": 0, "pending": 0},
    }
    (session,) = alice.status()["sessions"]
    assert (session["peer"], session["address"]) == ("bob", bob.endpoints[0])
    assert nbytes < session["bytes_sent"] < nbytes + 2000


async def test_requests_under_way_are_counted_on_both_sides(pair: Pair) -> None:
    go_on = asyncio.Event()
    pair.bob.register(go_on.wait, "wait")
    waiting = [asyncio.create_task(pair.remote_bob.call("wait")) for _ in range(3)]
    await until(lambda: pair.bob.status()["sessions"][0]["requests_received"] == 3)
    assert pair.alice.status()["sessions"][0]["requests_sent"] == 3
    go_on.set()
    await asyncio.gather(*waiting)
    assert pair.alice.status()["sessions"][0]["requests_sent"] == 0
    await until(lambda: pair.bob.status()["sessions"][0]["requests_received"] == 0)


async def test_it_tells_of_its_contexts(pair: Pair) -> None:
    weight = torch.ones(3, requires_grad=True)
    pair.bob.register(lambda x: x * weight, "scale")
    async with pair.alice.context() as ctx:
        y = await pair.remote_bob.call("scale", torch.ones(3))
        await ctx.backward(y.sum())
        await pair.remote_bob.call("scale", torch.ones(3))
        expected = {
            "context_id": ctx.context_id,
            "peers_left_out": 0,
            "passes": [],
            "passes_left_out": 0,
        }
        assert pair.alice.status()["contexts"] == [
            expected | {"parent": None, "peers": ["bob"], "sends": 0, "receives": 2, "gradients": 0}
        ]
        assert pair.bob.status()["contexts"] == [
            expected
            | {"parent": "alice", "peers": ["alice"], "sends": 2, "receives": 0, "gradients": 1}
        ]
        assert (await asked(pair.remote_bob))["contexts"] == pair.bob.status()["contexts"]
    assert pair.bob.status()["contexts"] == pair.alice.status()["contexts"] == []


def test_a_worker_that_is_not_running_has_no_status() -> None:
    with pytest.raises(za.ConfigurationError, match="'bob' is not running"):
        za.Worker("bob").status()


# --- passes --------------------------------------------------------------------------------------


@dataclass
class Held:
    """Alice and bob in a context, where bob's hooks hold every pass until `go_on` is set."""

    alice: za.Worker
    bob: za.Worker
    context: za.Context
    loss: Tensor
    go_on: threading.Event


@asynccontextmanager
async def held(endpoint: str | None = None) -> AsyncIterator[Held]:
    async with connected(endpoint) as pair, pair.alice.context() as ctx:
        go_on = threading.Event()
        weight = torch.ones(3, requires_grad=True)

        def hold(grad: Tensor) -> None:
            assert go_on.wait(DEADLINE)

        weight.register_hook(hold)  # type: ignore[no-untyped-call]
        pair.bob.register(lambda x: x * weight, "scale")
        loss = (await pair.remote_bob.call("scale", torch.ones(3, requires_grad=True))).sum()
        try:
            yield Held(pair.alice, pair.bob, ctx, loss, go_on)
        finally:
            go_on.set()


def passes_of(worker: za.Worker) -> list[dict[str, Any]]:
    (context,) = worker.status()["contexts"]
    passes: list[dict[str, Any]] = context["passes"]
    return passes


async def test_it_tells_what_a_pass_waits_for() -> None:
    async with held() as world:
        running = asyncio.create_task(world.context.backward(world.loss))
        await until(lambda: any(p["workers"] == ["bob"] for p in passes_of(world.bob)))
        (at_alice,), (at_bob,) = passes_of(world.alice), passes_of(world.bob)
        drawn = await world.context.graph()
        (message_id,) = at_alice["message_ids"]
        assert (
            f'w0_send0 [label="SendRpcBackward\\n1 leaf", tooltip="message {message_id}"' in drawn
        )
        nothing_more = {"message_ids_left_out": 0, "workers_left_out": 0, "state": "running"}
        assert at_alice.pop("pass_id") == at_bob.pop("pass_id")
        assert at_alice == nothing_more | {"message_ids": [message_id], "workers": ["bob"]}
        assert at_bob == nothing_more | {"message_ids": [], "workers": ["bob"]}
        world.go_on.set()
        await running
        assert passes_of(world.alice) == []


async def test_passes_that_wait_for_their_turn_are_told_where_they_were_asked_for() -> None:
    async with held() as world:
        passes = [
            asyncio.create_task(world.context.backward(world.loss, retain_graph=True))
            for _ in range(24)
        ]
        await until(lambda: any(p["workers"] == ["bob"] for p in passes_of(world.bob)))
        assert [p["state"] for p in passes_of(world.alice)] == ["running"] + ["queued"] * 19
        assert world.alice.status()["contexts"][0]["passes_left_out"] == 4
        assert len({p["pass_id"] for p in passes_of(world.alice)}) == 20
        assert len(passes_of(world.bob)) == 1
        passes.pop().cancel()
        await until(lambda: world.alice.status()["contexts"][0]["passes_left_out"] == 3)
        world.go_on.set()
        await asyncio.gather(*passes)
        assert passes_of(world.alice) == []


async def test_a_part_that_is_complete_is_told_until_all_are() -> None:
    """Carol's part is complete long before that of bob, who computes something of his own."""
    async with held() as world, za.Worker("carol", listen=memory_endpoint()) as carol:
        scale = torch.ones(3, requires_grad=True)
        carol.register(lambda x: x * scale, "scale")
        remote_carol = await world.alice.connect(carol.endpoints[0])
        y = await remote_carol.call("scale", torch.ones(3))
        running = asyncio.create_task(world.context.backward([world.loss, y.sum()]))
        await until(lambda: [p["state"] for p in passes_of(carol)] == ["complete here"])
        assert passes_of(carol)[0]["workers"] == []
        assert [p["state"] for p in passes_of(world.alice)] == ["running"]
        world.go_on.set()
        await running


# --- how much ------------------------------------------------------------------------------------

LONG = "\N{GRINNING FACE}" * 128  # 512 bytes


async def in_contexts(worker: za.Worker, remote: za.RemoteWorker, number: int) -> None:
    """Call "f" in so many contexts at once, and leave them when that returns."""

    async def in_context() -> None:
        async with worker.context():
            await remote.call("f")

    await asyncio.gather(*(in_context() for _ in range(number)))


@pytest.mark.parametrize(("name", "at_least"), [("alice", 350), (LONG, 20)])
async def test_of_very_many_contexts_the_first_are_told(name: str, at_least: int) -> None:
    number = 500
    go_on, endpoint = asyncio.Event(), memory_endpoint()
    async with za.Worker("bob", listen=endpoint) as bob, za.Worker(name) as alice:
        bob.register(go_on.wait, "f")
        remote = await alice.connect(endpoint)
        calls = asyncio.create_task(in_contexts(alice, remote, number))
        await until(lambda: bob.status()["sessions"][0]["requests_received"] == number)
        async with za.connect(endpoint) as looking:
            status = await asked(looking)
        listed, left_out = len(status["contexts"]), status["contexts_left_out"]
        assert at_least <= listed < number
        assert listed + left_out == number
        assert f"contexts: {number}\n" in as_text(status)
        assert f"  and {left_out} more\n" in as_text(status)
        go_on.set()
        await calls


async def test_of_very_many_sessions_the_first_are_told() -> None:
    number = 60
    endpoint = memory_endpoint()
    async with za.Worker("bob", listen=endpoint) as bob, AsyncExitStack() as stack:
        remotes = [
            await stack.enter_async_context(za.connect(endpoint, name=LONG)) for _ in range(number)
        ]
        status = await asked(remotes[0])
        assert len(status["sessions"]) == len(status["peers"]) < number
        assert len(status["sessions"]) + status["sessions_left_out"] == number
        assert len(bob.status()["sessions"]) == len(status["sessions"])


async def test_the_largest_status_has_room_in_a_message() -> None:
    go_on, endpoint = asyncio.Event(), memory_endpoint()
    async with za.Worker("bob", listen=endpoint) as bob, AsyncExitStack() as stack:
        bob.register(go_on.wait, "f")
        calls = []
        for _ in range(60):
            worker = await stack.enter_async_context(za.Worker(LONG))
            remote = await worker.connect(endpoint)
            calls.append(asyncio.create_task(in_contexts(worker, remote, 2)))
        await until(lambda: bob.status()["contexts_left_out"] > 0)
        status = await asked(remote)
        assert status["sessions_left_out"] > 0
        go_on.set()
        await asyncio.gather(*calls)


# --- the command ---------------------------------------------------------------------------------


async def command(*arguments: str) -> int:
    """Run ``zmq-autograd status`` beside the running event loop; return its exit code."""
    async with asyncio.timeout(DEADLINE):
        return await asyncio.to_thread(main, ["status", *arguments])


STATUS = {
    "name": "bob",
    "incarnation": "0" * 32,
    "endpoints": ["tcp://127.0.0.1:5555", "ipc:///run/bob"],
    "peers": ["alice"],
    "sessions": [
        {
            "peer": "alice",
            "incarnation": "1" * 32,
            "address": "tcp://127.0.0.1:36618",
            "bytes_sent": 1234567,
            "bytes_received": 0,
            "requests_sent": 1,
            "requests_received": 20,
        },
        {
            "peer": "c\x1b[2Jarol",
            "incarnation": "2" * 32,
            "address": "ipc:///run/carol",
            "bytes_sent": 0,
            "bytes_received": 99,
            "requests_sent": 0,
            "requests_received": 0,
        },
    ],
    "sessions_left_out": 1000,
    "contexts": [
        {
            "context_id": 7,
            "parent": "alice",
            "peers": ["alice", "carol"],
            "peers_left_out": 3,
            "sends": 1,
            "receives": 2,
            "gradients": 3000,
            "passes": [
                {
                    "pass_id": 11,
                    "state": "running",
                    "message_ids": [5, 18446744073709551615],
                    "message_ids_left_out": 1,
                    "workers": ["carol"],
                    "workers_left_out": 0,
                }
            ],
            "passes_left_out": 1,
        }
    ],
    "contexts_left_out": 0,
    "rrefs": {"owned": 1234, "forks": 2000, "held": 3, "pending": 0},
}

TEXT = """\
worker       bob
incarnation  00000000000000000000000000000000
listens on   tcp://127.0.0.1:5555, ipc:///run/bob
rrefs        1,234 owned, 2,000 forks, 3 held, 0 pending

sessions: 1,002
  peer       address                bytes sent  bytes received  requests to it  from it
  alice      tcp://127.0.0.1:36618   1,234,567               0               1       20
  c?[2Jarol  ipc:///run/carol                0              99               0        0
  and 1,000 more

contexts: 1
  context  parent  peers                     sends  receives  gradients
        7  alice   alice, carol, and 3 more      1         2      3,000

passes: 2
  pass  context  state    waits for workers  waits for messages
    11        7  running  carol              5, 18446744073709551615, and 1 more
  and 1 more
"""


def test_the_text_is_as_written_here() -> None:
    assert as_text(STATUS) == TEXT


async def test_the_command_shows_what_the_worker_tells(capsys: pytest.CaptureFixture[str]) -> None:
    async with held("tcp://127.0.0.1:0") as world:
        running = asyncio.create_task(world.context.backward(world.loss))
        await until(lambda: any(p["workers"] == ["bob"] for p in passes_of(world.bob)))
        assert await command(world.bob.endpoints[0]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        assert shown.out.startswith(f"worker       bob\nincarnation  {world.bob.incarnation}\n")
        assert "\nsessions: 2\n" in shown.out
        assert "\ncontexts: 1\n" in shown.out
        assert "\npasses: 1\n" in shown.out
        (told,) = passes_of(world.bob)
        assert f"  {told['pass_id']}  {world.context.context_id}  running  bob   " in shown.out
        world.go_on.set()
        await running


async def test_the_command_prints_the_values_themselves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with za.Worker("bob", listen="tcp://127.0.0.1:0") as bob:
        assert await command(bob.endpoints[0], "--json", "--timeout", "15") == 0
        told = json.loads(capsys.readouterr().out)
        (session,) = told["sessions"]
        assert session["peer"].startswith("client-")
        assert session["requests_received"] == 1
        assert told.keys() == bob.status().keys()


async def test_an_endpoint_that_nobody_listens_on_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        assert await command(endpoint, "--timeout", "0.3") == 1  # it is no worker
        silent = capsys.readouterr()
    assert await command(endpoint, "--timeout", "0.1") == 1
    assert time.monotonic() - started < 4
    refused = capsys.readouterr()
    for shown in (silent, refused):
        assert shown.out == ""
        assert shown.err.startswith("zmq-autograd: ")
        assert endpoint in shown.err
        assert shown.err.count("\n") == 1


async def test_a_worker_that_does_not_tell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    async with za.Worker("bob", listen="tcp://127.0.0.1:0", drain=0) as bob:

        @bob.handler(Status)
        async def never(request: Status, peer: za.RemoteWorker) -> Reply:
            return await asyncio.Future()

        started = time.monotonic()
        assert await command(bob.endpoints[0], "--timeout", "0.3") == 1
        assert time.monotonic() - started < 4
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert "'bob'" in shown.err


@pytest.mark.parametrize("status", [None, [], {"name": "bob"}, STATUS | {"sessions": [{}]}])
async def test_what_another_kind_of_worker_tells_is_not_understood(
    capsys: pytest.CaptureFixture[str], status: Any
) -> None:
    async with za.Worker("bob", listen="tcp://127.0.0.1:0") as bob:

        @bob.handler(Status)
        async def tell(request: Status, peer: za.RemoteWorker) -> Reply:
            return StatusResponse(status)

        assert await command(bob.endpoints[0]) == 1
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert "see --json" in shown.err
        assert await command(bob.endpoints[0], "--json") == 0
        assert json.loads(capsys.readouterr().out) == status


@pytest.mark.parametrize(
    "arguments", [[], ["tcp://127.0.0.1:1", "--timeout", "-1"], ["a", "b"], ["a", "--timeout", "x"]]
)
def test_a_command_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["status", *arguments])
    assert exit_info.value.code == 2
    assert "usage: zmq-autograd" in capsys.readouterr().err
