"""Tensors that cannot travel, and frames that are none."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.unit.wire.wire_samples import frames_of, refused, through
from zmq_autograd.errors import ProtocolError, SerializationError
from zmq_autograd.wire import Limits, decode, encode
from zmq_autograd.wire.limits import MAX_DIMENSIONS, MAX_ELEMENTS
from zmq_autograd.wire.messages import AutogradMetadata, PropagateGradientsRequest, StatusResponse
from zmq_autograd.wire.tensors import ADOPT_BYTES

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
    gradients = PropagateGradientsRequest(AutogradMetadata(1, 2), [tensor])
    for message in (StatusResponse(tensor), gradients):
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
