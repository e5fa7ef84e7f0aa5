"""Tensors to raw frames and back: every dtype, shape and layout, memory, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.wire.wire_samples import elements_of, frames_of, received, same, through
from zmq_autograd.wire import decode, encode
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardRequest,
    PropagateGradientsRequest,
    StatusResponse,
)
from zmq_autograd.wire.tensors import ADOPT_BYTES, DTYPES

METADATA = AutogradMetadata(1, 2)
FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_floating_point or dtype.is_complex]


def filled(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor whose elements all have different bytes, or alternate if they are bools."""
    count = int(torch.Size(shape).numel())
    pattern = range(count * dtype.itemsize)
    data = bytearray(i & 1 if dtype is torch.bool else i % 251 for i in pattern)
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "zero-dim": lambda dtype: filled(dtype),
    "empty": lambda dtype: filled(dtype, 0),
    "empty of two dimensions": lambda dtype: filled(dtype, 0, 5),
    "one element": lambda dtype: filled(dtype, 1),
    "vector": lambda dtype: filled(dtype, 7),
    "matrix": lambda dtype: filled(dtype, 3, 4),
    "four dimensions": lambda dtype: filled(dtype, 2, 1, 3, 2),
    "transposed": lambda dtype: filled(dtype, 3, 4).t(),
    "strided": lambda dtype: filled(dtype, 9)[1::2],
    "columns": lambda dtype: filled(dtype, 3, 4)[:, 1:3],
    "expanded": lambda dtype: filled(dtype, 1).expand(5),
    "expanded zero-dim": lambda dtype: filled(dtype).expand(2, 3),
    "diagonal": lambda dtype: filled(dtype, 3, 3).diagonal(),
    "row of a matrix": lambda dtype: filled(dtype, 3, 4)[2],
    "inference": lambda dtype: inference(dtype),
}


def inference(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode():
        return filled(dtype, 4).clone()


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_layout_arrives_bit_for_bit(
    name: str, make: Callable[[torch.dtype], Tensor]
) -> None:
    tensor = make(DTYPES[name])
    frames = frames_of(tensor)
    assert bytes(frames[1]) == elements_of(tensor)
    arrived = received(frames)[0]
    assert same(arrived, tensor)
    assert arrived.is_contiguous()
    assert not arrived.is_inference()
    assert not arrived.is_conj()
    assert not arrived.is_neg()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_lazily_conjugated_negated_and_zero_tensors_arrive_as_their_values(
    dtype: torch.dtype,
) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j], dtype=dtype)
    for lazy in (tensor.conj(), tensor.conj().imag, tensor.real, torch._neg_view(tensor)):
        assert torch.equal(through(lazy), lazy)
    zeros = torch._efficientzerotensor((2, 3), dtype=dtype)
    assert torch.equal(through(zeros), torch.zeros(2, 3, dtype=dtype))


@pytest.fixture
def warn_always() -> Iterator[None]:
    """Make torch give each of its warnings every time, not once in a process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("warn_always")
def test_complex32_travels_without_torchs_warning_that_it_is_experimental() -> None:
    matrix = torch.zeros(16, dtype=torch.uint8).view(torch.complex32).view(2, 2)
    with pytest.warns(UserWarning, match="ComplexHalf support is experimental"):
        matrix.t().contiguous()
    for tensor in (matrix, matrix.conj(), matrix.conj().imag, matrix.t(), matrix[0].expand(2, 2)):
        assert through(tensor).shape == (2, 2)


# --- the flag ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOATS)
def test_requires_grad_travels_with_a_value_and_makes_a_leaf(name: str) -> None:
    leaf = filled(DTYPES[name], 3).detach().requires_grad_()
    arrived = through(leaf)
    assert arrived.requires_grad
    assert arrived.is_leaf
    inner = through(leaf.view(3))
    assert inner.requires_grad
    assert inner.is_leaf


def test_a_gradient_arrives_without_the_flag() -> None:
    grad = torch.ones(2, requires_grad=True)
    message = decode(encode(PropagateGradientsRequest(METADATA, [grad])))
    assert isinstance(message, PropagateGradientsRequest)
    assert message.grads[0] is not None
    assert not message.grads[0].requires_grad


class Tagged(Tensor):
    """A subclass that keeps plain memory."""


class Meddling(Tensor):
    """A subclass whose every operation fails."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("called")


