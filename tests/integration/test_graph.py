"""`ctx.graph()`: the graph over all workers, whoever knows whom, and whoever is lost."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint
from zmq_autograd.engine import graph
from zmq_autograd.wire.messages import ForwardRequest, ForwardResponse, Reply

pytestmark = pytest.mark.timeout(30)

CLUSTER = re.compile(r'  subgraph cluster_\d+ \{\n    label="(.*)"\n((?:    .*\n)*)  \}\n')
NODE = re.compile(r'    (\w+) \[label="(Send|Recv)RpcBackward(?:\\n(\d+) lea(?:f|ves))?"(.*)\]')
EDGE = re.compile(r"(?m)^ +(\w+) -> (\w+)")
LABEL = re.compile(r'(?m)^  (\w+) -> (\w+) \[label="(\w{8})\\n([\d,]+) B", tooltip="message (\d+)"')


@dataclass
class Drawing:
    """What Graphviz would show.

    Attributes:
        title: lines.
        workers: for each how many send and how many receive functions it has.
        leaves: of each worker, in order of its send functions; None where it is not told.
        within: edges from a send to a receive function of one worker, by worker.
        between: edges from a receive function of one worker to a send function of another.
        nbytes: that are said at these, in order.
        dashed: how many functions are dashed.
    """

    title: list[str]
    workers: dict[str, tuple[int, int]] = field(default_factory=dict)
    leaves: dict[str, list[int | None]] = field(default_factory=dict)
    within: Counter[str] = field(default_factory=Counter)
    between: Counter[tuple[str, str]] = field(default_factory=Counter)
    nbytes: list[int] = field(default_factory=list)
    dashed: int = 0


def read(dot: str) -> Drawing:
    title = re.search(r'\n  label="(.*)"\n', dot)
    assert title is not None
    drawing = Drawing(title[1].split("\\n"))
    of: dict[str, tuple[str, str]] = {}
    for name, body in CLUSTER.findall(dot):
        nodes = NODE.findall(body)
        kinds = Counter(kind for _, kind, _, _ in nodes)
        drawing.workers[name] = kinds["Send"], kinds["Recv"]
        sends = [leaves for _, kind, leaves, _ in nodes if kind == "Send"]
        drawing.leaves[name] = [int(leaves) if leaves else None for leaves in sends]
        drawing.dashed += sum("style=dashed" in rest for *_, rest in nodes)
        of |= {node: (name, kind) for node, kind, _, _ in nodes}
    for tail, head in EDGE.findall(dot):
        (source, source_kind), (target, target_kind) = of[tail], of[head]
        if source_kind == "Send":
            assert (source, target_kind) == (target, "Recv")
            drawing.within[source] += 1
        else:
            assert target_kind == "Send"
            drawing.between[source, target] += 1
    for _, _, digits, nbytes, message_id in LABEL.findall(dot):
        assert digits == f"{int(message_id):016x}"[-8:]
        drawing.nbytes.append(int(nbytes.replace(",", "")))
    return drawing


@dataclass
class Chain:
    """Workers of which each knows the next alone: alice, bob, carol, dave."""

    workers: list[za.Worker]
    layers: list[nn.Linear]
    remote_bob: za.RemoteWorker
    drawn: list[str] = field(default_factory=list)


@asynccontextmanager
async def chain(*names: str) -> AsyncIterator[Chain]:
    """Run a chain; "layer" runs each worker's layer and goes on to the next, "draw" likewise."""
    async with AsyncExitStack() as stack:
        workers = []
        for name in names:
            worker = za.Worker(name, listen=memory_endpoint(), drain=0)
            workers.append(await stack.enter_async_context(worker))
        remotes = [
            await worker.connect(following.endpoints[0]) for worker, following in pairwise(workers)
        ]
        chain = Chain(workers, [nn.Linear(4, 4) for _ in names[1:]], remotes[0])
        for worker, layer, following in zip(
            workers[1:], chain.layers, [*remotes[1:], None], strict=True
        ):
            offer(chain, worker, layer, following)
        yield chain


def offer(
    chain: Chain, worker: za.Worker, layer: nn.Linear, following: za.RemoteWorker | None
) -> None:
    async def run(x: Tensor) -> Any:
        h = await za.compute(layer, x)
        return h if following is None else await following.call("layer", h)

    async def draw() -> None:
        context = za.current_context()
        assert context is not None
        chain.drawn.append(await context.graph())
        if following is not None:
            await following.call("draw")

    worker.register(run, "layer")
    worker.register(draw, "draw")


