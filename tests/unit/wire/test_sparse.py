"""Sparse (COO) tensors to frames and back: their bytes, their kinds, and what is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.unit.wire.wire_samples import decoded_or_refused, same, sparse_tensors
from zmq_autograd.errors import ProtocolError, SerializationError
from zmq_autograd.wire import Limits, decode, encode
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    PropagateGradientsRequest,
    StatusResponse,
)

METADATA = AutogradMetadata(1, 2)

INDICES = torch.tensor([[0, 2], [1, 0]])
VALUES = torch.tensor([1.0, 2.0])


def coo(
    indices: Any = INDICES,
    values: Any = VALUES,
    shape: Any = (3, 2),
    *,
    coalesced: bool = False,
) -> Tensor:
    return torch.sparse_coo_tensor(
        indices, values, shape, is_coalesced=coalesced, check_invariants=False
    )


def received(value: Any) -> Any:
    message = decode([bytes(frame) for frame in encode(StatusResponse(value))])
    assert isinstance(message, StatusResponse)
    return message.status


def received_gradients(*grads: Tensor | None) -> list[Tensor | None]:
    message = decode(encode(PropagateGradientsRequest(METADATA, list(grads))))
    assert isinstance(message, PropagateGradientsRequest)
    return list(message.grads)


# --- bytes ---------------------------------------------------------------------------------------

HEADER = {
    "type": 0x49,
    "status": {"sparse": [0, 1, [3, 2], True]},
    "tensors": [["int64", [2, 2], False], ["float32", [2], True]],
}
FRAMES = [
    bytes.fromhex("0000000000000000 0200000000000000 0100000000000000 0000000000000000"),
    bytes.fromhex("0000803f 00000040"),
]


def test_the_bytes_of_a_sparse_value_both_ways() -> None:
    tensor = coo(coalesced=True).requires_grad_()
    header, *frames = encode(StatusResponse(tensor))
    assert bytes(header) == msgpack.packb(HEADER)
    assert [bytes(frame) for frame in frames] == FRAMES
    message = decode([msgpack.packb(HEADER), *FRAMES])
    assert same(message, StatusResponse(tensor))


def test_the_bytes_of_a_sparse_gradient_both_ways() -> None:
    grads = [torch.ones(1), coo().requires_grad_(), None]
    header, *frames = encode(PropagateGradientsRequest(METADATA, grads))
    fields = msgpack.unpackb(header)
    assert fields["grads"] == [0, [1, 2, [3, 2], False], None]
    assert fields["tensors"] == [
        ["float32", [1], False],
        ["int64", [2, 2], False],
        ["float32", [2], False],
    ]
    assert [bytes(frame) for frame in frames] == [bytes.fromhex("0000803f"), *FRAMES]
    assert same(received_gradients(*grads), [grads[0], coo(), None])


def test_a_dense_gradient_stands_there_as_before() -> None:
    header = msgpack.unpackb(encode(PropagateGradientsRequest(METADATA, [torch.ones(1), None]))[0])
    assert header["grads"] == [0, None]


# --- kinds ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(sparse_tensors())
def test_every_sparse_tensor_arrives_as_it_was_sent(tensor: Tensor) -> None:
    assert same(received(tensor), tensor)
    assert same(received_gradients(tensor), [tensor.detach()])


KINDS = {
    "without elements": lambda: coo(torch.empty(2, 0, dtype=torch.int64), torch.empty(0)),
    "empty dimension": lambda: coo(
        torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (0, 2), coalesced=True
    ),
    "dense dimensions": lambda: coo(INDICES, torch.ones(2, 4), (3, 2, 4)),
    "no sparse dimensions": lambda: coo(torch.empty(0, 3, dtype=torch.int64), torch.ones(3), ()),
    "not unique": lambda: coo([[1, 1], [0, 0]]),
    "transposed": lambda: coo().t(),
    "result of an operation": lambda: coo().requires_grad_() * 2,
    "parameter": lambda: torch.nn.Parameter(coo()),
    "values of stride 0": lambda: coo(INDICES, torch.ones(1).expand(2)),
    "conjugate": lambda: coo(INDICES, torch.tensor([1j, 2]).conj()),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_kinds_of_sparse_tensors(make: Any) -> None:
    tensor = make()
    assert same(received(tensor), tensor)


def test_the_same_object_arrives_as_one_and_owns_its_memory() -> None:
    tensor = coo()
    first, (again, other) = received([tensor, (tensor, coo())])
    assert first is again
    assert first is not other
    first._values().zero_()
    assert other._values().tolist() == tensor._values().tolist() == [1, 2]


def test_large_frames_are_taken_over_without_a_copy() -> None:
    count = 100_000
    tensor = coo(torch.arange(count)[None], torch.ones(count), (count,))
    frames = [bytearray(frame) for frame in encode(StatusResponse(tensor))]
    message = decode(frames, adopt=True)
    assert isinstance(message, StatusResponse)
    assert same(message.status, tensor)
    frames[2][:4] = bytes(4)
    assert message.status._values()[0] == 0


# --- what a user cannot send ---------------------------------------------------------------------

WRONG = {
    "beyond the end": (lambda: coo([[0, 3], [1, 0]]), "an index is out of bounds"),
    "negative": (lambda: coo([[0, -1], [1, 0]]), "an index is out of bounds"),
    "not coalesced": (lambda: coo([[1, 0], [0, 0]], coalesced=True), "not in order"),
    "twice": (lambda: coo([[1, 1], [0, 0]], coalesced=True), "not in order"),
}


@pytest.mark.parametrize(("make", "text"), WRONG.values(), ids=WRONG)
def test_a_sparse_tensor_that_lies_is_refused_here(make: Any, text: str) -> None:
    for message in (StatusResponse(make()), PropagateGradientsRequest(METADATA, [make()])):
        with pytest.raises(SerializationError, match=text):
            encode(message)


# --- what a peer cannot send ---------------------------------------------------------------------

LIMITS = Limits(message_bytes=2**20)


def packed(*columns: tuple[int, ...]) -> bytes:
    """Return the frame of indices with these columns."""
    return b"".join(
        i.to_bytes(8, "little", signed=True) for row in zip(*columns, strict=True) for i in row
    )


def refused(header: dict[str, Any], frames: list[bytes]) -> str:
    whole = [msgpack.packb(header), *frames]
    assert decoded_or_refused(whole, LIMITS) is None
    with pytest.raises(ProtocolError) as caught:
        decode(whole, LIMITS)
    return str(caught.value)


SPECS = [["int64", [2, 2], False], ["float32", [2], False]]
BODIES: dict[str, tuple[Any, str]] = {
    "no list": (0, "expected [indices, values, shape, is_coalesced], got 0"),
    "too short": ([0, 1, [3, 2]], "expected [indices, values, shape, is_coalesced]"),
    "no such frame": ([0, 2, [3, 2], False], "expected a tensor index below 2, got 2"),
    "bool as index": ([False, 1, [3, 2], False], "expected a tensor index below 2"),
    "one frame for both": ([0, 0, [3, 2], False], "frame 0 is used by two tensors"),
    "the other way round": ([1, 0, [3, 2], False], "expected indices of int64"),
    "shape is no list": ([0, 1, 6, False], "expected up to 64 dimensions"),
    "negative dimension": ([0, 1, [3, -2], False], "expected a dimension"),
    "bool as dimension": ([0, 1, [3, True], False], "expected a dimension"),
    "too few dimensions": ([0, 1, [3], False], "2 sparse dimensions and values of another shape"),
    "too many dimensions": ([0, 1, [3, 2, 1], False], "2 sparse dimensions and values of another"),
    "int as is_coalesced": ([0, 1, [3, 2], 1], "expected a bool for is_coalesced, got 1"),
    "index beyond the end": ([0, 1, [2, 2], False], "an index is out of bounds"),
    "empty dimension": ([0, 1, [3, 0], False], "an index is out of bounds"),
    "dense size": ([0, 1, [3, 2**40], False], "would pass the limit of 1048576"),
    "dense size behind a 0": ([0, 1, [0, 2**40], False], "would pass the limit"),
}


@pytest.mark.parametrize(("body", "text"), BODIES.values(), ids=BODIES)
def test_what_claims_to_be_a_sparse_value_is_refused(body: Any, text: str) -> None:
    header = {"type": 0x49, "status": {"sparse": body}, "tensors": SPECS}
    assert text in refused(header, FRAMES)


PARTS: dict[str, tuple[list[Any], list[bytes], list[int], str]] = {
    "int32 indices": ([["int32", [1, 1], False]], [bytes(4)], [3], "expected indices of int64"),
    "indices require grad": ([["float64", [1, 1], True]], [bytes(8)], [3], "indices of int64"),
    "indices of one dimension": ([["int64", [1], False]], [bytes(8)], [3], "indices of 1 and"),
    "another number": ([["int64", [1, 2], False]], [bytes(16)], [3], "2 indices for 1 values"),
    "negative": ([["int64", [1, 1], False]], [packed((-1,))], [3], "out of bounds"),
    "smallest": ([["int64", [1, 1], False]], [packed((-(2**63),))], [3], "out of bounds"),
    "largest": ([["int64", [1, 1], False]], [packed((2**63 - 1,))], [3], "out of bounds"),
}


@pytest.mark.parametrize(("specs", "frames", "shape", "text"), PARTS.values(), ids=PARTS)
def test_indices_that_are_none_are_refused(
    specs: list[Any], frames: list[bytes], shape: list[int], text: str
) -> None:
    specs = [*specs, ["float32", [1], False]]
    header = {"type": 0x49, "status": {"sparse": [0, 1, shape, False]}, "tensors": specs}
    assert text in refused(header, [*frames, bytes(4)])


@pytest.mark.parametrize("columns", [[(1, 0), (0, 1)], [(0, 1), (0, 0)], [(1, 1), (1, 1)]])
def test_a_lie_about_order_is_refused(columns: list[tuple[int, ...]]) -> None:
    header = {"type": 0x49, "status": {"sparse": [0, 1, [3, 2], True]}, "tensors": SPECS}
    assert "not in order or not unique" in refused(header, [packed(*columns), FRAMES[1]])


def test_several_values_of_a_tensor_without_sparse_dimensions_are_not_coalesced() -> None:
    specs = [["int64", [0, 2], False], ["float32", [2], False]]
    header = {"type": 0x49, "status": {"sparse": [0, 1, [], True]}, "tensors": specs}
    assert "several values of one element" in refused(header, [b"", FRAMES[1]])


@pytest.mark.parametrize(
    "status",
    [
        [{"tensor": 0}, {"sparse": [0, 1, [3, 2], False]}],
        [{"sparse": [0, 1, [3, 2], False]}, {"tensor": 0}],
        [{"sparse": [0, 1, [3, 2], False]}, {"tensor": 1}],
        [{"sparse": [0, 1, [3, 2], False]}, {"sparse": [0, 1, [4, 2], False]}],
        [{"sparse": [0, 1, [3, 2], False]}, {"sparse": [0, 1, [3, 2], True]}],
    ],
)
def test_nobody_else_gets_the_memory_of_a_sparse_tensors_indices(status: Any) -> None:
    """Whoever can change them after they were checked has torch write to anywhere."""
    refused({"type": 0x49, "status": status, "tensors": SPECS}, FRAMES)


GRADIENTS: dict[str, tuple[list[Any], str]] = {
    "out of order": ([[1, 0, [3, 2], False]], "the tensors in order"),
    "twice": ([[0, 1, [3, 2], False], [0, 1, [3, 2], False]], "the tensors in order"),
    "empty": ([[]], "expected [indices, values, shape, is_coalesced]"),
    "nil inside": ([[None, 0, [3, 2], False]], "the tensors in order"),
    "index beyond the end": ([[0, 1, [2, 2], False]], "an index is out of bounds"),
    "too many elements": ([[0, 1, [2**40, 2**40], False]], "more than 281474976710656 elements"),
}


@pytest.mark.parametrize(("grads", "text"), GRADIENTS.values(), ids=GRADIENTS)
def test_what_claims_to_be_a_sparse_gradient_is_refused(grads: list[Any], text: str) -> None:
    header = msgpack.unpackb(encode(PropagateGradientsRequest(METADATA, []))[0])
    assert text in refused(header | {"grads": grads, "tensors": SPECS}, FRAMES)


def test_a_gradient_that_requires_grad_is_refused() -> None:
    header = msgpack.unpackb(encode(PropagateGradientsRequest(METADATA, []))[0])
    header |= {"grads": [[0, 1, [3, 2], False]], "tensors": HEADER["tensors"]}
    assert "gradients that do not require grad" in refused(header, FRAMES)


def test_a_gradient_may_have_the_shape_of_a_large_table() -> None:
    """Its receiver has that table, or refuses it by its shape; it is no claim to be believed."""
    header = msgpack.unpackb(encode(PropagateGradientsRequest(METADATA, []))[0])
    header |= {"grads": [[0, 1, [2**40, 2], False]], "tensors": SPECS}
    message = decode([msgpack.packb(header), *FRAMES], LIMITS)
    assert isinstance(message, PropagateGradientsRequest)
    (grad,) = message.grads
    assert grad is not None
    assert grad.shape == (2**40, 2)
