"""Calls of what another worker offers: functions, and the values that RRefs refer to.

Knows how a call joins the context that it is made in, and how it shows in a profile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from zmq_autograd.autograd.functions import cut_off
from zmq_autograd.engine import Contexts, LocalContext, Peer, Scope, current_scope
from zmq_autograd.errors import (
    ConfigurationError,
    ContextError,
    DeadlineExceeded,
    ResourceExhausted,
    SerializationError,
    ZmqAutogradError,
)
from zmq_autograd.node.codecs import Codecs
from zmq_autograd.node.current import Call, current_call, current_modes, shortened
from zmq_autograd.node.registry import RESERVED_PREFIX
from zmq_autograd.node.torch_profiles import recorder_here
from zmq_autograd.session import checked_timeout
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardRequest,
    ForwardResponse,
    RRefFetchRequest,
    RRefFetchResponse,
)
from zmq_autograd.wire.values import tensors_in

if TYPE_CHECKING:
    from zmq_autograd.node.node import Node

Message = ForwardRequest | RRefFetchRequest


class Home(Protocol):
    """The worker that calls."""

    contexts: Contexts
    codecs: Codecs

    @property
    def name(self) -> str:
        """What it is called."""


class Caller:
    """See the module.  Calls one other worker."""

    def __init__(self, peer: Peer, home: Home) -> None:
        """Make calls of `peer` on behalf of `home`."""
        self._peer = peer
        self._home = home

    async def call(
        self,
        function: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        timeout: float | None,
        *,
        target_id: int = 0,
        keep: bool = False,
    ) -> Any:
        """Call a function; or, of the value of RRef `target_id`, a method.

        Args:
            function: its name.
            args: its arguments.
            kwargs: likewise.
            timeout: seconds, None for ever.
            target_id: the RRef, 0 for none.
            keep: have the result kept there, and return an RRef to it.
        """
        _check_name(function)
        args, kwargs = self._home.codecs.pack([args, kwargs])
        modes = current_modes()
        message = ForwardRequest(
            function, args, kwargs, modes=modes, target_id=target_id, keep=keep
        )
        is_internal = function.startswith(RESERVED_PREFIX) and not target_id
        scope = None if is_internal else current_scope.get()
        return await self._result(scope, message, tensors_in([args, kwargs]), timeout)

    async def fetch(self, rref_id: int, timeout: float | None) -> Any:
        """Return a copy of the value of an RRef."""
        return await self._result(current_scope.get(), RRefFetchRequest(rref_id), (), timeout)

    def check_context(self, context: LocalContext) -> None:
        """Raise ContextError if `context` is another worker's than the one that calls."""
        _check_home(context, self._home, self._peer.name)

    async def _result(
        self, scope: Scope | None, message: Message, sent: Iterable[Tensor], timeout: float | None
    ) -> Any:
        """Send a request that carries the tensors `sent`; return what its reply holds."""
        if scope is None:
            value = await self._outside(message, sent, timeout)
        else:
            value = await self._inside(scope, message, sent, timeout)
        return self._home.codecs.unpack(value)

    async def _outside(
        self, message: Message, sent: Iterable[Tensor], timeout: float | None
    ) -> Any:
        """Send a request that is in no context: it carries values alone."""
        is_cut = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sent)
        value = _value_of(await self._profiled(message, timeout))
        for tensor in tensors_in(value):
            tensor.requires_grad_(False)
        if is_cut:
            cut_off(tensors_in(value), self._peer)
        return value

    async def _inside(
        self, scope: Scope, message: Message, sent: Iterable[Tensor], timeout: float | None
    ) -> Any:
        """Send a request that takes the context along; put its tensors on the graph."""
        context = scope.context
        self.check_context(context)
        message_id = scope.place.next_id()
        context.sending(self._peer, message_id, sent)
        message = replace(
            message,
            metadata=AutogradMetadata(context.context_id, message_id),
            committed=context.passes.committed,
            from_owner=context.parent is None,
        )
        try:
            reply = await self._profiled(message, timeout)
        except ZmqAutogradError as error:
            if has_not_left(error):
                context.not_sent(message_id)
            # The function may have run a pass before it failed.
            await context.passes.until_committed()
            raise
        context.passes.told_committed(self._peer, message.committed)
        if reply.metadata is not None:
            context.received(self._peer, reply.metadata.message_id, tensors_in(_value_of(reply)))
        context.passes.learn_committed(reply.committed)
        await context.passes.until_committed()
        return _value_of(reply)

    async def _profiled(
        self, message: Message, timeout: float | None
    ) -> ForwardResponse | RRefFetchResponse:
        """Send a request; where a profiler runs here, have it see what a call does there."""
        recorder = recorder_here()
        if recorder is None or isinstance(message, RRefFetchRequest):
            reply = await self._peer.request(message, timeout=timeout)
            return cast(ForwardResponse | RRefFetchResponse, reply)
        message = replace(message, profiler=recorder.options.to_value())
        with recorder.call(message.function, self._home.name, self._peer.name) as saw:
            reply = cast(ForwardResponse, await self._peer.request(message, timeout=timeout))
            saw(reply.profiler_events)
            return reply


async def call_owned(
    node: Node,
    rref_id: int,
    method: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    timeout: float | None,
    *,
    keep: bool = False,
) -> Any:
    """Call a method of a value that lives here, as its holders elsewhere do; see `Caller.call`.

    Raises:
        NotRegistered: its class is not registered, or exposes no such method.
        DeadlineExceeded: it did not return in time.
    """
    _check_name(method)
    scope = current_scope.get()
    if scope is not None:
        _check_home(scope.context, node, node.name)
    seconds = shortened(checked_timeout(timeout))
    entry = node.registry.method(node.rrefs.owned(rref_id), method, None)
    try:
        async with asyncio.timeout(seconds) as until:
            with _calling(node):
                result = await entry.call(args, dict(kwargs), node.pool)
    except TimeoutError:
        if not until.expired():  # it is what the method raised
            raise
        raise DeadlineExceeded(
            f"method {method!r} on worker {node.name!r} did not return within {seconds:g} s",
            workers=(node.name,),
        ) from None
    return node.keep(result) if keep else result


@contextmanager
def _calling(node: Node) -> Iterator[None]:
    """Have what runs in a block know that it runs on `node`, unless it serves a call there."""
    call = current_call.get()
    if call is not None and call.node is node:
        yield
        return
    deadline = None if call is None else call.deadline
    token = current_call.set(Call(node.worker, None, node, deadline, current_modes()))
    try:
        yield
    finally:
        current_call.reset(token)


def has_not_left(error: Exception) -> bool:
    """Tell whether a request that ended with `error` was refused on this side, before it left."""
    if isinstance(error, ResourceExhausted):
        return not error.path
    return isinstance(error, (SerializationError, ConfigurationError))


def _check_home(context: LocalContext, home: Home, name: str) -> None:
    if context.table is not home.contexts:
        raise ContextError(
            f"{context} is not of worker {home.name!r}, which calls {name!r}: a context belongs to "
            "one worker",
            context_id=context.context_id,
            worker=name,
        )


def _check_name(function: str) -> None:
    if not isinstance(function, str):
        raise ConfigurationError(f"expected the name of what is registered, got {function!r}")


def _value_of(reply: ForwardResponse | RRefFetchResponse) -> Any:
    return reply.result if isinstance(reply, ForwardResponse) else reply.value
