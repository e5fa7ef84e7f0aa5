"""One worker's part of a pass against torch's own engine in one process, gradients in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tests.unit.autograd.graphs import CONTEXT, SHAPE, Graph, build
from zmq_autograd.autograd import calls, stages
from zmq_autograd.autograd.functions import ReceiveFunction, SendFunction
from zmq_autograd.autograd.local_pass import LocalPass, Root, Wanted, walk_from
from zmq_autograd.errors import ContextError

Grads = Sequence[Tensor | None]


def planned(
    roots: Sequence[Root], wanted: Wanted | None = None, *, retain_graph: bool = False
) -> LocalPass:
    return LocalPass(
        walk_from(roots), CONTEXT, roots, wanted or Wanted(), retain_graph=retain_graph
    )


def expected(graph: Graph, grads: Grads) -> list[Tensor | None]:
    """Return the gradients of the leaves as one process computes them."""
    pairs = [
        (output, grad)
        for output, grad in zip(graph.outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    if pairs:
        outputs, defined = zip(*pairs, strict=True)
        torch.autograd.backward(outputs, defined)
    return [leaf.grad for leaf in graph.leaves]


def found(graph: Graph, grads: Grads, rng: random.Random) -> list[Tensor | None]:
    """Return the gradients of leaves, then of received tensors; roots are resolved in any order."""
    roots = [Root(SendFunction.of(n, None, [t]).edges) for n, t in enumerate(graph.outputs)]
    local = planned(roots)
    emitted: dict[ReceiveFunction, Tensor | None] = {}
    for root in rng.sample(range(len(roots)), len(roots)):
        local.resolve(root, None if grads[root] is None else [grads[root]])
        if rng.random() < 0.7:
            emit(local, emitted)
    emit(local, emitted)
    assert local.is_complete
    assert set(local.receives) == set(emitted)
    gradients = local.gradients
    return [
        *(gradients.get(leaf) for leaf in graph.leaves),
        *(emitted.get(receive) for receive in graph.receives),
    ]


def emit(local: LocalPass, emitted: dict[ReceiveFunction, Tensor | None]) -> None:
    for receive, grads in local.run():
        assert receive not in emitted
        (emitted[receive],) = grads


def same(given: Tensor | None, wanted: Tensor | None) -> None:
    if wanted is None or given is None:
        # What only undefined gradients reach gets none here, and zeros from a custom Function.
        assert not any(t is not None and t.any() for t in (given, wanted))
    else:
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-12)


def by_kind(graph: Graph, whole: Graph, grads: list[Tensor | None]) -> list[Tensor | None]:
    """Return gradients of the whole graph's leaves in the order of `found`."""
    plain = [leaf for leaf in whole.leaves if any(torch.equal(leaf, own) for own in graph.leaves)]
    others = [leaf for leaf in whole.leaves if not any(leaf is p for p in plain)]
    place = {id(leaf): grad for leaf, grad in zip(whole.leaves, grads, strict=True)}
    return [place[id(leaf)] for leaf in (*plain, *others)]


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32), st.data())
def test_a_pass_is_exact_in_any_order(seed: int, order: int, data: st.DataObject) -> None:
    whole = build(seed, receives=False)
    values = torch.Generator().manual_seed(seed + 1)
    grads = [
        torch.randn(SHAPE, dtype=torch.float64, generator=values)
        if data.draw(st.sampled_from([True, True, True, False]))
        else None
        for _ in whole.outputs
    ]
    wanted = expected(whole, grads)
    runs = []
    for run in range(2):
        graph = build(seed, receives=True)
        runs.append(found(graph, grads, random.Random(order + run)))
        for got, right in zip(runs[-1], by_kind(graph, whole, wanted), strict=True):
            same(got, right)
        assert graph.counts == whole.counts, "hooks and Functions run as often as in one process"
    for first, second in zip(*runs, strict=True):
        assert (first is None) == (second is None)
        assert first is None or second is None or torch.equal(first, second), "bitwise the same"


