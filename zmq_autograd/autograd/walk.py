"""The walk: a worker's part of the graph, once from all its roots, as plain lists.

Owns the order in which nodes are taken, which decides the order of every sum.  It follows from the
graph and the order of the roots alone, never from when or in which thread a node was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from zmq_autograd.autograd.functions import leaf_of, receive_of

Next = list[tuple[int, int] | None]
"""Where the gradients that a node gives go: number of a node and of its input; None for nowhere."""


@dataclass(slots=True)
class Walk:
    """Every node that can be reached.

    Attributes:
        nodes: each before all that it leads to.
        nexts: for each of them where it leads; sinks lead nowhere.
        numbers: the place of each node in `nodes`.
    """

    nodes: list[Node]
    nexts: list[Next]
    numbers: dict[Node, int]


class TooManyNodes(Exception):
    """A walk was given up."""


def walk(roots: Iterable[Node], at_most: float = math.inf) -> Walk:
    """Walk from `roots` to the sinks: leaves and receive functions.

    It takes about a microsecond a node.

    Raises:
        TooManyNodes: there are more than `at_most`.
    """
    functions: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
    incoming: dict[Node, int] = {}
    first = list(dict.fromkeys(roots))
    waiting = first[::-1]
    while waiting:
        node = waiting.pop()
        if node in functions:
            continue
        if len(functions) >= at_most:
            raise TooManyNodes
        is_sink = leaf_of(node) is not None or receive_of(node) is not None
        functions[node] = () if is_sink else node.next_functions
        for following, _ in functions[node]:
            if following is not None:
                incoming[following] = incoming.get(following, 0) + 1
                if following not in functions:
                    waiting.append(following)
    nodes = _ordered([node for node in first if node not in incoming], functions, incoming)
    numbers = {node: number for number, node in enumerate(nodes)}
    nexts = [
        [None if to is None else (numbers[to], index) for to, index in functions[node]]
        for node in nodes
    ]
    return Walk(nodes, nexts, numbers)


def leaves_of(roots: Iterable[Node]) -> frozenset[Tensor]:
    """Return the leaves that `roots` lead to."""
    found = map(leaf_of, walk(roots).nodes)
    return frozenset(leaf for leaf in found if leaf is not None)


def _ordered(
    ready: list[Node],
    functions: dict[Node, tuple[tuple[Node | None, int], ...]],
    incoming: dict[Node, int],
) -> list[Node]:
    """Return all nodes, each before what it leads to; `incoming` is used up."""
    nodes = []
    ready.reverse()
    while ready:
        node = ready.pop()
        nodes.append(node)
        for following, _ in functions[node]:
            if following is not None:
                incoming[following] -= 1
                if not incoming[following]:
                    ready.append(following)
    return nodes