@pytest.mark.parametrize("kind", [Tagged, Meddling])
def test_a_subclass_arrives_as_a_plain_tensor(kind: type[Tensor]) -> None:
    source = torch.arange(3.0)
    tensor = source.as_subclass(kind)
    arrived = through(tensor)
    assert type(arrived) is Tensor
    assert torch.equal(arrived, source)
    encode(PropagateGradientsRequest(METADATA, [tensor]))


def test_a_parameter_arrives_as_a_tensor_that_requires_grad() -> None:
    arrived = through(torch.nn.Parameter(torch.ones(2)))
    assert type(arrived) is Tensor
    assert arrived.requires_grad


# --- what travels --------------------------------------------------------------------------------


def test_only_the_view_travels() -> None:
    large = torch.zeros(1_000_000)
    frames = frames_of(large[10:13])
    assert [memoryview(frame).nbytes for frame in frames[1:]] == [12]
    assert len(frames[0]) < 100


def test_an_undefined_gradient_takes_no_frame() -> None:
    frames = encode(PropagateGradientsRequest(METADATA, [None, torch.ones(1), None]))
    assert len(frames) == 2
    message = decode(frames)
    assert isinstance(message, PropagateGradientsRequest)
    assert [grad is None for grad in message.grads] == [True, False, True]
    assert len(encode(PropagateGradientsRequest(METADATA, [None, None]))) == 1
    assert len(encode(PropagateGradientsRequest(METADATA, []))) == 1


def test_a_thousand_gradients_fit_into_one_message() -> None:
    grads = [None if i % 10 == 3 else torch.full((i % 5,), float(i)) for i in range(1000)]
    frames = encode(PropagateGradientsRequest(METADATA, grads))
    assert len(frames) == 1 + 900
    message = decode(frames)
    assert isinstance(message, PropagateGradientsRequest)
    assert same(list(message.grads), grads)


def test_the_same_tensor_twice_is_one_among_values_and_two_among_gradients() -> None:
    tensor = torch.ones(2)
    frames = encode(ForwardRequest("f", (tensor, [tensor]), {"a": tensor}))
    assert len(frames) == 2
    call = decode(frames)
    assert isinstance(call, ForwardRequest)
    assert call.args[0] is call.args[1][0] is call.kwargs["a"]

    frames = encode(PropagateGradientsRequest(METADATA, [tensor, tensor]))
    assert len(frames) == 3
    message = decode(frames)
    assert isinstance(message, PropagateGradientsRequest)
    left, right = message.grads
    assert left is not None
    assert right is not None
    left.zero_()
    assert right.tolist() == [1.0, 1.0]


class MadeOnDemand(dict[str, Any]):
    """A dict that makes its tensors when asked, and keeps none of them."""

    def items(self) -> Any:
        return ((str(i), torch.full((1,), float(i)).expand(2)) for i in range(50))


def test_tensors_that_nobody_keeps_are_not_taken_for_each_other() -> None:
    message = decode(encode(StatusResponse(MadeOnDemand())))
    assert isinstance(message, StatusResponse)
    assert [tensor[0].item() for tensor in message.status.values()] == [float(i) for i in range(50)]


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("adopt", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 4 * ADOPT_BYTES])
def test_received_tensors_are_writable_aligned_and_contiguous(
    kind: type, adopt: bool, count: int
) -> None:
    source = torch.arange(count, dtype=torch.float64)
    (tensor,) = received([kind(bytes(frame)) for frame in frames_of(source)], adopt=adopt)
    adopted = adopt and kind is bytearray and source.nbytes >= ADOPT_BYTES
    assert tensor.data_ptr() % (8 if adopted else 64) == 0
    assert tensor.is_contiguous()
    assert not tensor._is_view()
    tensor += 1
    assert torch.equal(tensor, source + 1)


