"""Send and receive functions: where a worker's part of the graph begins and ends.

A message that carries tensors requiring grad has one where it left and one where it arrived, as in
torch (``SendRpcBackward``, ``RecvRpcBackward``).  Knows nothing of who they are exchanged with: a
peer is any object here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from zmq_autograd.errors import ContextError, ProtocolError

SEND_NAME: Final = "torch::distributed::autograd::SendRpcBackward"
RECEIVE_NAME: Final = "torch::distributed::autograd::RecvRpcBackward"
"""What torch calls the two, in profiles and in its graph."""

FREED_TEXT: Final = (
    "Trying to backward through the graph a second time: without retain_graph=True a pass frees "
    "what it ran through"
)


@dataclass(slots=True, eq=False)
class SendFunction:
    """A message that left: what its gradients flow into (torch: ``SendRpcBackward``).

    Attributes:
        message_id: the message.
        peer: who it was sent to.
        edges: for each tensor of the message its place in the graph; None where it requires no
            grad, or where a pass has freed what it was computed from.
        metas: for each tensor its shape and dtype.
        nbytes: bytes of its tensors.
        freed: which tensors' graph a pass has freed.
        leaves: what its tensors were computed from, None until somebody asks; none once the
            context is done with them.
    """

    message_id: int
    peer: Any
    edges: list[GradientEdge | None]
    metas: list[tuple[torch.Size, torch.dtype]]
    nbytes: int = 0
    freed: set[int] = field(default_factory=set)
    leaves: frozenset[Tensor] | None = None

    @classmethod
    def of(cls, message_id: int, peer: Any, tensors: Sequence[Tensor]) -> SendFunction:
        """Record that `tensors`, all of one message, are sent to `peer`."""
        edges = [edge_of(t) if is_differentiable(t) else None for t in tensors]
        metas = [(t.shape, t.dtype) for t in tensors]
        return cls(message_id, peer, edges, metas, sum(map(_nbytes, tensors)))

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """Raise what is wrong with `grads` as the gradients of these tensors.

        Raises:
            ProtocolError: their number, or a shape or dtype, is another one.
            RuntimeError: as torch does, if the graph that they belong to was freed.
        """
        if len(grads) != len(self.metas):
            raise ProtocolError(
                f"message {self.message_id}: expected {len(self.metas)} gradients, got {len(grads)}"
            )
        for index, (grad, (shape, dtype)) in enumerate(zip(grads, self.metas, strict=True)):
            if grad is not None and (grad.shape != shape or grad.dtype != dtype):
                raise ProtocolError(
                    f"message {self.message_id}: expected gradient {index} of shape {list(shape)} "
                    f"and {dtype}, got {list(grad.shape)} and {grad.dtype}"
                )
            if grad is not None and index in self.freed:
                raise RuntimeError(FREED_TEXT)

    def free(self, index: int) -> None:
        """Let go of the graph of one tensor, which cannot be run again."""
        self.edges[index] = None
        self.freed.add(index)


@dataclass(slots=True, eq=False)
class ReceiveFunction:
    """A message that arrived: what gradients flow out of (torch: ``RecvRpcBackward``).

    Each of its tensors is the output of a node of its own, as if each had been computed alone.

    Attributes:
        message_id: the message.
        peer: who sent it.
        context_id: the context that it belongs to, 0 for none.
        tensors: how many tensors the message has.
    """

    message_id: int
    peer: Any
    context_id: int
    tensors: int = 0

    def attach(self, tensors: Sequence[Tensor]) -> None:
        """Put those of `tensors`, all of one message, that require grad on the graph.

        They stay the same objects, and are no leaves from now on: they may be changed in place.
        """
        self.tensors = len(tensors)
        # Whatever modes hold here: what the caller could differentiate stays differentiable.
        with torch.inference_mode(mode=False), torch.enable_grad():
            for position, tensor in enumerate(tensors):
                if tensor.requires_grad:
                    holder = [tensor.requires_grad_(False)]
                    RecvRpc.apply(_TOKEN, self, position, holder)  # type: ignore[no-untyped-call]


def is_differentiable(tensor: Tensor) -> bool:
    """Tell whether gradients can flow to `tensor`: one made in inference mode may only say so."""
    return tensor.requires_grad and not tensor.is_inference()


def _nbytes(tensor: Tensor) -> int:
    if not tensor.is_sparse:
        return tensor.numel() * tensor.itemsize
    plain = tensor.detach()
    return plain._indices().nbytes + plain._values().nbytes


def edge_of(tensor: Tensor) -> GradientEdge:
    """Return the place of a tensor that requires grad in the graph, whatever modes hold here."""
    with torch.inference_mode(mode=False):  # in it torch finds no accumulator of a leaf
        return _sparse_edge(tensor) if tensor.is_sparse else get_gradient_edge(tensor)


def _sparse_edge(tensor: Tensor) -> GradientEdge:
    # Torch's own way is to take a view, which sparse tensors have none of.
    with torch.enable_grad():
        following = tensor.unsqueeze(0).grad_fn
    node, output_nr = following.next_functions[0] if following is not None else (None, 0)
    if node is None:
        raise RuntimeError("expected a tensor that requires grad")
    return GradientEdge(node, output_nr, following)  # which keeps the graph alive


class RecvRpc(Function):
    """Makes a received tensor the output of a node, where gradients are captured: it never runs."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, receive: ReceiveFunction, position: int, holder: list[Tensor]
    ) -> Tensor:
        """Return the tensor in `holder`, which is no input, as it is."""
        ctx.receive = receive
        ctx.position = position
        return holder.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Refuse: a plain ``.backward()`` came across a boundary between workers."""
        receive: ReceiveFunction = ctx.receive
        if not receive.context_id:
            raise ContextError(
                "backward reached the result of a call that was made outside a context: make the "
                "call inside `async with worker.context() as ctx`, or detach what is passed to it"
            )
        raise ContextError(
            f"backward reached a tensor that was received in context {receive.context_id}: use "
            "`await ctx.backward(...)`, which crosses workers",
            context_id=receive.context_id,
        )


def cut_off(tensors: Iterable[Tensor], peer: Any) -> None:
    """Have backward say what to do where it reaches `tensors`, received outside a context."""
    distinct = list({id(tensor): tensor for tensor in tensors}.values())
    for tensor in distinct:
        tensor.requires_grad_(tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    if any(tensor.requires_grad for tensor in distinct):
        ReceiveFunction(0, peer, 0).attach(distinct)


# What makes torch put the outputs on the graph at all; nothing ever flows into it.
_TOKEN: Final = torch.zeros((), requires_grad=True)

_RECEIVE_NODE: Final[type] = RecvRpc._backward_cls
_LEAF_NODE: Final = type(get_gradient_edge(_TOKEN).node)


def receive_of(node: Node) -> ReceiveFunction | None:
    """Return the receive function that `node` belongs to, None if it is another node."""
    return node.receive if type(node) is _RECEIVE_NODE else None  # type: ignore[attr-defined]


def position_of(node: Node) -> int:
    """Return which of the received message's tensors is the output of `node`."""
    position: int = node.position  # type: ignore[attr-defined]
    return position


def leaf_of(node: Node) -> Tensor | None:
    """Return the leaf that `node` accumulates gradients of, None if it is another node."""
    return node.variable if type(node) is _LEAF_NODE else None  # type: ignore[attr-defined]
