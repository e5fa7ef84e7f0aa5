"""Tensors to raw frames and back: every dtype, shape and layout, memory, and what is refused."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.wire.wire_samples import elements_of, same
from zmq_autograd.errors import ProtocolError, SerializationError
from zmq_autograd.wire import Buffer, Limits, decode, encode
from zmq_autograd.wire.limits import MAX_DIMENSIONS, MAX_ELEMENTS
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardRequest,
    PropagateGradientsRequest,
    StatusResponse,
)
from zmq_autograd.wire.tensors import ADOPT_BYTES, DTYPES

METADATA = AutogradMetadata(1, 2)
FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_floating_point or dtype.is_complex]


def frames_of(*tensors: Any) -> list[Buffer]:
    return encode(StatusResponse(list(tensors)))


def received(frames: list[Buffer], *, adopt: bool = False) -> list[Tensor]:
    message = decode(frames, adopt=adopt)
    assert isinstance(message, StatusResponse)
    tensors: list[Tensor] = message.status
    return tensors


def through(tensor: Tensor) -> Tensor:
    return received(frames_of(tensor))[0]


def refused(spec: object, frame: Buffer = b"", limits: Limits | None = None) -> str:
    header = {"type": 0x49, "status": {"tensor": 0}, "tensors": [spec]}
    with pytest.raises(ProtocolError) as caught:
        decode([msgpack.packb(header), frame], limits or Limits())
    return str(caught.value)


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


# --- what cannot travel --------------------------------------------------------------------------


class Wrapper(Tensor):
    """A tensor that has others inside and no memory, as DTensor is."""

    @staticmethod
    def __new__(cls: type[Wrapper], inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        return made

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(2)


def freed(nbytes: int) -> Tensor:
    tensor = torch.ones(5)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


CANNOT_TRAVEL: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(2, device="meta"), "a meta tensor.*send plain tensors"),
    "wrapper": (lambda: Wrapper(torch.ones(2)), "a Wrapper cannot travel.*send plain tensors"),
    "fake": (fake, "a FakeTensor cannot travel"),
    "lazy": (torch.nn.UninitializedParameter, "an uninitialized parameter"),
    "lazy buffer": (torch.nn.UninitializedBuffer, "an uninitialized parameter"),
    "freed": (lambda: freed(0), "whose storage was freed"),
    "half freed": (lambda: freed(16), "whose storage was freed"),
    "bits": (lambda: torch.empty(2, dtype=torch.bits8), "dtype torch.bits8.*another dtype"),
    "65 dimensions": (lambda: torch.ones([1] * 65), "65 dimensions and 1 elements"),
    "too many elements": (lambda: torch.ones(1).expand(2**48 + 1), "281474976710657 elements"),
}


@pytest.mark.parametrize(("make", "text"), CANNOT_TRAVEL.values(), ids=CANNOT_TRAVEL)
def test_what_cannot_travel_says_why(make: Callable[[], Tensor], text: str) -> None:
    tensor = make()
    for message in (StatusResponse(tensor), PropagateGradientsRequest(METADATA, [tensor])):
        with pytest.raises(SerializationError, match=text) as caught:
            encode(message)
        assert isinstance(caught.value, TypeError)


@pytest.mark.filterwarnings("ignore")  # torch calls these kinds experimental or deprecated
def test_kinds_of_tensors_that_torch_warns_about_cannot_travel_either() -> None:
    for tensor, text in [
        (torch.eye(2).to_sparse_csr(), "send tensor.to_dense"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "dequantize"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
        (
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "NestedTensor cannot travel",
        ),
    ]:
        with pytest.raises(SerializationError, match=text):
            frames_of(tensor)


def test_tensors_inside_transforms_of_torch_func_cannot_travel() -> None:
    def send(tensor: Tensor) -> Tensor:
        with pytest.raises(SerializationError, match=r"a transform of torch\.func"):
            frames_of(tensor)
        return tensor.sum()

    torch.vmap(send)(torch.ones(3, 2))
    torch.func.grad(send)(torch.ones(3))
    torch.func.functionalize(send)(torch.ones(3))


def test_nothing_travels_while_a_mode_replaces_what_operations_return() -> None:
    tensor = torch.ones(2, 3).t()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(SerializationError, match="makes it a FakeTensor"),
    ):
        frames_of(tensor)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (None, "expected .dtype, shape, requires_grad."),
        (["float32", [0]], "expected .dtype, shape, requires_grad."),
        (["float32", [0], False, 1], "expected .dtype, shape, requires_grad."),
        (["float31", [0], False], "unknown dtype 'float31'"),
        (["quint8", [0], False], "unknown dtype"),
        ([["float32"], [0], False], "unknown dtype list"),
        ([None, [0], False], "unknown dtype"),
        (["float32", 0, False], "up to 64 dimensions"),
        (["float32", [0] * (MAX_DIMENSIONS + 1), False], "up to 64 dimensions"),
        (["float32", [-1], False], "expected a dimension"),
        (["float32", [True], False], "expected a dimension"),
        (["float32", [1.0], False], "expected a dimension"),
        (["float32", ["1"], False], "expected a dimension"),
        (["float32", [MAX_ELEMENTS + 1, 0], False], "expected a dimension"),
        (["float32", [0], 0], "expected a bool for requires_grad"),
        (["float32", [0], None], "expected a bool for requires_grad"),
        (["int64", [0], True], "int64 cannot require grad"),
        (["bool", [0], True], "bool cannot require grad"),
        (["float32", [1], False], "takes 4 bytes, got 0"),
        (["float32", [], False], "takes 4 bytes, got 0"),
        (["float32", [2**47], False], "bytes pass the limit"),
        (["uint8", [2**30, 2], False], "takes 2147483648 bytes, got 0"),
        (["float32", [2**40, 0], False], "bytes pass the limit"),
        (["complex128", [MAX_ELEMENTS] * MAX_DIMENSIONS, False], "bytes pass the limit"),
    ],
)
def test_a_wrong_spec_is_refused(spec: object, text: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProtocolError, match=text):
        decode([msgpack.packb({"type": 0x49, "status": {"tensor": 0}, "tensors": [spec]}), b""])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB


@pytest.mark.parametrize("specs", [None, {}, 1, "a", [[]], [None]])
def test_wrong_tensors_in_the_header_are_refused(specs: object) -> None:
    with pytest.raises(ProtocolError):
        decode([msgpack.packb({"type": 0x49, "status": None, "tensors": specs})])


def test_a_tensor_of_the_most_dimensions_arrives() -> None:
    assert through(torch.ones([1] * MAX_DIMENSIONS)).dim() == MAX_DIMENSIONS


def test_a_shape_may_not_promise_more_than_a_message_holds_even_if_it_is_empty() -> None:
    assert "bytes pass the limit of 100" in refused(["float32", [26, 0], False], b"", SMALL)
    header = {"type": 0x49, "status": {"tensor": 0}, "tensors": [["uint8", [10, 0], False]]}
    decode([msgpack.packb(header), b""], SMALL)


SMALL = Limits(message_bytes=100)


@pytest.mark.parametrize("at", [0, 1, 6])
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_bool_must_be_0_or_1(at: int, byte: int) -> None:
    frame = bytearray(7)
    frame[at] = 1
    assert "expected bools" not in str(decode_bools(frame))
    frame[at] = byte
    assert "expected bools of 0 and 1" in refused(["bool", [7], False], frame)


def decode_bools(frame: bytearray) -> object:
    header = {"type": 0x49, "status": {"tensor": 0}, "tensors": [["bool", [7], False]]}
    return decode([msgpack.packb(header), frame])


def test_a_bool_is_checked_in_an_adopted_frame_too() -> None:
    header, frame = frames_of(torch.zeros(ADOPT_BYTES, dtype=torch.bool))
    data = bytearray(frame)
    data[-1] = 2
    with pytest.raises(ProtocolError, match="expected bools"):
        decode([header, data], adopt=True)


def test_a_frame_that_no_field_uses_is_refused() -> None:
    header = {"type": 0x49, "status": None, "tensors": [["uint8", [1], False]]}
    with pytest.raises(ProtocolError, match="tensor frame 0 is used by no field"):
        decode([msgpack.packb(header), b"a"])