def batch() -> Tensor:
    return torch.randn(2, 4, requires_grad=True)


# --- what is drawn -------------------------------------------------------------------------------


async def test_workers_that_one_does_not_know_are_drawn_too() -> None:
    async with chain("alice", "bob", "carol", "dave") as four, four.workers[0].context() as ctx:
        await four.remote_bob.call("layer", batch())
        drawing = read(await ctx.graph())
    assert drawing.title == [f"context {ctx.context_id}"]
    assert drawing.workers == {"alice": (1, 1), "bob": (2, 2), "carol": (2, 2), "dave": (1, 1)}
    assert drawing.leaves == {"alice": [1], "bob": [2, 0], "carol": [2, 0], "dave": [2]}
    assert drawing.within == {"bob": 2, "carol": 2, "dave": 1}
    ways = [("alice", "bob"), ("bob", "carol"), ("carol", "dave")]
    assert drawing.between == Counter([*ways, *((b, a) for a, b in ways)])
    assert drawing.nbytes == [32] * 6
    assert drawing.dashed == 0


async def test_every_worker_draws_the_same() -> None:
    async with chain("alice", "bob", "carol", "dave") as four, four.workers[0].context() as ctx:
        await four.remote_bob.call("layer", batch())
        await four.remote_bob.call("draw")
        assert four.drawn == [await ctx.graph()] * 3


async def test_what_several_messages_share_leads_to_all_of_them() -> None:
    async with chain("alice", "bob") as two, two.workers[0].context() as ctx:
        kept: list[Tensor] = []
        weights = [torch.randn(4, requires_grad=True) for _ in range(3)]

        @two.workers[1].register
        def keep(x: Tensor, y: Tensor) -> None:
            kept.append(x * y * weights[len(kept)])

        @two.workers[1].register
        def total() -> list[Tensor]:
            return [sum(kept[1:], kept[0]), kept[0] + weights[2], weights[0]]

        for _ in range(2):
            await two.remote_bob.call("keep", batch(), batch())
        await two.remote_bob.call("total")
        drawing = read(await ctx.graph())
    assert drawing.workers == {"alice": (2, 1), "bob": (1, 2)}
    assert drawing.leaves == {"alice": [2, 2], "bob": [3]}
    assert drawing.within == {"bob": 2}
    assert sorted(drawing.nbytes) == [64, 64, 80]


async def test_what_cannot_be_differentiated_is_no_function() -> None:
    async with chain("alice", "bob") as two, two.workers[0].context() as ctx:
        two.workers[1].register(lambda x: x.detach(), "detached")
        await two.remote_bob.call("detached", torch.randn(3))
        drawing = read(await ctx.graph())
    assert drawing.workers == {"alice": (0, 0), "bob": (0, 0)}


async def test_what_was_received_in_another_context_is_not_drawn() -> None:
    async with chain("alice", "bob") as two:
        async with two.workers[0].context():
            earlier = await two.remote_bob.call("layer", batch())
        async with two.workers[0].context() as ctx:
            await two.remote_bob.call("layer", earlier)
            drawing = read(await ctx.graph())
    assert drawing.workers == {"alice": (1, 1), "bob": (1, 1)}
    assert drawing.within == {"bob": 1}


async def test_what_a_pass_has_freed_is_dashed_at_once_on_every_worker() -> None:
    async with chain("alice", "bob", "carol") as three, three.workers[0].context() as ctx:
        y = await three.remote_bob.call("layer", batch())
        before = await ctx.graph()
        await ctx.backward(y.sum(), retain_graph=True)
        assert await ctx.graph() == before
        await ctx.backward(y.sum())
        drawing = read(await ctx.graph())
        await three.remote_bob.call("layer", batch())
        further = read(await ctx.graph())
    # Alice sent a leaf and bob passed on what he received: there was nothing to free.
    assert drawing.leaves == {"alice": [1], "bob": [None, 0], "carol": [None]}
    assert drawing.dashed == 2
    assert drawing.within == {"bob": 1}
    assert drawing.between == read(before).between
    assert further.dashed == 2
    assert further.within == {"bob": 3, "carol": 1}


