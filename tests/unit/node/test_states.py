"""States in messages of bounded size: nothing lost, nothing too large, what arrives checked."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from zmq_autograd.errors import ProtocolError
from zmq_autograd.node.states import checked_items, in_pieces, items_of, size_of, state_of
from zmq_autograd.wire import DEFAULT_LIMITS, Limits, encode
from zmq_autograd.wire.limits import KIB, MAX_CONTAINERS
from zmq_autograd.wire.messages import ForwardRequest, ForwardResponse


def state(count: int, *shape: int, name: str = "layer") -> OrderedDict[str, Any]:
    """Return a state dict of so many tensors, with metadata."""
    found = OrderedDict((f"{name}.{n}.weight", torch.full(shape, n)) for n in range(count))
    found._metadata = OrderedDict((f"{name}.{n}", {"version": n}) for n in range(count))  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    ("count", "shape", "name", "limits", "expected"),
    [
        (0, (1,), "layer", DEFAULT_LIMITS, 0),
        (10, (1,), "layer", DEFAULT_LIMITS, 1),
        (10, (1, KIB), "layer", Limits(message_bytes=32 * KIB), 5),
        (40, (1,), "layer", Limits(frames=20), 4),
        (300, (1,) * 20, "layer", Limits(header_bytes=16 * KIB), 20),
        (300, (1,), "n" * 700, Limits(header_bytes=16 * KIB), 75),
        (2000, (0,), "layer", Limits(header_bytes=10**9), 4),
    ],
)
def test_pieces_hold_all_of_it_and_fit_into_messages(
    count: int, shape: tuple[int, ...], name: str, limits: Limits, expected: int
) -> None:
    whole = state(count, *shape, name=name)
    pieces = in_pieces(items_of(whole), limits)
    assert expected <= len(pieces) <= 2 * expected
    for piece in pieces:
        for message in (ForwardResponse((piece, None, 2)), ForwardRequest("f", (piece, None))):
            frames = [memoryview(frame).nbytes for frame in encode(message)]
            assert frames[0] <= limits.header_bytes
            assert len(frames) - 1 <= limits.frames
            assert sum(frames) <= limits.message_bytes
        assert len(piece) * 4 <= MAX_CONTAINERS
    again = state_of(item for piece in pieces for item in piece)
    assert list(again) == list(whole)
    assert all(again[key] is whole[key] for key in whole)
    assert again._metadata == whole._metadata  # type: ignore[attr-defined]


def test_what_is_too_large_for_any_message_has_one_of_its_own() -> None:
    whole = [
        (False, "a", torch.ones(1)),
        (False, "b", torch.ones(100)),
        (False, "c", [torch.ones(100), "text"]),
        (False, "d", torch.ones(1)),
    ]
    pieces = in_pieces(whole, Limits(message_bytes=200))
    assert [[key for _, key, _ in piece] for piece in pieces] == [["a"], ["b"], ["c"], ["d"]]


def test_sizes_count_all_tensors_and_of_sparse_ones_what_travels() -> None:
    indices, values = torch.tensor([[0, 7]]), torch.ones(2)
    sparse = torch.sparse_coo_tensor(indices, values, (1000,), check_invariants=True)
    items: list[Any] = [
        (False, "a", sparse),
        (False, "b", {"c": [torch.ones(3), 4]}),
        (True, "", 1),
    ]
    assert size_of(items) == (2 * 8 + 2 * 4) + 3 * 4


@pytest.mark.parametrize(
    "value", [None, 3, "state", {}, (), [3], [(1, "key", 2)], [(False, b"k", 3)]]
)
def test_what_is_no_list_of_items_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError, match="state"):
        checked_items(value)
    assert checked_items([(False, "key", value)]) == [(False, "key", value)]
