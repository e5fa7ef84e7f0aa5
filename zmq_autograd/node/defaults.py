"""The default handlers: what a worker does with a request unless its user takes it over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zmq_autograd.errors import ContextError
from zmq_autograd.node.registry import Registry
from zmq_autograd.wire.messages import (
    CleanupContextRequest,
    CleanupContextResponse,
    ForwardRequest,
    ForwardResponse,
    PropagateGradientsRequest,
    Reply,
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
        entry = registry.find(request.function, peer.name)
        for tensor in tensors_in([request.args, request.kwargs]):
            tensor.requires_grad_(False)  # outside a context a call carries values alone
        result = await entry.call(request.args, dict(request.kwargs), node.pool)
        return ForwardResponse(result)

    async def propagate_gradients(request: PropagateGradientsRequest, peer: Any) -> Reply:
        context_id = request.metadata.context_id
        raise ContextError(
            f"worker {node.me.name!r} has no autograd context {context_id}",
            context_id=context_id,
            worker=node.me.name,
        )

    async def cleanup_context(request: CleanupContextRequest, peer: Any) -> Reply:
        return CleanupContextResponse()  # idempotent: a context that is not here is cleaned up

    async def status(request: Status, peer: Any) -> Reply:
        peers = [channel.peer.name for channel in node.channels]
        return StatusResponse(
            {"name": node.me.name, "incarnation": node.me.incarnation, "peers": peers}
        )

    dispatcher.add_default(ForwardRequest, forward)
    dispatcher.add_default(PropagateGradientsRequest, propagate_gradients)
    dispatcher.add_default(CleanupContextRequest, cleanup_context)
    dispatcher.add_default(Status, status)
