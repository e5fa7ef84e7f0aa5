"""The record of one context on one worker: what was sent and received, and the gradients so far."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.weak import TensorWeakRef

from zmq_autograd.autograd.accumulate import accumulated, added
from zmq_autograd.autograd.functions import (
    ReceiveFunction,
    SendFunction,
    is_differentiable,
)
from zmq_autograd.autograd.walk import leaves_of
from zmq_autograd.errors import ProtocolError


class KeptResult:
    """What was computed and kept here, as the value of an RRef, for a later pass."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Take note of `tensors`."""
        # Weakly: it is not for this to keep their graph, and no pass comes to what was dropped.
        self._tensors = [TensorWeakRef(tensor) for tensor in tensors]
        self._leaves: frozenset[Tensor] | None = None

    def leaves(self) -> frozenset[Tensor]:
        """Return what it was computed from, found once somebody asks."""
        if self._leaves is None:
            self._leaves = leaves_of(self.nodes())
        return self._leaves

    def nodes(self) -> list[Node]:
        """Return where in the graph a pass may still come to it."""
        tensors = (tensor() for tensor in self._tensors)
        nodes = (tensor.grad_fn for tensor in tensors if tensor is not None)
        return [node for node in nodes if node is not None]


class Record:
    """See the module.

    Attributes:
        context_id: the context.
        sends: by message id.
        receives: by message id.
        gradients: by leaf, the sum over all passes that are complete.
        kept: what was kept here, as far as no pass has freed its graph.  A dict, so that compute
            threads may add to it.
    """

    def __init__(self, context_id: int) -> None:
        """Make an empty record of the context."""
        self.context_id = context_id
        self.sends: dict[int, SendFunction] = {}
        self.receives: dict[int, ReceiveFunction] = {}
        self.gradients: dict[Tensor, Tensor] = {}
        self.kept: dict[KeptResult, None] = {}

    def send(self, message_id: int, peer: Any, tensors: Iterable[Tensor]) -> bool:
        """Record that `tensors` leave in one message; say whether any of them is on the graph.

        Raises:
            ProtocolError: there is a message of that id already.
        """
        if message_id in self.sends:
            raise ProtocolError(
                f"message {message_id} of context {self.context_id} was sent before"
            )
        distinct = _distinct(tensors)
        if not any(map(is_differentiable, distinct)):
            return False
        self.sends[message_id] = SendFunction.of(message_id, peer, distinct)
        return True

    def receive(self, message_id: int, peer: Any, tensors: Iterable[Tensor]) -> None:
        """Record that `tensors` arrived in one message, and put them on the graph."""
        distinct = _distinct(tensors)
        if any(tensor.requires_grad for tensor in distinct):
            receive = ReceiveFunction(message_id, peer, self.context_id)
            receive.attach(distinct)
            self.receives[message_id] = receive

    def roots(self) -> list[SendFunction]:
        """Return the sends that gradients can flow into, in an order that no run changes."""
        # Ids are mixed with the context's, see `engine.places`; without it they say where in the
        # program a message was made.
        sends = sorted(self.sends.values(), key=lambda send: send.message_id ^ self.context_id)
        return [send for send in sends if any(edge is not None for edge in send.edges)]

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Record that `tensors` are kept here; from any thread."""
        kept = KeptResult(tensors)
        if kept.nodes():
            self.kept[kept] = None

    def forget_kept(self, spent: Container[Node] = ()) -> None:
        """Forget what was kept and computed by `spent` nodes alone, or was dropped since."""
        for kept in list(self.kept):
            if all(node in spent for node in kept.nodes()):
                del self.kept[kept]

    def kept_results(self) -> list[KeptResult]:
        """Return what was kept and may be needed by a pass."""
        self.forget_kept()
        return list(self.kept)

    def summed(self, grads: dict[Tensor, Tensor], *, into_grad: bool) -> dict[Tensor, Tensor]:
        """Return the gradients with those of a pass that is complete everywhere, which are used up.

        Raises:
            Exception: whatever an accumulate hook raises.
        """
        total = dict(self.gradients)
        for tensor, grad in accumulated(grads, into_grad=into_grad).items():
            before = total.get(tensor)
            total[tensor] = grad if before is None else added(before, grad)
        return total

    def clear(self) -> None:
        """Let go of every tensor and graph."""
        self.sends.clear()
        self.receives.clear()
        self.gradients.clear()
        self.kept.clear()


def _distinct(tensors: Iterable[Tensor]) -> Sequence[Tensor]:
    """Return each tensor object once, in the order in which a message carries them."""
    return list({id(tensor): tensor for tensor in tensors}.values())
