"""What a user holds of another worker: `RemoteWorker`, and functions on it.

Knows the node by two narrow protocols, `Requests` and `Home`; never the worker it belongs to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from torch import Tensor

from zmq_autograd.engine import Context
from zmq_autograd.errors import SerializationError
from zmq_autograd.module import RemoteModule
from zmq_autograd.node import Caller, Home
from zmq_autograd.session import Identity, checked_timeout
from zmq_autograd.wire import DEFAULT_LIMITS, Limits
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    Reply,
    Request,
)

if TYPE_CHECKING:
    from zmq_autograd.rref import RRef

DEFAULT_TIMEOUT: Final = 60.0
"""Seconds that a call waits for its reply by default, as in torch.distributed.rpc."""


class Requests(Protocol):
    """What a remote worker needs of the node: one open session."""

    @property
    def address(self) -> str:
        """Where the peer is."""

    @property
    def identity(self) -> Identity | None:
        """Who the peer is."""

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""

    async def request(self, message: Request, timeout: float | None) -> Reply:
        """Send a request and return its reply."""


class RemoteWorker:
    """Another worker, as long as the session with it lasts.

    Got from `Worker.connect`, or passed to a handler.  Once the worker is lost every use raises
    WorkerLost; connecting again gives a new one.

    Attributes:
        name: the name it told.
        incarnation: which life of it, 32 hexadecimal digits.
        endpoint: the endpoint dialled, or the address it came from.
    """

    def __init__(self, session: Requests, home: Home) -> None:
        """Hold the peer of `session`, which is open, on the worker `home`."""
        identity = session.identity
        self._session = session
        self._home = home
        self._caller = Caller(self, home)
        self.name = identity.name if identity else ""
        self.incarnation = identity.incarnation if identity else ""
        self.endpoint = session.address

    def __repr__(self) -> str:
        lost = "" if self.is_connected else ", lost"
        return f"<RemoteWorker {self.name!r} at {self.endpoint}{lost}>"

    @property
    def limits(self) -> Limits:
        """What it takes in of one message."""
        identity = self._session.identity
        return identity.limits if identity else DEFAULT_LIMITS

    @property
    def is_connected(self) -> bool:
        """Whether the session lasts."""
        return self._session.is_open

    async def call(
        self, function: str, /, *args: Any, timeout: float | None = DEFAULT_TIMEOUT, **kwargs: Any
    ) -> Any:
        """Call a function that the worker has registered and return its result.

        Args:
            function: its name; ``name.method`` for a method of a registered object.
            args: tensors, numbers, str, bytes, None, RRefs, what has a codec (`Worker.codec`), and
                lists, tuples and dicts of them.
            timeout: seconds to wait for the result, None for ever; inside a handler never more
                than the call that it serves has left.
            kwargs: like `args`.

        Raises:
            SerializationError: an argument cannot travel; nothing was sent.
            ResourceExhausted: the arguments are larger than the worker takes in.
            NotRegistered: it offers nothing of that name to this worker.
            RemoteError: the function raised.
            DeadlineExceeded: no result in time; the other side is told to stop.
            WorkerLost: the worker, or one behind it, was lost meanwhile.
            ConfigurationError: `timeout` is negative or not a number.

        The arguments have been read when this first suspends.  Cancelling it cancels a coroutine
        on the other side; a function in a thread finishes there, and its result is dropped.
        """
        return await self._caller.call(function, args, kwargs, timeout)

    def function(
        self, function: str, /, *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> Callable[..., Awaitable[Any]]:
        """Return a coroutine function that calls `function` there; every keyword is the callee's.

        Args:
            function: its name, as for `call`.
            timeout: seconds for each call, as for `call`.
        """
        return named(function, partial(self._caller.call, function, timeout=timeout))

    async def remote(
        self, function: str, /, *args: Any, timeout: float | None = DEFAULT_TIMEOUT, **kwargs: Any
    ) -> RRef:
        """Call a function as `call` does, and keep its result there (torch: ``rpc.remote``).

        Returns:
            An RRef to the result, which is there by then.

        Raises:
            ZmqAutogradError: as for `call`; nothing is kept.

        Cancelling it keeps nothing either.
        """
        return cast("RRef", await self._caller.call(function, args, kwargs, timeout, keep=True))

    async def module(
        self, name: str, /, *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> RemoteModule:
        """Return a module that the worker has registered with ``expose="module"``.

        Args:
            name: its name.
            timeout: seconds that this, and each call of the module's, waits; None for ever.

        Raises:
            NotRegistered: it offers no module of that name to this worker.
            ZmqAutogradError: as for `call`.
        """
        return await RemoteModule.registered(self, name, timeout)

    async def propagate_gradients(
        self,
        grads: Sequence[Tensor | None],
        *,
        context_id: int,
        message_id: int,
        retain_graph: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> PropagateGradientsResponse:
        """Send gradients back over a forward message, and wait until they are taken over.

        Args:
            grads: one per tensor of that message, any shape and dtype; None where undefined.
            context_id: the context.
            message_id: the forward message.
            retain_graph: the receiver keeps its graph for another pass.
            timeout: seconds to wait, None for ever.

        Raises:
            ZmqAutogradError: as for `call`.
        """
        # Not `list(grads)`: of a single tensor that would make a gradient of each of its rows.
        message = PropagateGradientsRequest(
            AutogradMetadata(context_id, message_id), grads, retain_graph
        )
        return cast(PropagateGradientsResponse, await self.request(message, timeout=timeout))

    async def request(self, message: Request, *, timeout: float | None = DEFAULT_TIMEOUT) -> Reply:
        """Send any request and return its reply, which is of the type ``message.reply``.

        Args:
            message: one of `zmq_autograd.messages`.
            timeout: seconds to wait, None for ever.

        Raises:
            ConfigurationError: `timeout` is negative or not a number.
            SerializationError: `message` is no request; nothing was sent.
            ZmqAutogradError: as for `call`.
        """
        if not isinstance(message, Request):
            raise SerializationError(
                f"expected a request of zmq_autograd.messages, got {type(message).__name__}"
            )
        return await self._session.request(message, checked_timeout(timeout))

    def context(self) -> Context:
        """Return a new context of this side's worker; see `Worker.context`."""
        return self._home.contexts.new().user


def named(
    name: str, call: Callable[[tuple[Any, ...], dict[str, Any]], Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    """Return a coroutine function of that name, which has `call` take all its arguments."""

    async def remote_function(*args: Any, **kwargs: Any) -> Any:
        return await call(args, kwargs)

    remote_function.__name__ = remote_function.__qualname__ = name
    return remote_function


def caller_of(remote: RemoteWorker) -> Caller:
    """Return what makes calls for `remote`."""
    return remote._caller
