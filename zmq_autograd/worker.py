"""The worker: what a user starts from.

A facade: it keeps what was registered and configured, and hands everything that runs to a
`zmq_autograd.node.Node`, a new one for each start.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast, overload

from zmq_autograd import ids
from zmq_autograd.engine import Context, current_scope
from zmq_autograd.errors import ConfigurationError
from zmq_autograd.node import (
    Codecs,
    Dispatcher,
    Expose,
    Handler,
    Node,
    Registry,
    current_call,
)
from zmq_autograd.node.signals import stopped_by_signals
from zmq_autograd.node.status import status_of
from zmq_autograd.remote import RemoteWorker
from zmq_autograd.rref import RRef
from zmq_autograd.session import HEARTBEAT_SECONDS, LOST_AFTER_SECONDS, Identity, checked_timeout
from zmq_autograd.transport import is_loopback
from zmq_autograd.wire import DEFAULT_LIMITS, Limits
from zmq_autograd.wire.messages import Reply, Request

T = TypeVar("T")
R = TypeVar("R", bound=Request)

CONNECT_TIMEOUT: Final = 10.0
"""Seconds that `Worker.connect` keeps trying unless told otherwise."""

DRAIN_SECONDS: Final = 10.0
"""Seconds that requests under way have to finish when a worker leaves, unless told otherwise."""


class Worker:
    """One node of the distributed program, living in one event loop.

    ``async with worker:`` makes it visible to others; leaving that block lets the requests under
    way finish and closes everything.  Functions, objects and handlers may be registered before
    and after.
    """

    def __init__(
        self,
        name: str,
        listen: str | Sequence[str] | None = None,
        *,
        insecure: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        heartbeat: float = HEARTBEAT_SECONDS,
        lost_after: float = LOST_AFTER_SECONDS,
        drain: float = DRAIN_SECONDS,
        tracebacks: bool = True,
    ) -> None:
        """Make a worker; nothing is opened yet.

        Args:
            name: what others call it.
            listen: endpoints to listen on, ``tcp://127.0.0.1:0`` say, where port 0 takes a free
                one; None for a worker that only dials out.
            insecure: listen beyond this machine although nothing is encrypted and nobody has to
                prove who he is: says that the network is trusted.
            limits: what it takes in of one message, and how many requests of one peer at once.
            heartbeat: seconds without anything sent after which peers get a sign of life.
            lost_after: seconds of silence after which a peer counts as lost.
            drain: seconds that requests under way have to finish when it leaves.
            tracebacks: tell peers where in this worker's code a handler raised.

        Raises:
            ConfigurationError: an argument cannot work, or would listen beyond this machine.
        """
        self._listen: list[str] = []
        self._name = ""
        self._insecure = insecure
        self._limits = limits
        self._heartbeat = heartbeat
        self._lost_after = lost_after
        self._drain = drain
        self._node: Node | None = None
        # One for each `serve_forever` under way.
        self._stops: set[asyncio.Event] = set()
        if not heartbeat > 0 or not lost_after > heartbeat:
            raise ConfigurationError(
                f"expected 0 < heartbeat < lost_after, got {heartbeat!r} and {lost_after!r}"
            )
        if not drain >= 0:
            raise ConfigurationError(f"drain: expected seconds >= 0, got {drain!r}")
        self._registry = Registry(name)
        self._dispatcher = Dispatcher(name, send_tracebacks=tracebacks)
        self._codecs = Codecs(name)
        self.configure(name=name, listen=listen)

    def __repr__(self) -> str:
        where = ", ".join(self.endpoints) or "not listening"
        return f"<Worker {self.name!r} ({where})>"

    def configure(
        self,
        *,
        name: str | None = None,
        listen: str | Sequence[str] | None = None,
        insecure: bool | None = None,
    ) -> None:
        """Change what was given to the constructor; None leaves it as it is.

        Raises:
            ConfigurationError: the worker is running, or an argument cannot work.
        """
        if self._node is not None:
            raise ConfigurationError(f"worker {self.name!r} is running: configure it before")
        name = self._name if name is None else name
        insecure = self._insecure if insecure is None else insecure
        if listen is None:
            endpoints = self._listen
        else:
            endpoints = [listen] if isinstance(listen, str) else list(listen)
        # All is checked before anything is changed.
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 128:
            raise ConfigurationError(f"name: expected 1 to 128 printable characters, got {name!r}")
        if not insecure:
            self._check_reach(endpoints, name)
        self._name, self._insecure, self._listen = name, insecure, endpoints
        self._registry.worker = self._dispatcher.worker = self._codecs.worker = name

    def _check_reach(self, endpoints: Sequence[str], name: str) -> None:
        for endpoint in endpoints:
            if not is_loopback(endpoint):
                raise ConfigurationError(
                    f"worker {name!r} would listen on {endpoint}, beyond this machine, where "
                    "anybody could call it: pass insecure=True if the network is trusted"
                )

    # --- what it is ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What others call it."""
        return self._name

    @property
    def incarnation(self) -> str:
        """Which life of it this is, 32 hexadecimal digits; empty while it is not running."""
        return self._node.me.incarnation if self._node else ""

    @property
    def endpoints(self) -> list[str]:
        """Where it listens, with real ports; empty while it is not running."""
        return self._node.endpoints if self._node else []

    # --- what it offers --------------------------------------------------------------------------

    @overload
    def register(self, target: T, name: str | None = None, *, expose: Expose = ..., allow: Collection[str] | None = ..., concurrency: int | None = ..., idempotent: bool = ...) -> T: ...  # fmt: skip  # noqa: E501
    @overload
    def register(self, target: None = None, name: str | None = None, *, expose: Expose = ..., allow: Collection[str] | None = ..., concurrency: int | None = ..., idempotent: bool = ...) -> Callable[[T], T]: ...  # fmt: skip  # noqa: E501

    def register(
        self,
        target: Any = None,
        name: str | None = None,
        *,
        expose: Expose = (),
        allow: Collection[str] | None = None,
        concurrency: int | None = None,
        idempotent: bool = False,
    ) -> Any:
        """Offer a function, an object or a class by name; also a decorator, with or without ().

        A plain function runs in a compute thread, a coroutine function on the event loop.

        Args:
            target: what to offer.
            name: what peers call it; by default a function's or class's own name.
            expose: names of methods that peers may call, as ``name.method``; or ``"module"`` for
                all that a remote module needs.
            allow: names of the workers that may call it; None for all that are connected.  A
                worker's name is what it says: without keys this keeps order, not secrets.
            concurrency: how many calls may run at once; by default all of a function's, and one
                of an object's.
            idempotent: running it twice does no harm: it may be retried.  Nothing is retried yet.

        Returns:
            `target`, or a decorator where it is None.

        Raises:
            ConfigurationError: the name is missing or taken, or a method is not there.
        """

        def add(target: Any) -> Any:
            self._registry.register(
                target,
                name,
                expose=expose,
                allow=allow,
                concurrency=concurrency,
                idempotent=idempotent,
            )
            return target

        return add if target is None else add(target)

    def codec(
        self,
        kind: type[T],
        name: str | None = None,
        *,
        pack: Callable[[T], Any],
        unpack: Callable[[Any], T],
    ) -> None:
        """Let objects of a type travel, in arguments and results; the other side does so, too.

        Args:
            kind: the type; its subclasses travel as it, unless they have a codec themselves.
            name: what both sides call it; by default the type's qualified name.
            pack: makes of an object what can travel, or returns the object if it can.  Tensors
                stay on the graph.
            unpack: makes an object of that.

        Raises:
            ConfigurationError: the type or the name has a codec already.
        """
        self._codecs.add(kind, name, pack, unpack)

    def handler(
        self, kind: type[R]
    ) -> Callable[
        [Callable[[R, RemoteWorker], Awaitable[Reply]]],
        Callable[[R, RemoteWorker], Awaitable[Reply]],
    ]:
        """Take over all requests of type `kind`: a decorator for ``async def (request, peer)``.

        It returns the reply, an instance of ``kind.reply``; what it raises goes to the sender.
        `default_handler` passes a request on.

        Raises:
            ConfigurationError: `kind` is no request, or has a handler already.
        """

        def add(
            handler: Callable[[R, RemoteWorker], Awaitable[Reply]],
        ) -> Callable[[R, RemoteWorker], Awaitable[Reply]]:
            self._dispatcher.add(kind, cast(Handler, handler))
            return handler

        return add

    async def default_handler(self, request: Request, peer: RemoteWorker) -> Reply:
        """Handle `request` as if no handler had been set for it."""
        return await self._dispatcher.default(request, peer)

    # --- running ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open everything; ``async with`` does it.

        Raises:
            ConfigurationError: it is running already, or cannot listen.
        """
        if self._node is not None:
            raise ConfigurationError(f"worker {self.name!r} is running already")
        me = Identity(self.name, ids.new_incarnation(), self._limits, heartbeat=self._heartbeat)
        node = Node(
            me,
            self,
            self._registry,
            self._dispatcher,
            self._codecs,
            lost_after=self._lost_after,
            make_peer=lambda channel: RemoteWorker(channel, node),
            make_rref=lambda fork: RRef(fork, node),
        )
        self._node = node
        try:
            await self._node.start(self._listen)
        except BaseException:
            self._node = None
            raise

    async def close(self) -> None:
        """Let requests under way finish, then close everything; idempotent.

        Takes at most the worker's `drain` seconds and a few more, and never raises because of a
        peer.  Cancelling it leaves the rest of the closing to the next call.  In a handler it
        returns at once if the worker is being closed already, since that waits for the handler.
        """
        node = self._node
        if node is None:
            return
        await node.close(self._drain)
        if node.is_closed and self._node is node:
            self._node = None
            for stop in self._stops:
                stop.set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def serve_forever(self) -> None:
        """Wait until SIGINT or SIGTERM comes, or `close` is called.

        Signals are only heard in the main thread.  Cancelling it changes nothing.

        Raises:
            ConfigurationError: the worker is not running.
        """
        self._running_node()
        stop = asyncio.Event()
        self._stops.add(stop)
        try:
            with stopped_by_signals(stop):
                await stop.wait()
        finally:
            self._stops.discard(stop)

    # --- differentiating -------------------------------------------------------------------------

    def context(self) -> Context:
        """Return a new distributed autograd context, to be entered by ``async with``.

        Calls made in it are recorded on both sides; ``await ctx.backward(loss)`` differentiates
        through them.  Leaving it drops it on every worker that it reached, within two seconds, and
        never raises because of one of those.

        Raises:
            ConfigurationError: the worker is not running.
        """
        return self._running_node().contexts.new().user

    def rref(self, value: Any) -> RRef:
        """Return an RRef to a value of this worker's own, to be passed on (torch: ``RRef(value)``).

        Raises:
            ConfigurationError: the worker is not running.
        """
        return cast(RRef, self._running_node().keep(value))

    def status(self) -> dict[str, Any]:
        """Return what the worker is doing, as plain values: what `zmq-autograd status` shows.

        * ``name``, ``incarnation``, ``endpoints``: as the worker's own.
        * ``peers``: the names of the workers that it has sessions with, one for each session.
        * ``sessions``: for each its ``peer`` and that one's ``incarnation``; the ``address`` that
          was dialled or that the peer came from; ``bytes_sent`` and ``bytes_received`` of whole
          messages; how many requests are under way, ``requests_sent`` and ``requests_received``.
        * ``contexts``: for each its ``context_id``; ``parent``, the worker that it came from, None
          on the one that opened it; ``peers``, the workers that calls were exchanged with in it;
          how many ``sends``, ``receives`` and leaf ``gradients`` are recorded; its ``passes``.
        * A pass has its ``pass_id``; its ``state``: ``"running"``, ``"complete here"`` until it is
          complete everywhere, or ``"queued"`` where it was asked for and has to wait for its turn;
          the ``message_ids`` that it waits for gradients of, and the ``workers`` that it waits for,
          its own where it is computing.
        * ``rrefs``: how many values are ``owned`` here, and the ``forks`` of them that there are;
          how many RRefs to values elsewhere are ``held``, and how many that were passed on are
          ``pending`` until their owner counts the new holder.

        It is never more than one message has room for: some 400 sessions and 400 contexts, and 20
        each of a context's peers and passes, and of a pass's messages and workers.
        ``sessions_left_out``, ``contexts_left_out``, ``peers_left_out``, ``passes_left_out``,
        ``message_ids_left_out`` and ``workers_left_out`` say how many more there are.

        Raises:
            ConfigurationError: the worker is not running.
        """
        return status_of(self._running_node())

    def _running_node(self) -> Node:
        if self._node is None:
            raise ConfigurationError(f"worker {self.name!r} is not running")
        return self._node

    # --- reaching others -------------------------------------------------------------------------

    async def connect(
        self, endpoint: str, *, timeout: float | None = CONNECT_TIMEOUT
    ) -> RemoteWorker:
        """Return the worker that listens on `endpoint`; the same one while its session lasts.

        Keeps trying while nobody listens there, so that workers may start in any order.

        Args:
            endpoint: as the other worker's `endpoints` tell it.
            timeout: seconds, None for ever.

        Raises:
            ConfigurationError: the endpoint is malformed, or this worker is not running.
            WorkerLost: nobody answered there in time.
            DeadlineExceeded: somebody did, but did not shake hands in time.
            ProtocolError: it speaks another protocol, or another version of it.
            ConfigurationError: `timeout` is negative or not a number.
        """
        channel = await self._running_node().connect(endpoint, checked_timeout(timeout))
        return cast(RemoteWorker, channel.peer)


@asynccontextmanager
async def connect(
    endpoint: str, *, name: str | None = None, timeout: float | None = CONNECT_TIMEOUT
) -> AsyncIterator[RemoteWorker]:
    """Connect to a worker without one's own to think about: ``async with za.connect(...) as bob``.

    Args:
        endpoint: where it listens.
        name: what it sees as the caller's name; by default one made up.
        timeout: seconds, None for ever.

    Raises:
        ZmqAutogradError: as for `Worker.connect`.
    """
    async with Worker(name or f"client-{secrets.token_hex(4)}") as worker:
        yield await worker.connect(endpoint, timeout=timeout)


def current_context() -> Context | None:
    """Return the context that the running code is in, None outside of one."""
    scope = current_scope.get()
    return None if scope is None else scope.context.user


def current_worker() -> Worker | None:
    """Return the worker whose handler is running, None outside handlers."""
    call = current_call.get()
    return None if call is None else cast(Worker, call.worker)


def current_peer() -> RemoteWorker | None:
    """Return the worker that sent the request being handled, None outside handlers."""
    call = current_call.get()
    return None if call is None else cast(RemoteWorker, call.peer)