@pytest.mark.parametrize("adopt", [False, True])
@pytest.mark.parametrize("nbytes", [ADOPT_BYTES - 1, ADOPT_BYTES])
def test_only_large_writable_frames_given_away_become_memory(nbytes: int, adopt: bool) -> None:
    header, frame = frames_of(torch.zeros(nbytes, dtype=torch.uint8))
    writable = bytearray(frame)
    (tensor,) = received([header, writable], adopt=adopt)
    writable[0] = 7
    assert tensor[0].item() == (7 if adopt and nbytes >= ADOPT_BYTES else 0)
    (tensor,) = received([header, memoryview(writable).toreadonly()], adopt=True)
    writable[0] = 9
    assert tensor[0].item() == 7


def test_a_frame_that_is_not_aligned_is_copied_rather_than_adopted() -> None:
    source = torch.arange(ADOPT_BYTES, dtype=torch.float64)
    header, frame = frames_of(source)
    shifted = bytearray(1) + bytearray(frame)
    (tensor,) = received([header, memoryview(shifted)[1:]], adopt=True)
    assert tensor.data_ptr() % 8 == 0
    assert torch.equal(tensor, source)


def test_an_adopted_frame_lives_as_long_as_its_tensor() -> None:
    source = torch.arange(ADOPT_BYTES, dtype=torch.float32)
    (tensor,) = received([bytearray(frame) for frame in frames_of(source)], adopt=True)
    gc.collect()
    assert torch.equal(tensor, source)


def test_a_read_only_frame_is_private_and_a_writable_one_is_the_tensor() -> None:
    plain = torch.zeros(4, 4)
    for tensor, private in [(plain, False), (plain[1], False), (plain.t(), True)]:
        frame = memoryview(frames_of(tensor)[1])
        before = bytes(frame)
        plain.add_(1)
        assert frame.readonly is private
        assert (bytes(frame) == before) is private


def test_a_frame_keeps_the_memory_of_its_tensor_alive_and_no_longer() -> None:
    tensor = torch.arange(1000.0)
    expected = elements_of(tensor)
    storage = weakref.ref(tensor)
    frames = frames_of(tensor)
    del tensor
    gc.collect()
    assert bytes(frames[1]) == expected
    assert storage() is None or len(frames) == 2
    del frames
    gc.collect()
    assert storage() is None


def test_frames_have_the_length_of_the_tensor() -> None:
    frame = memoryview(frames_of(torch.arange(6, dtype=torch.int16))[1])
    assert (frame.nbytes, frame.itemsize, frame.format, len(frame)) == (12, 1, "B", 12)


# --- torch's modes on the thread that decodes -----------------------------------------------------


@pytest.mark.parametrize("count", [2, ADOPT_BYTES])
def test_what_is_received_does_not_depend_on_the_modes_of_the_thread(count: int) -> None:
    frames = frames_of(torch.ones(count), torch.ones(count, requires_grad=True))
    for mode in (torch.inference_mode(), torch.no_grad(), torch.device("meta")):
        with mode:
            plain, leaf = received([bytearray(frame) for frame in frames], adopt=True)
        assert (plain.device.type, leaf.device.type) == ("cpu", "cpu")
        assert not plain.is_inference()
        assert leaf.is_leaf
        weight = torch.full((count,), 3.0, requires_grad=True)
        plain.mul_(weight)  # forbidden for what was made in those modes, and for views of it
        (plain * leaf).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert leaf.grad[0].item() == 3.0
        assert weight.grad is not None


def test_a_zero_tensor_is_sent_from_the_cpu_whatever_the_default_device_is() -> None:
    zeros = torch._efficientzerotensor((2,))
    with torch.device("meta"):
        assert bytes(frames_of(zeros)[1]) == bytes(8)
