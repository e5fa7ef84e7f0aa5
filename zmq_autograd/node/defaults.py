"""The default handlers: what a worker does with a request unless its user takes it over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zmq_autograd.autograd.anomaly import of_the_call
from zmq_autograd.engine import Contexts, LocalContext
from zmq_autograd.engine.graph import GRAPH_FUNCTION, answer
from zmq_autograd.engine.steps import DONE_FUNCTION, done_reading
from zmq_autograd.errors import ContextError, NotRegistered
from zmq_autograd.node import optimizers
from zmq_autograd.node.current import reading, served_call
from zmq_autograd.node.profiled import ProfilerOptions
from zmq_autograd.node.recorder import CallRecorder
from zmq_autograd.node.registry import Entry, Registry
from zmq_autograd.node.status import status_of
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardRequest,
    ForwardResponse,
    Reply,
    RRefBackwardRequest,
    RRefBackwardResponse,
    RRefFetchRequest,
    RRefFetchResponse,
    Status,
    StatusResponse,
)
from zmq_autograd.wire.values import tensors_in

if TYPE_CHECKING:
    from zmq_autograd.node.dispatcher import Dispatcher
    from zmq_autograd.node.node import Node


def add_to(dispatcher: Dispatcher, registry: Registry, node: Node) -> None:
    """Give `dispatcher` the default handlers of `node`."""

    async def forward(request: ForwardRequest, peer: Any) -> Reply:
        return await _profiled(request, node, lambda: call(request, peer))

    async def call(request: ForwardRequest, peer: Any) -> ForwardResponse:
        if request.target_id:
            owned = node.rrefs.owned(request.target_id, peer)
            entry = registry.method(owned, request.function, peer.name)
        else:
            entry = registry.find(request.function, peer.name)
        if request.metadata is None:
            return await _outside(request, entry, node)
        return await _inside(request, request.metadata, peer, entry, node)

    async def fetch(request: RRefFetchRequest, peer: Any) -> Reply:
        owned = node.rrefs.owned(request.rref_id, peer)
        async with owned.turn():
            return await _fetched(request, owned.value, peer, node)

    async def backward(request: RRefBackwardRequest, peer: Any) -> Reply:
        value = node.rrefs.owned(request.rref_id, peer).value
        context = node.contexts.get(request.context_id)
        of_the_call.set(request.check_nan)
        await context.user.backward(
            value,
            retain_graph=request.retain_graph,
            accumulate_grad=request.accumulate_grad,
            timeout=None,  # the request's own ends it
        )
        return RRefBackwardResponse(context.passes.committed)

    async def status(request: Status, peer: Any) -> Reply:
        return StatusResponse(status_of(node))

    dispatcher.add_default(ForwardRequest, forward)
    dispatcher.add_default(RRefFetchRequest, fetch)
    dispatcher.add_default(RRefBackwardRequest, backward)
    dispatcher.add_default(Status, status)
    for kind, handler in (node.contexts.handlers | node.rrefs.handlers).items():
        dispatcher.add_default(kind, handler)
    try:
        registry.find(GRAPH_FUNCTION, node.name)
    except NotRegistered:  # in the worker's first life: what is registered outlasts its node
        registry.register(_graph, GRAPH_FUNCTION, internal=True)
        registry.register(_done_reading, DONE_FUNCTION, internal=True)
        optimizers.add_to(registry)


async def _profiled(
    request: ForwardRequest, node: Node, serve: Callable[[], Awaitable[ForwardResponse]]
) -> ForwardResponse:
    """Serve a call, and record what it does here where the caller asks for that."""
    if request.profiler is None:
        return await serve()
    options = ProfilerOptions.from_value(request.profiler)
    recorder = CallRecorder(replace(options, with_stack=options.with_stack and node.tracebacks))
    with recorder.serving(request.function):
        reply = await serve()
    return replace(reply, profiler_events=recorder.packed(node.name))


async def _outside(request: ForwardRequest, entry: Entry, node: Node) -> ForwardResponse:
    """Serve a call made outside a context: it carries values alone."""
    for tensor in tensors_in([request.args, request.kwargs]):
        tensor.requires_grad_(False)
    return ForwardResponse(await _result(request, entry, node))


async def _inside(
    request: ForwardRequest, metadata: AutogradMetadata, peer: Any, entry: Entry, node: Node
) -> ForwardResponse:
    """Serve a call made in a context, which from then on is on this worker too."""
    tensors = tensors_in([request.args, request.kwargs])
    context, reply = await _joined(request, metadata, tensors, peer, node)
    result = await _result(request, entry, node)
    is_on_graph = context.sending(peer, reply.message_id, tensors_in(result))
    return ForwardResponse(
        result, reply if is_on_graph else None, committed=context.passes.committed
    )


async def _fetched(request: RRefFetchRequest, value: Any, peer: Any, node: Node) -> Reply:
    """Return the reply that holds the value of an RRef."""
    if request.metadata is None:
        async with node.contexts.gate.without_steps():
            return RRefFetchResponse(node.codecs.pack(value))
    context, reply = await _joined(request, request.metadata, (), peer, node)
    async with reading():
        packed = node.codecs.pack(value)
        is_on_graph = context.sending(peer, reply.message_id, tensors_in(packed))
    return RRefFetchResponse(packed, reply if is_on_graph else None, context.passes.committed)


async def _joined(
    request: ForwardRequest | RRefFetchRequest,
    metadata: AutogradMetadata,
    tensors: Iterable[Tensor],
    peer: Any,
    node: Node,
) -> tuple[LocalContext, AutogradMetadata]:
    """Have this worker take part in the context of a request, and enter it.

    Returns:
        The context, and which message the reply is in it.
    """
    contexts: Contexts = node.contexts
    context = contexts.join(metadata.context_id, peer, from_owner=request.from_owner)
    context.received(peer, metadata.message_id, tensors)
    context.passes.learn_committed(request.committed)
    await context.passes.until_committed()
    place = context.enter(metadata.message_id)
    return context, AutogradMetadata(context.context_id, place.reply_id)


async def _result(request: ForwardRequest, entry: Entry, node: Node) -> Any:
    """Return what the reply to a call holds: what the function returned, or an RRef to it."""
    args, kwargs = node.codecs.unpack([request.args, dict(request.kwargs)])
    result = await entry.call(args, kwargs, node.pool)
    if not request.keep:
        return node.codecs.pack(result)
    return node.keep(result)


async def _graph(context_id: int, committed: int, seconds: float, is_parent: bool) -> list[Any]:
    """Tell who shares the context of its graph on this worker and on those behind it."""
    call = served_call()
    node: Node = call.node
    try:
        context = node.contexts.find(context_id, call.peer)
    except ContextError:
        return []
    return await answer(context, node, call.peer, committed, seconds, is_parent=is_parent)


async def _done_reading(context_id: int, step_id: int) -> None:
    """Take in that a context asks for a step, here and behind."""
    call = served_call()
    node: Node = call.node
    try:
        context = node.contexts.find(context_id, call.peer)
    except ContextError:
        return
    async with done_reading(context, step_id, (call.peer,)):
        pass
