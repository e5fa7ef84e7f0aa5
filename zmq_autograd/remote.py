"""What a user holds of another worker: `RemoteWorker`, and functions on it.

Knows the node by two narrow protocols, `Requests` and `Home`; never the worker it belongs to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import torch
from torch import Tensor

from zmq_autograd.autograd.functions import cut_off
from zmq_autograd.engine import Context, Contexts, LocalContext, Scope, current_scope
from zmq_autograd.errors import (
    ConfigurationError,
    ContextError,
    ResourceExhausted,
    SerializationError,
    ZmqAutogradError,
)
from zmq_autograd.module import RemoteModule
from zmq_autograd.node import RESERVED_PREFIX, Codecs, current_modes
from zmq_autograd.node.torch_profiles import recorder_here
from zmq_autograd.session import Identity, checked_timeout
from zmq_autograd.wire import DEFAULT_LIMITS, Limits
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardRequest,
    ForwardResponse,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    Reply,
    Request,
    RRefFetchRequest,
    RRefFetchResponse,
)
from zmq_autograd.wire.values import tensors_in

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


class Home(Protocol):
    """What a remote worker needs of the worker that holds it."""

    contexts: Contexts
    codecs: Codecs

    @property
    def name(self) -> str:
        """What it is called."""


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
        return cast("RRef", await self._call(function, args, kwargs, timeout, keep=True))

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

    # --- what RRefs do here ----------------------------------------------------------------------

    async def call_method(
        self,
        rref_id: int,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        *,
        keep: bool = False,
    ) -> Any:
        """Call a method of a value that lives there; `RRef.call` and `RRef.remote` do."""
        return await self._call(method, args, kwargs, timeout, target_id=rref_id, keep=keep)

    async def fetch(self, rref_id: int, timeout: float | None) -> Any:
        """Return a value that lives there; `RRef.to_here` does."""
        scope = current_scope.get()
        if scope is None:
            reply = await self.request(RRefFetchRequest(rref_id), timeout=timeout)
            value = cast(RRefFetchResponse, reply).value
            for tensor in tensors_in(value):
                tensor.requires_grad_(False)
            return self._home.codecs.unpack(value)
        context = scope.context
        self.check_context(context)
        message_id = scope.place.next_id()
        context.sending(self, message_id, ())
        committed = context.passes.committed
        request = RRefFetchRequest(
            rref_id,
            AutogradMetadata(context.context_id, message_id),
            committed,
            from_owner=context.parent is None,
        )
        reply = await self._exchange(context, request, timeout)
        return self._home.codecs.unpack(cast(RRefFetchResponse, reply).value)

    # --- calling ---------------------------------------------------------------------------------

    async def _call(
        self,
        function: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        *,
        target_id: int = 0,
        keep: bool = False,
    ) -> Any:
        packed_args, packed_kwargs = self._home.codecs.pack([args, kwargs])
        is_internal = function.startswith(RESERVED_PREFIX) and not target_id
        message = ForwardRequest(
            function,
            packed_args,
            packed_kwargs,
            modes=current_modes(),
            target_id=target_id,
            keep=keep,
        )
        scope = None if is_internal else current_scope.get()
        if scope is None:
            result = await self._call_outside(message, timeout)
        else:
            result = await self._call_inside(scope, message, timeout)
        return self._home.codecs.unpack(result)

    async def _call_outside(self, message: ForwardRequest, timeout: float | None) -> Any:
        """Make a call that carries values alone."""
        is_cut = torch.is_grad_enabled() and any(
            t.requires_grad for t in tensors_in([message.args, message.kwargs])
        )
        reply = cast(ForwardResponse, await self._profiled(message, timeout))
        for tensor in tensors_in(reply.result):
            tensor.requires_grad_(False)
        if is_cut:
            cut_off(tensors_in(reply.result), self)
        return reply.result

    async def _call_inside(
        self, scope: Scope, message: ForwardRequest, timeout: float | None
    ) -> Any:
        """Make a call that takes the context along, and puts its tensors on the graph."""
        context = scope.context
        self.check_context(context)
        message_id = scope.place.next_id()
        context.sending(self, message_id, tensors_in([message.args, message.kwargs]))
        message = replace(
            message,
            metadata=AutogradMetadata(context.context_id, message_id),
            committed=context.passes.committed,
            from_owner=context.parent is None,
        )
        return cast(ForwardResponse, await self._exchange(context, message, timeout)).result

    async def _profiled(
        self, message: ForwardRequest | RRefFetchRequest, timeout: float | None
    ) -> Reply:
        """Send a request; where a profiler runs here, have it see what a call does there."""
        recorder = recorder_here()
        if recorder is None or isinstance(message, RRefFetchRequest):
            return await self.request(message, timeout=timeout)
        message = replace(message, profiler=recorder.options.to_value())
        with recorder.call(message.function, self._home.name, self.name) as saw:
            reply = cast(ForwardResponse, await self.request(message, timeout=timeout))
            saw(reply.profiler_events)
            return reply

    def check_context(self, context: LocalContext) -> None:
        """Raise ContextError if `context` is another worker's than the one that holds this."""
        if context.table is not self._home.contexts:
            raise ContextError(
                f"{context} is not of the worker that is connected to {self.name!r}: a context "
                "belongs to one worker",
                context_id=context.context_id,
                worker=self.name,
            )

    async def _exchange(
        self,
        context: LocalContext,
        message: ForwardRequest | RRefFetchRequest,
        timeout: float | None,
    ) -> ForwardResponse | RRefFetchResponse:
        """Send what belongs to a context, and put the tensors of the reply on its graph."""
        try:
            reply = await self._profiled(message, timeout)
        except ZmqAutogradError as error:
            if message.metadata is not None and has_not_left(error):
                context.not_sent(message.metadata.message_id)
            # The function may have run a pass before it failed.
            await context.passes.until_committed()
            raise
        context.passes.told_committed(self, message.committed)
        answer = cast(ForwardResponse | RRefFetchResponse, reply)
        value = answer.result if isinstance(answer, ForwardResponse) else answer.value
        if answer.metadata is not None:
            context.received(self, answer.metadata.message_id, tensors_in(value))
        context.passes.learn_committed(answer.committed)
        await context.passes.until_committed()
        return answer


def has_not_left(error: Exception) -> bool:
    """Tell whether a request that ended with `error` was refused on this side, before it left."""
    if isinstance(error, ResourceExhausted):
        return not error.path
    return isinstance(error, (SerializationError, ConfigurationError))
