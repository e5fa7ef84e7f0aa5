"""One worker's part of one backward pass: takes gradients for its roots as they come, in any order.

Owns the sums that wait between stages, the leaf gradients of the pass until it is complete, and
what leaves through receive functions.  Knows nothing of peers and messages beyond those functions;
everything here may run in any one thread at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from zmq_autograd.autograd import anomaly, calls
from zmq_autograd.autograd.accumulate import added
from zmq_autograd.autograd.functions import (
    ReceiveFunction,
    edge_of,
    leaf_of,
    position_of,
    receive_of,
)
from zmq_autograd.autograd.stages import Slot, Stage, has_tensor_hooks, is_sink, stages_of
from zmq_autograd.autograd.walk import Walk, walk
from zmq_autograd.errors import ContextError

Place = tuple[int, int]
"""Where a term of a sum comes from: number of its node in the walk, or less for a root; and which
of its outputs.  Terms are summed in this order."""

Term = tuple[Place, Tensor]

Emission = tuple[ReceiveFunction, list[Tensor | None]]
"""The complete gradients for one received message."""


@dataclass(slots=True, eq=False)
class Root:
    """What gradients flow in through: a send function's edges, or the losses'.

    Attributes:
        edges: where they flow in; None where nothing can.
    """

    edges: Sequence[GradientEdge | None]


def walk_from(roots: Sequence[Root], at_most: float = math.inf) -> Walk:
    """Walk from all edges of `roots`; raise `TooManyNodes` if there are more than `at_most`."""
    edges = (edge for root in roots for edge in root.edges)
    return walk((edge.node for edge in edges if edge is not None), at_most)


@dataclass(slots=True, eq=False)
class Wanted:
    """Which gradients a pass is to find on this worker, beside those of received tensors.

    Attributes:
        leaves: all leaves, or none but those among `inputs`.
        inputs: these tensors, leaves or not.
    """

    leaves: bool = True
    inputs: Sequence[Tensor] = ()


class LocalPass:
    """See the module.  `resolve` every root once; `run` returns what has become complete.

    Attributes:
        gradients: of leaves and inputs, once every root was resolved and `run` was called.
        freed: then, which roots' edges, by their places, lead to what was freed.
    """

    def __init__(
        self,
        graph: Walk,
        context_id: int,
        roots: Sequence[Root],
        wanted: Wanted,
        *,
        retain_graph: bool,
        check_nan: bool | None = None,
    ) -> None:
        """Plan a pass.

        Args:
            graph: the walk from all roots.
            context_id: the context; a received tensor of another one is refused.
            roots: in the order in which sums take what flows in through them.
            wanted: whose gradients are to be found.
            retain_graph: keep what the pass runs through.
            check_nan: whether anomaly mode looks for NaN, None where it is off unless this process
                has turned it on.

        Raises:
            ContextError: a root was computed from what was received in another context.
        """
        self.gradients: dict[Tensor, Tensor] = {}
        self.freed: list[tuple[int, int]] = []
        self._context_id = context_id
        self._retain_graph = retain_graph
        self._check_nan = anomaly.check_nan() if check_nan is None else check_nan
        self._roots = roots
        self._graph = graph
        self._all_leaves = wanted.leaves
        self._captures = self._found(wanted.inputs)
        self._slots: list[list[Slot | None]] = [
            [edge and (self._graph.numbers[edge.node], edge.output_nr) for edge in root.edges]
            for root in roots
        ]
        slots = [[slot for slot in slots if slot is not None] for slots in self._slots]
        self._stages = stages_of(self._graph, slots, self._wanted_nodes(wanted), self._captures)
        self._unresolved = sum(1 << root for root, edges in enumerate(slots) if edges)
        # Which nodes run only once; a custom Function that has run cannot tell any more.
        self._saves = [not retain_graph and calls.saves_tensors(node) for node in graph.nodes]
        # Edges that gradients have flowed in through.
        self._used: list[tuple[int, int]] = []
        # What has flowed into nodes that have not run, by number and input.
        self._waiting: dict[int, dict[int, list[Term]]] = {}
        # What has been found for leaves and inputs.
        self._found_terms: dict[Tensor, list[Term]] = {}
        # By received message, how many of its nodes have not run, and the gradients found so far.
        found = (receive_of(node) for node in graph.nodes)
        self._receives = Counter(receive for receive in found if receive is not None)
        self._emissions: dict[ReceiveFunction, list[Tensor | None]] = {
            receive: [None] * receive.tensors for receive in self._receives
        }
        self._check_context()

    @property
    def receives(self) -> list[ReceiveFunction]:
        """The receive functions that the roots reach: each will get its gradients."""
        return list(self._receives)

    @property
    def is_complete(self) -> bool:
        """Whether every stage has run."""
        return not self._stages

    def resolve(self, root: int, grads: Sequence[Tensor | None] | None) -> None:
        """Take the gradients for a root; None if there are none to come.

        Args:
            root: its place among the roots.
            grads: one for each of its edges, of the shape and dtype there, None where undefined.
        """
        self._unresolved &= ~(1 << root)
        for index, grad in enumerate(grads or ()):
            slot = self._slots[root][index]
            if slot is not None and grad is not None:
                self._used.append((root, index))
                self._add(slot, ((root - len(self._roots), index), grad))

    def run(self) -> list[Emission]:
        """Run every stage whose roots are resolved; return what is complete now.

        Raises:
            Exception: whatever a hook, a Function or torch raises; the pass is not to go on.
        """
        emissions: list[Emission] = []
        waiting = []
        for stage in self._stages:
            if stage.roots & self._unresolved:
                waiting.append(stage)
            else:
                emissions += self._run_stage(stage)
        is_last = bool(self._stages) and not waiting
        self._stages = waiting
        if is_last:
            self._finish()
        return emissions

    def spent(self) -> set[Node]:
        """Return the nodes that the pass has run, once it is complete, and that cannot run again.

        None are told of a pass for some inputs alone: torch runs only what leads to these.
        """
        if self._retain_graph or not self._all_leaves:
            return set()
        used = (self._slots[root][index] for root, index in self._used)
        has_run = {slot[0] for slot in used if slot is not None}
        for number, nexts in enumerate(self._graph.nexts):
            if number in has_run:
                has_run.update(slot[0] for slot in nexts if slot is not None)
        is_freed = self._freed_nodes()
        return {self._graph.nodes[number] for number in has_run if is_freed[number]}

    # --- planning --------------------------------------------------------------------------------

    def _found(self, inputs: Sequence[Tensor]) -> dict[Slot, Tensor]:
        """Return where in the graph `inputs` are, as far as they are in it."""
        edges = ((edge_of(tensor), tensor) for tensor in inputs)
        numbers = self._graph.numbers
        return {
            (numbers[edge.node], edge.output_nr): tensor
            for edge, tensor in edges
            if edge.node in numbers
        }

    def _wanted_nodes(self, wanted: Wanted) -> list[int] | None:
        if wanted.leaves and not wanted.inputs:
            return None
        receives = [n for n, node in enumerate(self._graph.nodes) if receive_of(node) is not None]
        return [*receives, *(number for number, _ in self._captures)]

    def _check_context(self) -> None:
        for receive in self._receives:
            if receive.context_id != self._context_id:
                where = f"in context {receive.context_id}" if receive.context_id else "outside one"
                raise ContextError(
                    f"backward in context {self._context_id} reached a tensor that was received "
                    f"{where}: receive it again in this context, or detach it",
                    context_id=self._context_id,
                )

    # --- running ---------------------------------------------------------------------------------

    def _finish(self) -> None:
        found, self._found_terms = self._found_terms, {}
        # Emptied list by list: what nothing else holds need not be copied later.
        self.gradients = {tensor: _sum(found.pop(tensor)) for tensor in list(found)}
        if not self._retain_graph:
            is_freed = self._freed_nodes()
            for root, index in self._used:
                slot = self._slots[root][index]
                if slot is not None and is_freed[slot[0]]:
                    self.freed.append((root, index))

    def _freed_nodes(self) -> list[bool]:
        """Tell of each node whether it, or one that it leads to, has saved tensors."""
        freed = list(self._saves)
        for number in range(len(freed) - 1, -1, -1):
            nexts = self._graph.nexts[number]
            freed[number] |= any(slot is not None and freed[slot[0]] for slot in nexts)
        return freed

    def _run_stage(self, stage: Stage) -> list[Emission]:
        for number in stage.stepped:
            self._step(number)
        captured = self._call(stage)
        place = (stage.called[0] if stage.called else 0, 0)
        for slot, grad in captured.items():
            leaf = leaf_of(self._graph.nodes[slot[0]])
            tensor = self._captures.get(slot) if leaf is None else leaf
            if tensor is not None:
                self._found_terms.setdefault(tensor, []).append((place, grad))
        return [
            emission
            for number in stage.sinks
            if (emission := self._received(number, captured.get((number, 0)))) is not None
        ]

    def _received(self, number: int, grad: Tensor | None) -> Emission | None:
        """Take the gradient found at a sink; return its message's if all are found now."""
        node = self._graph.nodes[number]
        receive = receive_of(node)
        if receive is None:
            return None
        if grad is not None and grad.layout not in (torch.strided, torch.sparse_coo):
            grad = grad.to_dense()  # no other layouts travel
        self._emissions[receive][position_of(node)] = grad
        self._receives[receive] -= 1
        return None if self._receives[receive] else (receive, self._emissions.pop(receive))

    def _step(self, number: int) -> None:
        grads = self._take_sums(number)
        if not grads:
            return
        node, nexts = self._graph.nodes[number], self._graph.nexts[number]
        leads = [self._edge(slot) for slot in dict.fromkeys(nexts) if slot is not None]
        with self._watched([node]):
            passed_on, given = calls.step(node, grads, leads)
        if not self._retain_graph and self._saves[number]:
            calls.mark_freed(node)
        for index, (slot, grad) in enumerate(zip(nexts, passed_on, strict=True)):
            if slot is not None and grad is not None:
                self._add(slot, ((number, index), grad))
        for index, grad in enumerate(given if self._captures else ()):
            tensor = self._captures.get((number, index))
            if tensor is not None and grad is not None:
                self._found_terms.setdefault(tensor, []).append(((number, index), grad))

    def _call(self, stage: Stage) -> dict[Slot, Tensor]:
        """Run what is not stepped; return the gradients captured at sinks and inputs."""
        inflow = {
            (number, index): grad
            for number in stage.called
            for index, grad in self._take_sums(number).items()
        }
        if not inflow:
            return {}
        inner = [self._graph.nodes[number] for number in stage.called]
        inner = [node for node in inner if not is_sink(node)]
        calls.check_not_freed(inner)
        if not stage.is_order_free:
            calls.set_order(inner)
        slots = self._captured_slots(stage)
        with self._watched(inner):
            found = calls.call(
                [self._edge(slot) for slot in inflow],
                list(inflow.values()),
                [self._edge(slot) for slot in slots],
                retain_graph=self._retain_graph,
            )
        return {slot: grad for slot, grad in zip(slots, found, strict=True) if grad is not None}

    def _watched(self, nodes: Sequence[Node]) -> AbstractContextManager[None]:
        if self._check_nan is None:
            return nullcontext()
        return anomaly.watched(nodes, look_for_nan=self._check_nan)

    def _captured_slots(self, stage: Stage) -> list[Slot]:
        slots: dict[Slot, None] = dict.fromkeys((number, 0) for number in stage.sinks)
        if self._captures:
            called = set(stage.called)
            slots |= dict.fromkeys(slot for slot in self._captures if slot[0] in called)
        return list(slots)

    def _edge(self, slot: Slot) -> GradientEdge:
        return GradientEdge(self._graph.nodes[slot[0]], slot[1])

    # --- sums ------------------------------------------------------------------------------------

    def _add(self, slot: Slot, term: Term) -> None:
        """Keep a term until the node that it flows into runs, or the pass is complete."""
        number, index = slot
        leaf = leaf_of(self._graph.nodes[number])
        if leaf is None or has_tensor_hooks(leaf):
            self._waiting.setdefault(number, {}).setdefault(index, []).append(term)
        elif self._all_leaves or slot in self._captures:
            self._found_terms.setdefault(leaf, []).append(term)

    def _take_sums(self, number: int) -> dict[int, Tensor]:
        """Return what has flowed into a node whose stage runs now, by input."""
        waiting = self._waiting.pop(number, {})
        return {index: _sum(terms) for index, terms in sorted(waiting.items())}


def _sum(terms: list[Term]) -> Tensor:
    """Return the sum of `terms` in the order of their places; none of them is changed."""
    terms.sort(key=itemgetter(0))
    total = terms[0][1]
    for _, grad in terms[1:]:
        total = added(total, grad)
    return total
