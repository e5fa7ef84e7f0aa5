"""Anomaly mode: the process's switch is lent and given back, and a pass watches its own nodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from zmq_autograd.autograd import anomaly
from zmq_autograd.autograd.anomaly import check_nan, recording, watched


def switch() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    before = switch()
    yield
    assert switch() == before
    torch.set_anomaly_enabled(False, True)


def negative() -> Tensor:
    return torch.tensor([-1.0], requires_grad=True)


def nodes_of(root: Tensor) -> list[Any]:
    nodes, waiting = [], [root.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and hasattr(node, "register_prehook"):
            nodes.append(node)
            waiting += [following for following, _ in node.next_functions]
    return nodes


@pytest.mark.parametrize("users", [None, False, True])
def test_the_switch_is_given_back_when_the_last_recording_ends(users: bool | None) -> None:
    torch.set_anomaly_enabled(users is not None, users is not False)
    before = switch()
    assert check_nan() is users
    with recording():
        assert switch() == (True, users is True)
        with recording():
            assert check_nan() is users
        assert switch() == (True, users is True)
    assert switch() == before
    torch.set_anomaly_enabled(False, True)


def test_recordings_of_several_threads_overlap() -> None:
    inside, leave = threading.Event(), threading.Event()

    def record() -> None:
        with recording():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=record)
    thread.start()
    assert inside.wait(10)
    with recording():
        leave.set()
        thread.join(10)
        assert switch() == (True, False)
    assert switch() == (False, True)


def test_the_calls_own_mode_counts_where_the_process_has_none() -> None:
    token = anomaly.of_the_call.set(True)
    try:
        assert check_nan() is True
        torch.set_anomaly_enabled(True, False)
        assert check_nan() is False
        torch.set_anomaly_enabled(False, True)
    finally:
        anomaly.of_the_call.reset(token)
    assert check_nan() is None


def test_another_ones_nan_do_not_raise_while_nodes_take_down_where_they_are_made() -> None:
    x = negative()
    with recording():
        x.sqrt().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.isnan().all()


def test_a_watched_node_that_makes_nan_raises_and_hooks_are_gone_afterwards() -> None:
    x = negative()
    with recording():
        root = x.sqrt() * 2
    for _ in range(2):
        with (
            pytest.raises(RuntimeError, match=r"SqrtBackward0.*nan values in its 0th") as caught,
            watched(nodes_of(root), look_for_nan=True),
        ):
            root.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        (note,) = caught.value.__notes__
        assert "root = x.sqrt() * 2" in note
    root.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


def test_nan_in_sparse_gradients_are_found() -> None:
    weight = torch.ones(4, 2, requires_grad=True)
    found = torch.nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True)
    with (
        pytest.raises(RuntimeError, match=r"EmbeddingBackward0.*nan values"),
        watched(nodes_of(found), look_for_nan=True),
    ):
        found.backward(torch.full((2, 2), torch.nan))  # type: ignore[no-untyped-call]


def test_what_raises_outside_of_the_nodes_gets_no_note() -> None:
    with (
        pytest.raises(ValueError, match="not a node") as caught,
        watched(nodes_of(negative().sqrt()), look_for_nan=False),
    ):
        raise ValueError("not a node")
    assert not hasattr(caught.value, "__notes__")
