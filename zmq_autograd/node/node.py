"""One running worker inside: listens, dials, keeps the channels, and ties the floors together.

Knows transport, session and dispatcher; of what its user holds it knows only what the functions
passed to it make.  The facade above it is `zmq_autograd.worker`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from zmq_autograd.engine import Contexts, keeps
from zmq_autograd.errors import ConfigurationError, DeadlineExceeded, WorkerLost
from zmq_autograd.node import defaults
from zmq_autograd.node.channel import Channel
from zmq_autograd.node.codecs import Codecs
from zmq_autograd.node.compute import ComputePool
from zmq_autograd.node.dispatcher import Dispatcher
from zmq_autograd.node.forks import Fork, Held
from zmq_autograd.node.registry import Registry
from zmq_autograd.node.rrefs import RRefs
from zmq_autograd.node.torch_profiles import carry
from zmq_autograd.session import HandleRequest, Identity, error_response
from zmq_autograd.transport import Link, Listener, Transports
from zmq_autograd.wire.messages import Message, Modes
from zmq_autograd.wire.values import tensors_in

T = TypeVar("T")

logger = logging.getLogger("zmq_autograd")

CANCEL_SECONDS: Final = 1.0
"""Seconds that handlers have to end once they are cancelled."""

JOIN_POLL_SECONDS: Final = 0.002


@dataclass(slots=True, eq=False)
class Turn:
    """Whose turn it is to dial an endpoint, and how many want to."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Node:
    """The inside of one running worker.  Lives in one event loop, from `start` to `close`."""

    def __init__(
        self,
        me: Identity,
        worker: Any,
        registry: Registry,
        dispatcher: Dispatcher,
        codecs: Codecs,
        *,
        lost_after: float,
        make_peer: Callable[[Channel], Any],
        make_rref: Callable[[Fork], Held],
    ) -> None:
        """Make a node that is not started.

        Args:
            me: who it is.
            worker: the worker as its user holds it.
            registry: what it offers by name.
            dispatcher: its handlers.
            codecs: how objects travel.
            lost_after: seconds of silence after which a peer counts as lost.
            make_peer: makes what users hold of the worker at the other end of a channel.
            make_rref: makes what users hold of an RRef.
        """
        self.me = me
        self.loop = asyncio.get_running_loop()
        self.lost_after = lost_after
        self.pool = ComputePool(me.name)
        self.contexts = Contexts(self)
        self.codecs = codecs
        self.rrefs = RRefs(self, make_rref)
        self.worker = worker
        self.registry = registry
        self._dispatcher = dispatcher
        self._make_peer = make_peer
        self._transport = Transports(me.limits)
        self._listeners: list[Listener] = []
        self._channels: set[Channel] = set()
        # By endpoint: the open channel, and whose turn it is to dial; one at a time, so that
        # callers at once share one channel and each keeps its own patience.
        self._dialled: dict[str, Channel] = {}
        self._dialling: dict[str, Turn] = {}
        self._handling: set[asyncio.Task[None]] = set()
        self._spawned: set[asyncio.Task[Any]] = set()
        self._context = contextvars.copy_context()
        self._leaving = False
        self._closing = 0  # calls of `close` under way
        self.is_closed = False
        defaults.add_to(dispatcher, registry, self)

    @property
    def name(self) -> str:
        """What the worker is called."""
        return self.me.name

    @property
    def tracebacks(self) -> bool:
        """Whether peers are told where in this worker's code something raised."""
        return self._dispatcher.send_tracebacks

    @property
    def endpoints(self) -> list[str]:
        """The endpoints it listens on, with real ports."""
        return [listener.endpoint for listener in self._listeners]

    @property
    def channels(self) -> list[Channel]:
        """The channels that are open."""
        return [channel for channel in self._channels if channel.is_open]

    async def start(self, endpoints: Iterable[str]) -> None:
        """Listen on `endpoints`.

        Raises:
            ConfigurationError: one is malformed or cannot be bound; nothing stays open.
        """
        try:
            for endpoint in endpoints:
                self._listeners.append(await self._transport.listen(endpoint, self._accept))
        except BaseException:
            await self.close(0.0)
            raise

    async def connect(self, endpoint: str, timeout: float | None) -> Channel:
        """Return the open channel to `endpoint`, dialling if there is none.

        Raises:
            ConfigurationError: the endpoint is malformed, or this node has been closed.
            WorkerLost: nobody answered within `timeout` seconds, or the peer left at once.
            DeadlineExceeded: the peer is there but did not finish the handshake in time.
            ProtocolError: the peer speaks another protocol or version.
        """
        if self._leaving:
            raise ConfigurationError(f"worker {self.me.name!r} is not running")
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with self._turn_to_dial(endpoint, timeout):
            channel = self._dialled.get(endpoint)
            if channel is None or not channel.is_open:
                left = None if timeout is None else max(0.0, timeout + started - loop.time())
                channel = self._dialled[endpoint] = await self._dial(endpoint, left)
            channel.users += 1
            return channel

    @asynccontextmanager
    async def _turn_to_dial(self, endpoint: str, timeout: float | None) -> AsyncIterator[None]:
        """Have nobody else dial `endpoint` during the block."""
        turn = self._dialling.setdefault(endpoint, Turn())
        turn.users += 1
        try:
            try:
                async with asyncio.timeout(timeout):
                    await turn.lock.acquire()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"worker at {endpoint} did not answer within {timeout:g} s",
                    workers=(endpoint,),
                ) from None
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            turn.users -= 1
            if not turn.users:
                del self._dialling[endpoint]

    async def close(self, drain: float) -> None:
        """Take no more requests, let those under way finish, and close everything.

        Returns within `drain` seconds and what the transport needs to hand over what was queued;
        whatever runs longer is cancelled.  May be called again, also while it runs; in a handler
        it then returns at once.
        """
        if self._closing and asyncio.current_task() in self._handling:
            return  # whoever closes it already waits for this handler
        self._leaving = True
        self._closing += 1
        try:
            await self._close(drain)
        finally:
            self._closing -= 1

    async def _close(self, drain: float) -> None:
        await self._drain(drain)
        self.contexts.close()
        self.rrefs.close()
        for channel in list(self._channels):
            channel.close(WorkerLost(self.me.name, self.me.incarnation, "it left"))
        for listener in self._listeners:
            listener.close()
        await self._transport.close()
        await self._end_spawned()
        busy = self.pool.close()
        if busy:
            await self._join(busy)
        self.is_closed = True

    # --- channels --------------------------------------------------------------------------------

    def _accept(self, link: Link) -> Channel:
        channel = Channel(self, link.address, dialled=False)
        channel.attach(link)
        self._channels.add(channel)
        return channel

    async def _dial(self, endpoint: str, timeout: float | None) -> Channel:
        loop = asyncio.get_running_loop()
        started = loop.time()
        channel = Channel(self, endpoint, dialled=True)
        self._channels.add(channel)
        try:
            channel.attach(await self._transport.dial(endpoint, channel, timeout))
        except BaseException:
            self._channels.discard(channel)
            raise
        left = None if timeout is None else max(0.0, timeout - (loop.time() - started))
        await channel.shake_hands(left)
        return channel

    def channel_opened(self, channel: Channel) -> None:
        """Make what users hold of the peer."""
        channel.peer = self._make_peer(channel)

    def channel_closed(self, channel: Channel) -> None:
        """Forget the channel."""
        self._channels.discard(channel)
        if self._dialled.get(channel.address) is channel:
            del self._dialled[channel.address]
        if channel.peer is not None:
            self.contexts.peer_lost(channel.peer)
            self.rrefs.peer_lost(channel.peer)

    # --- RRefs -----------------------------------------------------------------------------------

    def take(self, channel: Channel, message: Message) -> Message:
        """Return a message as its handlers or its caller see it, with RRefs for references."""
        return message if channel.peer is None else self.rrefs.take(message, channel.peer)

    def keep(self, value: Any) -> Held:
        """Keep `value` as long as anybody holds what is returned; from any thread.

        In a context, what it was computed from counts as read until that is done with it.
        """
        keeps(tensors_in(value))
        return self.rrefs.keep(value)

    # --- requests --------------------------------------------------------------------------------

    def handle(self, channel: Channel, request: HandleRequest) -> asyncio.Task[None]:
        """Start handling a request of the peer's."""
        run = self._refuse if self._leaving else self._run
        # Not in the context of whoever dialled or sent: its variables are not the handler's.
        task = asyncio.create_task(run(request, channel), context=self._context.copy())
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)
        return task

    async def _run(self, request: HandleRequest, channel: Channel) -> None:
        await self._dispatcher.run(request, channel, self.worker, self)

    async def _refuse(self, request: HandleRequest, channel: Channel) -> None:
        leaving = WorkerLost(self.me.name, self.me.incarnation, "it is leaving")
        channel.reply(request.request_id, error_response(leaving, self.me.name))

    # --- for the engine --------------------------------------------------------------------------

    async def compute(self, function: Callable[[], T]) -> T:
        """Run `function` in a compute thread, under torch's default modes."""
        return await self.pool.run(function, Modes())

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine in a task of its own, in none of the calls being served."""
        context = self._context.copy()
        carry(context)
        task = asyncio.create_task(coroutine, context=context)
        self._spawned.add(task)
        task.add_done_callback(self._spawned_ended)
        return task

    def _spawned_ended(self, task: asyncio.Task[Any]) -> None:
        self._spawned.discard(task)
        if not task.cancelled():
            task.exception()  # heard: whoever needs it awaits the task

    # --- leaving ---------------------------------------------------------------------------------

    async def _drain(self, seconds: float) -> None:
        """Wait for the handlers, then cancel those that are left."""
        # A handler may close its own worker; it must not wait for itself.
        handling = self._handling - {asyncio.current_task()}
        if handling:
            await asyncio.wait(handling, timeout=seconds)
        handling = self._handling - {asyncio.current_task()}
        for task in handling:
            task.cancel()
        if handling:
            _, stuck = await asyncio.wait(handling, timeout=CANCEL_SECONDS)
            for task in stuck:
                logger.warning(
                    "worker %r: a handler ignores its cancellation: %s", self.me.name, task
                )

    async def _end_spawned(self) -> None:
        """Have the engine's tasks end: with the channels closed, nothing holds them up."""
        for task in self._spawned:
            task.cancel()
        if self._spawned:
            await asyncio.wait(self._spawned, timeout=CANCEL_SECONDS)

    async def _join(self, threads: Iterable[Any]) -> None:
        """Wait a moment for idle compute threads to end, so that none outlives its worker."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CANCEL_SECONDS
        for thread in threads:
            while thread.is_alive() and loop.time() < until:  # noqa: ASYNC110  # a thread has no event
                await asyncio.sleep(JOIN_POLL_SECONDS)
