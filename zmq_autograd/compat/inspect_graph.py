"""What a program sees of a context's graph: send and receive functions, and the nodes between them.

Torch has one receive node for each message, and names for both kinds; here each received tensor has
a node of its own.  Those of one message are shown as one, under torch's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from zmq_autograd.autograd.functions import (
    RECEIVE_NAME,
    SEND_NAME,
    ReceiveFunction,
    SendFunction,
    leaf_of,
    receive_of,
)


class GraphNode:
    """A node of the graph on this worker."""

    def __init__(self, node: Node) -> None:
        """Show `node`, which is no receive node."""
        self._node = node

    def name(self) -> str:
        """Return what kind of node it is."""
        return self._node.name()

    @property
    def next_functions(self) -> tuple[tuple[GraphNode | ReceiveNode | None, int], ...]:
        """Where its gradients go: nodes, and numbers of their inputs."""
        return tuple((shown(node), index) for node, index in self._node.next_functions)

    @property
    def variable(self) -> Tensor:
        """The leaf that it accumulates gradients of."""
        leaf = leaf_of(self._node)
        if leaf is None:
            raise AttributeError(f"{self.name()} has no attribute 'variable'")
        return leaf

    def __eq__(self, other: object) -> bool:
        return self._node == (other._node if isinstance(other, GraphNode) else other)

    def __hash__(self) -> int:
        return hash(self._node)

    def __repr__(self) -> str:
        return f"<{self.name()}>"


class ReceiveNode:
    """A message that arrived: equal to each node of its tensors."""

    next_functions: tuple[()] = ()

    def __init__(self, receive: ReceiveFunction) -> None:
        """Show the nodes of `receive`."""
        self._receive = receive

    def name(self) -> str:
        """Return what torch calls it."""
        return RECEIVE_NAME

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ReceiveNode):
            return self._receive is other._receive
        return isinstance(other, Node) and receive_of(other) is self._receive

    def __hash__(self) -> int:
        return hash(self._receive)

    def __repr__(self) -> str:
        return f"<{RECEIVE_NAME} of message {self._receive.message_id}>"


class SendNode:
    """A message that left."""

    def __init__(self, send: SendFunction) -> None:
        """Show `send`."""
        self._send = send

    def name(self) -> str:
        """Return what torch calls it."""
        return SEND_NAME

    @property
    def next_functions(self) -> tuple[tuple[GraphNode | ReceiveNode | None, int], ...]:
        """Where the gradients of its tensors go, of those that require grad."""
        return tuple(
            (shown(edge.node), edge.output_nr) for edge in self._send.edges if edge is not None
        )

    def __repr__(self) -> str:
        return f"<{SEND_NAME} of message {self._send.message_id}>"


def shown(node: Node | None) -> GraphNode | ReceiveNode | None:
    """Return what a program sees of `node`."""
    if node is None:
        return None
    receive = receive_of(node)
    return GraphNode(node) if receive is None else ReceiveNode(receive)


def shown_sends(sends: Mapping[int, SendFunction]) -> dict[int, Any]:
    """Return what a program sees of a context's sends, by message id."""
    return {number: SendNode(send) for number, send in sends.items()}


def shown_receives(receives: Mapping[int, ReceiveFunction]) -> dict[int, Any]:
    """Return what a program sees of a context's receives, by message id."""
    return {number: ReceiveNode(receive) for number, receive in receives.items()}