async def test_names_are_escaped() -> None:
    async with chain("alice", 'b"o\\b & {co}') as two, two.workers[0].context() as ctx:
        await two.remote_bob.call("layer", batch())
        assert '    label="b\\"o\\\\b &amp; {co}"\n' in await ctx.graph()


async def test_a_context_that_has_ended_has_no_graph() -> None:
    async with chain("alice", "bob") as two:
        async with two.workers[0].context() as ctx:
            assert read(await ctx.graph()).workers == {"alice": (0, 0)}
        with pytest.raises(za.ContextError, match="it has ended"):
            await ctx.graph()


# --- who is asked --------------------------------------------------------------------------------


async def test_each_worker_answers_once_whoever_called_whom() -> None:
    names = ("alice", "bob", "carol", "dave")
    answers: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        workers = {
            name: await stack.enter_async_context(za.Worker(name, listen=memory_endpoint()))
            for name in names
        }
        remotes = {
            (a, b): await workers[a].connect(workers[b].endpoints[0])
            for a in names
            for b in names
            if a != b
        }

        def count_answers(name: str) -> None:
            worker = workers[name]

            @worker.handler(ForwardRequest)
            async def forward(request: ForwardRequest, peer: za.RemoteWorker) -> Reply:
                reply = await worker.default_handler(request, peer)
                if request.function == graph.GRAPH_FUNCTION and isinstance(reply, ForwardResponse):
                    answers[name] += bool(reply.result)
                return reply

            @worker.register
            async def spread(x: Tensor, depth: int) -> list[Any]:
                return await go(name, x, depth)

        async def go(name: str, x: Tensor, depth: int) -> list[Any]:
            others = [b for a, b in remotes if a == name and depth]
            return [await remotes[name, b].call("spread", x * 2, depth - 1) for b in others] or [x]

        for name in names:
            count_answers(name)
        async with workers["alice"].context() as ctx:
            await go("alice", batch(), 2)
            drawing = read(await ctx.graph())
    assert answers == {"alice": 0, "bob": 1, "carol": 1, "dave": 1}
    calls = 3 + 3 * 3
    assert sum(sends for sends, _ in drawing.workers.values()) == 2 * calls
    assert sum(drawing.between.values()) == 2 * calls


async def test_a_stranger_is_told_nothing() -> None:
    async with chain("alice", "bob") as two, za.Worker("mallory") as mallory:
        bob = await mallory.connect(two.workers[1].endpoints[0])
        async with two.workers[0].context() as ctx:
            await two.remote_bob.call("layer", batch())
            for context_id in (ctx.context_id, ctx.context_id + 1):
                for is_parent in (True, False):
                    args = (context_id, 0, 5.0, is_parent)
                    assert await bob.call(graph.GRAPH_FUNCTION, *args) == []
            assert read(await ctx.graph()).workers.keys() == {"alice", "bob"}


async def test_who_shares_the_context_elsewhere_is_told_nothing() -> None:
    async with chain("alice", "bob", "carol") as three:
        alice, _, carol = three.workers
        alices_carol = await alice.connect(carol.endpoints[0])
        async with alice.context() as ctx:
            await three.remote_bob.call("layer", batch())
            args = (ctx.context_id, 0, 5.0, False)
            assert await alices_carol.call(graph.GRAPH_FUNCTION, *args) == []
            assert len(await three.remote_bob.call(graph.GRAPH_FUNCTION, *args)) == 2


async def test_a_worker_that_was_restarted_tells_of_its_graph() -> None:
    bob = za.Worker("bob", listen=memory_endpoint())
    bob.register(lambda x: x * 2, "double")
    async with bob:
        pass
    async with bob, za.Worker("alice") as alice:
        remote = await alice.connect(bob.endpoints[0])
        async with alice.context() as ctx:
            await remote.call("double", batch())
            assert read(await ctx.graph()).workers == {"alice": (1, 1), "bob": (1, 1)}


# --- who does not answer -------------------------------------------------------------------------


def without(*names: str) -> list[str]:
    return [f"without worker {name}, which is lost or did not answer" for name in names]


