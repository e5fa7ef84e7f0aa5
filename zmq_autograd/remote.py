"""What a user holds of another worker: `RemoteWorker`, and functions on it.

Knows the node by one narrow protocol, `Requests`; never the worker it belongs to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

from zmq_autograd.autograd.functions import cut_off
from zmq_autograd.engine import Context, Contexts, Scope, current_scope
from zmq_autograd.errors import (
    ContextError,
    SerializationError,
    ZmqAutogradError,
)
from zmq_autograd.node import RESERVED_PREFIX, current_modes
from zmq_autograd.session import Identity, checked_timeout
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardRequest,
    ForwardResponse,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    Reply,
    Request,
)
from zmq_autograd.wire.values import tensors_in

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

    def __init__(self, session: Requests, contexts: Contexts) -> None:
        """Hold the peer of `session`, which is open; `contexts` are this side's."""
        identity = session.identity
        self._session = session
        self._contexts = contexts
        self.name = identity.name if identity else ""
        self.incarnation = identity.incarnation if identity else ""
        self.endpoint = session.address

    def __repr__(self) -> str:
        lost = "" if self.is_connected else ", lost"
        return f"<RemoteWorker {self.name!r} at {self.endpoint}{lost}>"

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
            args: tensors, numbers, str, bytes, None, and lists, tuples and dicts of them.
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
        return await self._call(function, args, kwargs, timeout)

    def function(
        self, function: str, /, *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> Callable[..., Awaitable[Any]]:
        """Return a coroutine function that calls `function` there; every keyword is the callee's.

        Args:
            function: its name, as for `call`.
            timeout: seconds for each call, as for `call`.
        """

        async def remote_function(*args: Any, **kwargs: Any) -> Any:
            return await self._call(function, args, kwargs, timeout)

        remote_function.__name__ = remote_function.__qualname__ = function
        return remote_function

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
        return self._contexts.new()

    async def _call(
        self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None
    ) -> Any:
        scope = None if function.startswith(RESERVED_PREFIX) else current_scope.get()
        if scope is None:
            return await self._call_outside(function, args, kwargs, timeout)
        return await self._call_inside(scope, function, args, kwargs, timeout)

    async def _call_outside(
        self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None
    ) -> Any:
        """Make a call that carries values alone."""
        message = ForwardRequest(function, args, kwargs, modes=current_modes())
        is_cut = torch.is_grad_enabled() and any(
            t.requires_grad for t in tensors_in([args, kwargs])
        )
        reply = cast(ForwardResponse, await self.request(message, timeout=timeout))
        for tensor in tensors_in(reply.result):
            tensor.requires_grad_(False)
        if is_cut:
            cut_off(tensors_in(reply.result), self)
        return reply.result

    async def _call_inside(
        self,
        scope: Scope,
        function: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
    ) -> Any:
        """Make a call that takes the context along, and puts its tensors on the graph."""
        context = scope.context
        if context.table is not self._contexts:
            raise ContextError(
                f"{context} is not of the worker that is connected to {self.name!r}: a context "
                "belongs to one worker",
                context_id=context.context_id,
                worker=self.name,
            )
        message_id = scope.place.next_id()
        context.sending(self, message_id, tensors_in([args, kwargs]))
        committed = context.passes.committed
        message = ForwardRequest(
            function,
            args,
            kwargs,
            AutogradMetadata(context.context_id, message_id),
            current_modes(),
            committed=committed,
            from_owner=context.parent is None,
        )
        try:
            reply = cast(ForwardResponse, await self.request(message, timeout=timeout))
        except SerializationError:  # nothing has left
            context.not_sent(message_id)
            raise
        except ZmqAutogradError:  # the function may have run a pass before it failed
            await context.passes.until_committed()
            raise
        context.passes.told_committed(self, committed)
        if reply.metadata is not None:
            context.received(self, reply.metadata.message_id, tensors_in(reply.result))
        context.passes.learn_committed(reply.committed)
        await context.passes.until_committed()
        return reply.result
