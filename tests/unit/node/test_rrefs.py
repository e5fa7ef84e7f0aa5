"""Who counts which RRef, with messages of sessions in any order and workers that are lost.

The tables of several workers over a network of queues.  Whatever order hypothesis finds, nobody
holds what its owner has dropped, and nothing is left once everybody has let go.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from zmq_autograd.errors import WorkerLost, ZmqAutogradError
from zmq_autograd.node.forks import Held
from zmq_autograd.node.rrefs import RRefs
from zmq_autograd.wire.messages import ForwardRequest, ForwardResponse, Reply, Request

NAMES = ("alice", "bob", "carol")
NOTHING = {"owned": 0, "forks": 0, "held": 0, "pending": 0}


@dataclass(eq=False)
class Peer:
    """What one worker has of another: requests to it wait until the network delivers them."""

    network: Network
    source: Worker
    target: Worker
    queue: deque[Callable[[], None]] = field(default_factory=deque)
    under_way: set[asyncio.Future[Reply]] = field(default_factory=set)
    is_connected: bool = True

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def incarnation(self) -> str:
        return self.target.name

    @property
    def peer(self) -> Peer:
        """A channel's peer: a channel and what users hold of it are one here."""
        return self

    async def request(self, message: Request) -> Reply:
        if not self.is_connected:
            raise WorkerLost(self.name)
        sent, _ = self.source.rrefs.give(message, self)
        del message  # what was passed on may be let go of at once
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.under_way.add(reply)
        self.queue.append(lambda: self.target.received(sent, self.target.peers[self.source], reply))
        try:
            answer = self.source.rrefs.take(await reply, self)
        finally:
            self.under_way.discard(reply)
        await self.source.rrefs.until_claimed(answer)
        return answer


def _answer(reply: asyncio.Future[Reply], answer: Reply | str) -> None:
    """Answer with a reply, or with an error of that text."""
    if reply.done():
        return
    if isinstance(answer, str):
        reply.set_exception(WorkerLost("somebody", reason=answer))
    else:
        reply.set_result(answer)


@dataclass(eq=False)
class Worker:
    """A worker as its table of RRefs sees it; `holds` is what its user holds."""

    network: Network
    name: str
    peers: dict[Worker, Peer] = field(default_factory=dict)
    holds: list[Held] = field(default_factory=list)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Nothing here waits for a value to be dropped.
        self.contexts = SimpleNamespace(gate=SimpleNamespace(changed=lambda: None))
        self.rrefs = RRefs(self, Held)  # type: ignore[arg-type]  # as much of a node as it needs

    @property
    def me(self) -> Worker:
        return self

    @property
    def incarnation(self) -> str:
        return self.name

    @property
    def endpoints(self) -> list[str]:
        return [self.name]

    @property
    def channels(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.is_connected]

    async def connect(self, endpoint: str, timeout: float) -> Peer:
        target = self.network.workers.get(endpoint)
        if target is None:
            raise WorkerLost(endpoint)
        if target not in self.peers:
            self.network.connect(self, target)
        return self.peers[target]

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def ask(self, peer: Peer) -> None:
        """Hold what `peer` held last, too."""
        answer = await peer.request(ForwardRequest("give"))
        if isinstance(answer, ForwardResponse):
            self.holds += answer.result

    def received(self, message: Request, peer: Peer, reply: asyncio.Future[Reply]) -> None:
        taken = self.rrefs.take(message, peer)
        self.spawn(self._handle(taken, peer, reply))

    async def _handle(self, message: Request, peer: Peer, reply: asyncio.Future[Reply]) -> None:
        given: list[tuple[int, int]] = []
        answer: Reply | str = Reply()
        try:
            await self.rrefs.until_claimed(message)
            handler = self.rrefs.handlers.get(type(message))
            if handler is not None:
                answer = await handler(message, peer)
            elif isinstance(message, ForwardRequest):
                self.holds += message.args
                answer, given = self.rrefs.give(ForwardResponse(self.holds[-1:]), peer)
        except ZmqAutogradError as error:
            self.network.failures.append(str(error))
            answer = str(error)
        if peer.is_connected:
            peer.queue.append(partial(_answer, reply, answer))
        else:
            self.rrefs.taken_back(given)


