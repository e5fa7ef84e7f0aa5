"""Stages: the nodes that the same roots reach, which run once all of those are resolved.

Owns the plan of a pass on one worker.  It follows from the graph alone, so that sums are taken in
the same way whatever arrives first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor
from torch.autograd.graph import Node

from zmq_autograd.autograd.functions import leaf_of, receive_of
from zmq_autograd.autograd.walk import Walk

Slot = tuple[int, int]
"""An input of a node: the node's number in the walk, and which of its inputs."""


@dataclass(slots=True)
class Stage:
    """Nodes that the same roots reach, by their numbers in the walk, each before what it leads to.

    Attributes:
        roots: a bit for each of those roots.
        stepped: nodes from which a way leads to a node of another stage: run one by one.
        called: the other ones, sinks included: run by one call of torch's engine.
        sinks: leaves and receive functions that this call reaches, leaves of other stages too.
        is_order_free: no sum in it has more than two terms, so that its order changes nothing.
    """

    roots: int
    stepped: list[int] = field(default_factory=list)
    called: list[int] = field(default_factory=list)
    sinks: list[int] = field(default_factory=list)
    is_order_free: bool = True


def stages_of(
    graph: Walk,
    roots: Sequence[Collection[Slot]],
    wanted: Collection[int] | None,
    captured: Collection[Slot] = (),
) -> list[Stage]:
    """Return the stages of `graph`, each before those that it leads to.

    Args:
        graph: the walk from all roots.
        roots: the slots that each root's gradients flow into.
        wanted: the sinks and inner nodes whose gradients are wanted; None for all sinks.  Nodes
            that lead to none of them are in no stage.
        captured: slots of inner nodes whose gradients are wanted.
    """
    reached = _reached(graph, roots)
    needed = None if wanted is None else _needed(graph, wanted)
    stages: dict[int, Stage] = {}
    for number, mask in enumerate(reached):
        if needed is None or needed[number]:
            stages.setdefault(mask, Stage(mask)).called.append(number)
    inner = {number for number, _ in captured}
    if len(stages) > 1 or inner:
        _find_stepped(graph, reached, stages.values(), needed, inner)
    for stage in stages.values():
        _find_sinks(graph, stage, needed)
        stage.is_order_free = _is_order_free(graph, stage, roots)
    return sorted(stages.values(), key=lambda stage: stage.roots.bit_count())


def _reached(graph: Walk, roots: Sequence[Collection[Slot]]) -> list[int]:
    """Return for each node a bit for each root that reaches it."""
    bits = {1 << bit: slots for bit, slots in enumerate(roots) if slots}
    if len(bits) == 1:
        return [*bits] * len(graph.nodes)
    reached = [0] * len(graph.nodes)
    for bit, slots in bits.items():
        for number, _ in slots:
            reached[number] |= bit
    for number, nexts in enumerate(graph.nexts):
        mask = reached[number]
        for slot in nexts:
            if slot is not None:
                reached[slot[0]] |= mask
    return reached


def _needed(graph: Walk, wanted: Collection[int]) -> list[bool]:
    """Tell of each node whether it leads to a wanted one, or is one."""
    needed = [False] * len(graph.nodes)
    for number in wanted:
        needed[number] = True
    for number in range(len(graph.nodes) - 1, -1, -1):
        if any(slot is not None and needed[slot[0]] for slot in graph.nexts[number]):
            needed[number] = True
    return needed


def _find_stepped(
    graph: Walk,
    reached: list[int],
    stages: Iterable[Stage],
    needed: list[bool] | None,
    captured: Collection[int],
) -> None:
    """Take the nodes that must be stepped out of those that are called.

    Those whose gradients are wanted are among them, since torch's engine captures before the tensor
    hooks where the node leads on to something else that is wanted.
    """
    stepped = [False] * len(graph.nodes)

    def leads_out(number: int) -> bool:
        for slot in graph.nexts[number]:
            if slot is None or (needed is not None and not needed[slot[0]]):
                continue
            if number in captured:
                return True
            if stepped[slot[0]] and reached[slot[0]] == reached[number]:
                return True
            if reached[slot[0]] != reached[number] and not _may_be_captured_in_parts(
                graph.nodes[slot[0]]
            ):
                return True
        return False

    for number in range(len(graph.nodes) - 1, -1, -1):
        stepped[number] = (needed is None or needed[number]) and leads_out(number)
    for stage in stages:
        stage.stepped = [number for number in stage.called if stepped[number]]
        if stage.stepped:
            stage.called = [number for number in stage.called if not stepped[number]]


def _may_be_captured_in_parts(node: Node) -> bool:
    """Tell whether nothing runs where gradients are captured: a leaf without tensor hooks."""
    leaf = leaf_of(node)
    return leaf is not None and not has_tensor_hooks(leaf)


def has_tensor_hooks(leaf: Tensor) -> bool:
    """Tell whether hooks run on a gradient of `leaf` before it is accumulated."""
    return bool(leaf._backward_hooks)


def _find_sinks(graph: Walk, stage: Stage, needed: list[bool] | None) -> None:
    found = dict.fromkeys(n for n in stage.called if is_sink(graph.nodes[n]))
    for number in stage.called:
        for slot in graph.nexts[number]:
            # Out of a stage, what is called leads to leaves only.
            if slot is not None and not graph.nexts[slot[0]] and is_sink(graph.nodes[slot[0]]):
                found[slot[0]] = None
    stage.sinks = sorted(n for n in found if needed is None or needed[n])


def is_sink(node: Node) -> bool:
    """Tell whether the graph of this worker ends at `node`."""
    return leaf_of(node) is not None or receive_of(node) is not None


_COMMUTATIVE: Final = 2
"""Terms of a sum whose order changes nothing."""


def _is_order_free(graph: Walk, stage: Stage, roots: Sequence[Collection[Slot]]) -> bool:
    called = {*stage.called, *stage.sinks}
    terms: dict[Slot, int] = dict.fromkeys((slot for slots in roots for slot in slots), 1)
    inside = set(stage.called)
    for number, nexts in enumerate(graph.nexts):
        if number not in inside:
            # What comes from outside the call is summed before it.
            terms |= dict.fromkeys((slot for slot in nexts if slot is not None), 1)
    for number in stage.called:
        for slot in graph.nexts[number]:
            if slot is not None and slot[0] in called:
                terms[slot] = terms.get(slot, 0) + 1
                if terms[slot] > _COMMUTATIVE:
                    return False
    return True
