"""The default handlers: what a worker does with a request unless its user takes it over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zmq_autograd.engine import Contexts
from zmq_autograd.engine.graph import GRAPH_FUNCTION, answer
from zmq_autograd.errors import ContextError, NotRegistered
from zmq_autograd.node.current import current_call
from zmq_autograd.node.registry import Entry, Registry
from zmq_autograd.node.status import status_of
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardRequest,
    ForwardResponse,
    Reply,
    Status,
    StatusResponse,
)
from zmq_autograd.wire.values import tensors_in

if TYPE_CHECKING:
    from zmq_autograd.node.compute import ComputePool
    from zmq_autograd.node.dispatcher import Dispatcher
    from zmq_autograd.node.node import Node


def add_to(dispatcher: Dispatcher, registry: Registry, node: Node) -> None:
    """Give `dispatcher` the default handlers of `node`."""

    async def forward(request: ForwardRequest, peer: Any) -> Reply:
        entry = registry.find(request.function, peer.name)
        if request.metadata is None:
            return await _outside(request, entry, node.pool)
        return await _inside(request, request.metadata, peer, entry, node)

    async def status(request: Status, peer: Any) -> Reply:
        return StatusResponse(status_of(node))

    dispatcher.add_default(ForwardRequest, forward)
    dispatcher.add_default(Status, status)
    for kind, handler in node.contexts.handlers.items():
        dispatcher.add_default(kind, handler)
    try:
        registry.find(GRAPH_FUNCTION, node.name)
    except NotRegistered:  # in the worker's first life: what is registered outlasts its node
        registry.register(_graph, GRAPH_FUNCTION, internal=True)


async def _outside(request: ForwardRequest, entry: Entry, pool: ComputePool) -> Reply:
    """Serve a call made outside a context: it carries values alone."""
    for tensor in tensors_in([request.args, request.kwargs]):
        tensor.requires_grad_(False)
    return ForwardResponse(await entry.call(request.args, dict(request.kwargs), pool))


async def _inside(
    request: ForwardRequest, metadata: AutogradMetadata, peer: Any, entry: Entry, node: Node
) -> Reply:
    """Serve a call made in a context, which from then on is on this worker too."""
    contexts: Contexts = node.contexts
    context = contexts.join(metadata.context_id, peer, from_owner=request.from_owner)
    context.received(peer, metadata.message_id, tensors_in([request.args, request.kwargs]))
    context.passes.learn_committed(request.committed)
    await context.passes.until_committed()
    reply = AutogradMetadata(context.context_id, context.enter(metadata.message_id).reply_id)
    result = await entry.call(request.args, dict(request.kwargs), node.pool)
    is_on_graph = context.sending(peer, reply.message_id, tensors_in(result))
    return ForwardResponse(
        result, reply if is_on_graph else None, committed=context.passes.committed
    )


async def _graph(context_id: int, committed: int, seconds: float, is_parent: bool) -> list[Any]:
    """Tell who shares the context of its graph on this worker and on those behind it."""
    call = current_call.get()
    if call is None:
        raise RuntimeError("expected to be called by another worker")
    node: Node = call.node
    try:
        context = node.contexts.find(context_id, call.peer)
    except ContextError:
        return []
    return await answer(context, node, call.peer, committed, seconds, is_parent=is_parent)
