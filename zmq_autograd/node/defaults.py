"""The default handlers: what a worker does with a request unless its user takes it over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zmq_autograd.engine import Contexts
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
    context = contexts.join(metadata.context_id, peer)
    context.received(peer, metadata.message_id, tensors_in([request.args, request.kwargs]))
    await context.learn_committed(request.committed)
    reply = AutogradMetadata(context.context_id, context.enter(metadata.message_id).reply_id)
    result = await entry.call(request.args, dict(request.kwargs), node.pool)
    is_on_graph = context.sending(peer, reply.message_id, tensors_in(result))
    return ForwardResponse(
        result, reply if is_on_graph else None, committed=context.tell_committed(peer)
    )