def test_what_leads_out_of_a_stage_is_stepped_and_the_rest_is_called() -> None:
    leaf = torch.ones(2, requires_grad=True)
    inner = leaf * 2
    late = inner.sin()
    graph = planned([Root([get_gradient_edge(late)]), Root([get_gradient_edge(inner)])])
    first, second = graph._stages
    assert [len(first.stepped), len(first.called)] == [1, 0]
    assert [len(second.stepped), len(second.called)] == [0, 2]


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_second_pass_over_freed_nodes_raises_as_in_torch(retain_graph: bool) -> None:
    """Nodes that were stepped keep what they saved, and yet must not run again."""
    leaf = torch.ones(2, requires_grad=True)
    inner = leaf * 2
    outputs = [inner.sin(), inner]
    roots = [Root([get_gradient_edge(output)]) for output in outputs]

    def run() -> dict[Tensor, Tensor]:
        local = planned(roots, retain_graph=retain_graph)
        for root in range(2):
            local.resolve(root, [torch.ones(2)])
            local.run()
        return local.gradients

    first = run()
    if retain_graph:
        assert torch.equal(run()[leaf], first[leaf])
    else:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            run()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            calls.check_not_freed([get_gradient_edge(outputs[0]).node])


def test_a_leaf_may_be_captured_in_parts_unless_a_hook_would_see_them() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert stages._may_be_captured_in_parts(get_gradient_edge(leaf).node)
    handle = leaf.register_hook(lambda grad: grad * 2)  # type: ignore[no-untyped-call]
    assert not stages._may_be_captured_in_parts(get_gradient_edge(leaf).node)
    handle.remove()
    assert stages._may_be_captured_in_parts(get_gradient_edge(leaf).node)


def test_the_order_of_a_sum_does_not_depend_on_sequence_numbers() -> None:
    """They count per thread, so those of one graph may stand in any order from run to run."""
    results = set()
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        leaf = torch.tensor([1.0], requires_grad=True)
        terms = [leaf * factor for factor in (1e8, 1.0, -1e8, 3.0)]
        total = terms[0] + terms[1] + terms[2] + terms[3]
        for term, number in zip(terms, order, strict=True):
            term.grad_fn._set_sequence_nr(number)  # type: ignore[union-attr]
        local = planned([Root([get_gradient_edge(total)])])
        local.resolve(0, [torch.ones(1)])
        local.run()
        results.add(local.gradients[leaf].item())
    assert len(results) == 1


def test_what_was_received_in_another_context_says_so() -> None:
    tensor = torch.ones(2, requires_grad=True)
    ReceiveFunction(1, None, CONTEXT + 1).attach([tensor])
    edges = [get_gradient_edge(tensor * 2)]
    with pytest.raises(ContextError, match=f"received in context {CONTEXT + 1}"):
        planned([Root(edges)])


@pytest.mark.parametrize("place", ["leaf", "inner", "received"])
def test_inputs_get_the_complete_gradient(place: str) -> None:
    received = torch.ones(2, requires_grad=True)
    ReceiveFunction(1, None, CONTEXT).attach([received])
    leaf = torch.ones(2, requires_grad=True)
    inner = leaf * received
    output = inner.sin() + inner * 3
    tensor = {"leaf": leaf, "inner": inner, "received": received}[place]
    local = planned(
        [Root([get_gradient_edge(output)]), Root([get_gradient_edge(inner)])],
        Wanted(leaves=False, inputs=[tensor]),
    )
    local.resolve(1, [torch.full((2,), 5.0)])
    local.run()
    local.resolve(0, [torch.ones(2)])
    ((_, (emitted,)),) = local.run()
    full = torch.ones(2).cos() + 3 + 5
    torch.testing.assert_close(local.gradients, {tensor: full})
    torch.testing.assert_close(emitted, full)