async def test_a_lost_worker_is_left_out() -> None:
    async with chain("alice", "bob", "carol") as three, three.workers[0].context() as ctx:
        await three.remote_bob.call("layer", batch())
        await three.workers[2].close()
        drawing = read(await ctx.graph())
        assert drawing.title[1:] == without("carol")
        assert drawing.workers == {"alice": (1, 1), "bob": (2, 2)}
        await three.workers[1].close()
        drawing = read(await ctx.graph())
        assert drawing.title[1:] == without("bob")
        assert drawing.workers == {"alice": (1, 1)}


def silence(worker: za.Worker) -> None:
    @worker.handler(ForwardRequest)
    async def never(request: ForwardRequest, peer: za.RemoteWorker) -> Reply:
        return await asyncio.Future()


async def test_a_worker_that_does_not_answer_is_waited_for_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph.collect, "__defaults__", (None, 0.3))
    async with chain("alice", "bob") as two, two.workers[0].context() as ctx:
        await two.remote_bob.call("layer", batch())
        silence(two.workers[1])
        started = time.monotonic()
        drawing = read(await ctx.graph())
        assert 0.2 < time.monotonic() - started < DEADLINE / 4
    assert drawing.title[1:] == without("bob")
    assert drawing.workers == {"alice": (1, 1)}


async def test_those_before_a_worker_that_does_not_answer_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Carol waits for dave for 0.3 s, bob for carol for 1.1 s, and alice for bob for 4 s.
    monkeypatch.setattr(graph.collect, "__defaults__", (None, 4.0))
    monkeypatch.setattr(graph, "PATIENCE", 0.27)
    async with chain("alice", "bob", "carol", "dave") as four, four.workers[0].context() as ctx:
        await four.remote_bob.call("layer", batch())
        silence(four.workers[3])
        drawing = read(await ctx.graph())
    assert drawing.title[1:] == without("dave")
    assert drawing.workers == {"alice": (1, 1), "bob": (2, 2), "carol": (2, 2)}


PART = ["bob", [[1, 2, False, 3, 4]], [4], [], 0]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "bob",
        {"bob": PART},
        [None],
        [["bob"]],
        [[*PART, 0]],
        [[3, *PART[1:]]],
        [["bob", [3], [4], [], 0]],
        [["bob", [[1, 2, 0, 3]], [4], [], 0]],
        [["bob", [[1, 2, False]], [4], [], 0]],
        [["bob", [[1, 2, False, 3, "x"]], [4], [], 0]],
        [["bob", [], ["x"], [], 0]],
        [["bob", [], [], [3], 0]],
        [["bob", [], [], [], None]],
        [["bob", torch.ones(3), [], [], 0]],
    ],
)
async def test_an_answer_that_is_none_is_left_out(answer: Any) -> None:
    async with chain("alice", "bob") as two, two.workers[0].context() as ctx:
        await two.remote_bob.call("layer", batch())

        @two.workers[1].handler(ForwardRequest)
        async def lie(request: ForwardRequest, peer: za.RemoteWorker) -> Reply:
            return ForwardResponse(answer)

        drawing = read(await ctx.graph())
    assert drawing.title[1:] == without("bob")
    assert drawing.workers == {"alice": (1, 1)}


async def test_what_an_answer_has_no_room_for_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Bob's part of 2 * 5 + 2 numbers has room, carol's does not, dave's of 5 + 1 has.
    monkeypatch.setattr(graph, "MAX_NUMBERS", 18)
    async with chain("alice", "bob", "carol", "dave") as four, four.workers[0].context() as ctx:
        await four.remote_bob.call("layer", batch())
        drawing = read(await ctx.graph())
    assert drawing.title[1:] == ["without 4 functions of worker carol"]
    assert drawing.workers == {"alice": (1, 1), "bob": (2, 2), "carol": (0, 0), "dave": (1, 1)}


async def test_the_largest_answer_has_room_in_a_message() -> None:
    calls = 1500
    async with chain("alice", "bob") as two, two.workers[0].context() as ctx:
        xs = [batch() for _ in range(calls)]
        await asyncio.gather(*(two.remote_bob.call("layer", x) for x in xs))
        drawing = read(await ctx.graph())
        assert drawing.workers == {"alice": (calls, calls), "bob": (calls, calls)}
        numbers = calls * (5 + 1)
        assert graph.MAX_NUMBERS / 2 < numbers <= graph.MAX_NUMBERS