class Network:
    """All workers, and what is under way between them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.failures: list[str] = []
        self.workers = {name: Worker(self, name) for name in NAMES}

    def connect(self, one: Worker, other: Worker) -> None:
        one.peers[other] = Peer(self, one, other)
        other.peers[one] = Peer(self, other, one)

    def queues(self) -> list[deque[Callable[[], None]]]:
        every = [peer.queue for worker in self.workers.values() for peer in worker.peers.values()]
        return [queue for queue in every if queue]

    async def deliver(self, at_most: int) -> None:
        """Deliver messages, each session's in order, those of different sessions in any."""
        for _ in range(at_most):
            await self._settle()
            queues = self.queues()
            if not queues:
                return
            self.rng.choice(queues).popleft()()
        await self._settle()

    async def _settle(self) -> None:
        for _ in range(12):
            await asyncio.sleep(0)

    async def lose(self, name: str) -> None:
        """Have a worker vanish, with all that was under way to and from it."""
        gone = self.workers.pop(name)
        for other, peer in gone.peers.items():
            for end in (peer, other.peers[gone]):
                end.is_connected = False
                end.queue.clear()
                for reply in list(end.under_way):
                    if not reply.done():
                        reply.set_exception(WorkerLost(end.name))
            other.rrefs.peer_lost(other.peers[gone])
        gone.holds.clear()
        gone.rrefs.close()
        for task in list(gone.tasks):
            task.cancel()

    async def act(self, action: tuple[str, int, int, int]) -> None:
        kind, who, whom, which = action
        names = sorted(self.workers)
        worker, other = (
            self.workers[names[who % len(names)]],
            self.workers[names[whom % len(names)]],
        )
        if kind == "make":
            worker.holds.append(worker.rrefs.keep(object()))
        elif kind == "drop" and worker.holds:
            del worker.holds[which % len(worker.holds)]
        elif kind == "pass" and worker.holds and worker is not other:
            peer = await worker.connect(other.name, 1.0)
            held = worker.holds[which % len(worker.holds)]
            worker.spawn(peer.request(ForwardRequest("hold", (held,))))
        elif kind == "ask" and worker is not other:
            peer = await worker.connect(other.name, 1.0)
            worker.spawn(worker.ask(peer))
        elif kind == "lose" and len(names) > 2:
            await self.lose(worker.name)


def test_a_holder_keeps_its_own_until_the_one_it_passed_it_to_is_counted() -> None:
    async def play() -> None:
        network = Network(random.Random(0))
        alice, bob, carol = network.workers.values()
        for one, other in ((alice, bob), (bob, carol), (carol, alice)):
            network.connect(one, other)
        alice.holds.append(alice.rrefs.keep(object()))
        await network.act(("pass", 0, 1, 0))
        await network.deliver(100)
        alice.holds.clear()
        await network.act(("pass", 1, 2, 0))
        await network.act(("drop", 1, 0, 0))
        # What bob has to tell alice comes long before what carol has.
        await network.deliver(0)
        while bob.peers[alice].queue:
            bob.peers[alice].queue.popleft()()
            await network.deliver(0)
        assert alice.rrefs.status()["owned"] == 1
        await network.deliver(100)
        assert network.failures == []
        check_held(network)
        assert bob.rrefs.status() == NOTHING
        await check_nothing_left(network)

    asyncio.run(play())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["pass", "drop", "ask", "pass", "drop", "pass", "make"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.integers(0, 2),
    ),
    min_size=4,
    max_size=30,
)
LOSSES = st.tuples(st.just("lose"), st.integers(0, 2), st.just(0), st.just(0))


async def played(network: Network, actions: list[tuple[str, int, int, int]]) -> None:
    for action in actions:
        await network.act(action)
        await network.deliver(network.rng.randrange(3))
    await network.deliver(10_000)


def check_held(network: Network) -> None:
    """Assert that what anybody holds is there."""
    for worker in network.workers.values():
        for held in worker.holds:
            owner = network.workers.get(held.fork.reference.owner)
            if owner is not None:
                value = owner.rrefs.owned(held.fork.rref_id, None if owner is worker else worker)
                assert value is not None


async def check_nothing_left(network: Network) -> None:
    for worker in network.workers.values():
        worker.holds.clear()
    gc.collect()
    await network.deliver(10_000)
    left = {name: worker.rrefs.status() for name, worker in network.workers.items()}
    assert left == dict.fromkeys(network.workers, NOTHING)
    assert not any(worker.tasks for worker in network.workers.values())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.just(("make", 0, 0, 0)), min_size=1, max_size=2),
    ACTIONS,
    st.integers(0, 2**32).map(random.Random),
)
def test_nobody_holds_what_is_gone_and_nothing_is_left(
    first: list[tuple[str, int, int, int]],
    actions: list[tuple[str, int, int, int]],
    rng: random.Random,
) -> None:
    async def play() -> None:
        network = Network(rng)
        await played(network, [*first, *actions])
        assert network.failures == []
        check_held(network)
        await check_nothing_left(network)

    asyncio.run(play())


@settings(max_examples=150, deadline=None)
@given(ACTIONS, LOSSES, ACTIONS, st.integers(0, 2**32).map(random.Random))
def test_a_lost_worker_takes_along_what_it_held_and_no_more(
    before: list[tuple[str, int, int, int]],
    loss: tuple[str, int, int, int],
    after: list[tuple[str, int, int, int]],
    rng: random.Random,
) -> None:
    async def play() -> None:
        network = Network(rng)
        await played(network, [*before, loss, *after])
        check_held(network)
        await check_nothing_left(network)

    asyncio.run(play())
