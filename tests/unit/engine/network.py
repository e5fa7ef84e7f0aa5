"""Workers without a wire: contexts joined by links that deliver when a random generator says so.

Messages of one link keep their order, as those of a session do; which link is next, and when a
computation ends, is drawn.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from torch import Tensor

from zmq_autograd.engine import Contexts, LocalContext
from zmq_autograd.engine.places import Place
from zmq_autograd.errors import WorkerLost
from zmq_autograd.session import error_response, exception_from
from zmq_autograd.wire.messages import ErrorResponse, Reply, Request

T = TypeVar("T")

STUCK_SECONDS: Final = 2.0
"""After which a program hangs that waits while nothing is on its way; timers are far shorter."""

Function = Callable[["Visit", list[Tensor]], Coroutine[Any, Any, list[Tensor]]]


class Network:
    """All workers, and what is on its way between them."""

    def __init__(self, names: Sequence[str], rng: random.Random) -> None:
        self.rng = rng
        self.due: list[deque[Callable[[], None]]] = []
        self.tasks: set[asyncio.Task[Any]] = set()
        self._left: int | None = None
        self._then: tuple[int, Callable[[], None]] | None = None
        self.hosts = {name: Host(name, self) for name in names}

    async def run(self, program: Coroutine[Any, Any, T]) -> T:
        """Run `program` to its end, delivering one thing at a time.

        Raises:
            TimeoutError: it waits, and nothing is on its way.
        """
        main = asyncio.create_task(program)
        moved = time.monotonic()
        while not main.done():
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            queues = [queue for queue in self.due if queue]
            if queues:
                self.rng.choice(queues).popleft()()
                self._count()
                moved = time.monotonic()
            elif time.monotonic() - moved > STUCK_SECONDS:
                main.cancel()
                raise TimeoutError("nothing is on its way, and the program waits")
        return await main

    def later(self, deliveries: int, then: Callable[[], None]) -> None:
        """Do `then` once so many things were delivered after `start_counting`."""
        self._then = deliveries, then

    def start_counting(self) -> None:
        if self._then is not None:
            self._left = self._then[0]
            self._count()

    def _count(self) -> None:
        if self._left is not None and self._then is not None:
            self._left -= 1
            if self._left < 0:
                self._left = None
                self._then[1]()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()


class Host:
    """One worker."""

    def __init__(self, name: str, network: Network) -> None:
        self.name = name
        self.tracebacks = True
        self.network = network
        self.is_lost = False
        self.contexts = Contexts(self)
        self.peers: dict[str, Peer] = {}
        self._computing: deque[Callable[[], None]] = deque()
        network.due.append(self._computing)

    async def compute(self, function: Callable[[], T]) -> T:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._computing.append(lambda: finish(done, None))
        await done
        return function()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self.network.spawn(coroutine)

    def to(self, name: str) -> Peer:
        """Return this worker's view of another one."""
        if name not in self.peers:
            self.peers[name] = Peer(self, self.network.hosts[name])
        return self.peers[name]

    def lose(self) -> None:
        """Die: whoever knows it learns it."""
        self.is_lost = True
        for peer in self.peers.values():
            peer.lost()
        for host in self.network.hosts.values():
            if self.name in host.peers:
                host.peers[self.name].lost()


class Peer:
    """A worker as another one sees it."""

    def __init__(self, here: Host, there: Host) -> None:
        self.here, self.there = here, there
        self.incarnation = "1"
        self._queue: deque[Callable[[], None]] = deque()
        here.network.due.append(self._queue)
        self._waiting: set[asyncio.Future[Reply]] = set()
        # What is being handled for that worker.
        self.serving: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        return self.there.name

    @property
    def is_connected(self) -> bool:
        return not self.there.is_lost and not self.here.is_lost

    def lost(self) -> None:
        for reply in self._waiting:
            if not reply.done():
                reply.set_exception(WorkerLost(self.name, self.incarnation, "it died"))
        self._queue.clear()
        cancel(list(self.serving))
        self.here.contexts.peer_lost(self)

    async def request(self, message: Request, *, timeout: float | None) -> Reply:
        if not self.is_connected:
            raise WorkerLost(self.name, self.incarnation, "it died")
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.add(reply)
        handling: list[asyncio.Task[None]] = []
        self._queue.append(lambda: handling.append(self._start(message, reply)))
        try:
            answer = await reply
        except asyncio.CancelledError:
            self._queue.append(lambda: cancel(handling))
            raise
        finally:
            self._waiting.discard(reply)
        if isinstance(answer, ErrorResponse):
            raise exception_from(answer, self.name)
        return answer

    def _start(self, message: Request, reply: asyncio.Future[Reply]) -> asyncio.Task[None]:
        back = self.there.to(self.here.name)
        task = self.there.spawn(self._handle(message, reply))
        back.serving.add(task)
        task.add_done_callback(back.serving.discard)
        return task

    async def _handle(self, message: Request, reply: asyncio.Future[Reply]) -> None:
        back = self.there.to(self.here.name)
        answer: Reply
        try:
            answer = await self.there.contexts.handlers[type(message)](message, back)
        except Exception as error:  # noqa: BLE001  # whatever it is, the sender hears of it
            answer = error_response(error, self.name)
        back._queue.append(lambda: finish(reply, answer))


def finish(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


@dataclass(frozen=True)
class Visit:
    """Where a program runs now: a worker, its view of the context, and the call that it serves."""

    host: Host
    context: LocalContext
    place: Place

    async def call(self, name: str, function: Function, tensors: list[Tensor]) -> list[Tensor]:
        """Call `function` on the worker `name`, as `RemoteWorker.call` does."""
        peer = self.host.to(name)
        back = peer.there.to(self.host.name)
        message_id = self.place.next_id()
        self.context.sending(peer, message_id, tensors)
        is_owner = self.context.parent is None
        there = peer.there.contexts.join(self.context.context_id, back, from_owner=is_owner)
        arrived = [copied(tensor) for tensor in tensors]
        there.received(back, message_id, arrived)
        served = Place(self.context.context_id, message_id)
        results = await function(Visit(peer.there, there, served), arrived)
        there.sending(back, served.reply_id, results)
        returned = [copied(tensor) for tensor in results]
        self.context.received(peer, served.reply_id, returned)
        return returned


def copied(tensor: Tensor) -> Tensor:
    """Return what arrives of `tensor`."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
