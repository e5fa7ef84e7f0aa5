"""Messages of every type, for the tests of the wire: strategies, and when two are the same."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from zmq_autograd.errors import ProtocolError
from zmq_autograd.ids import MAX_ID
from zmq_autograd.wire import (
    DEFAULT_LIMITS,
    Buffer,
    Envelope,
    Limits,
    decode,
    encode,
    open_envelope,
)
from zmq_autograd.wire import fields as f
from zmq_autograd.wire import messages as m
from zmq_autograd.wire.codec import SCHEMAS
from zmq_autograd.wire.messages import StatusResponse
from zmq_autograd.wire.objects import Coded, Reference
from zmq_autograd.wire.tensors import DTYPES


def elements_of(tensor: Tensor) -> bytes:
    """Return the elements in row-major order, by another way than the code under test."""
    plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
    if not plain.numel():
        return b""
    # Of each element its bytes: no copy of a dtype for which torch warns.
    data = plain.expand(1, *plain.shape).unsqueeze(-1).view(torch.uint8)
    return bytes(data.flatten().tolist())


def same(left: Any, right: Any) -> bool:
    """Tell whether two messages or values are equal, with types, NaNs and tensors to the bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.is_sparse and right.is_sparse:
            return _same_sparse(left, right)
        return (
            left.dtype == right.dtype
            and left.layout == right.layout
            and left.shape == right.shape
            and left.requires_grad == right.requires_grad
            and elements_of(left) == elements_of(right)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    if isinstance(left, complex):
        return same((left.real, left.imag), (right.real, right.imag))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if type(left) in SCHEMAS:
        names = [field.name for field in dataclass_fields(left)]
        return all(_same_field(getattr(left, n), getattr(right, n)) for n in names)
    if isinstance(left, Coded) and isinstance(right, Coded):
        return left.codec == right.codec and same(left.value, right.value)
    return bool(left == right)


def _same_sparse(left: Tensor, right: Tensor) -> bool:
    return (
        left.shape == right.shape
        and left.is_coalesced() == right.is_coalesced()
        and left.requires_grad == right.requires_grad
        and same(left.detach()._indices(), right.detach()._indices())
        and same(left.detach()._values(), right.detach()._values())
    )


def _same_field(left: Any, right: Any) -> bool:
    # A field that is a sequence may be given as a list and arrive as a tuple.
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return same(left, right)


def decoded_or_refused(
    frames: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS
) -> m.Message | None:
    """Decode frames that may be anything: a message, or None for ProtocolError.

    What was accepted must be a message that can be sent again and arrives the same.
    """
    try:
        envelope, message = open_envelope(frames, limits)
    except ProtocolError:
        return None
    again = open_envelope(encode(message, envelope))
    if again[0] != envelope or not same(again[1], message):
        raise AssertionError(f"{message} arrived as {again[1]}")
    return message


# --- strategies ----------------------------------------------------------------------------------

IDS = st.integers(0, MAX_ID)
STRINGS = st.text(st.characters(codec="utf-8"), max_size=8)
SHAPES = st.sampled_from([(), (0,), (0, 5), (1,), (5,), (2, 3), (3, 1, 2), (2, 0, 3)])
SECONDS = st.floats(min_value=1e-9, max_value=1e9)


@st.composite
def tensors(draw: st.DrawFn, *, may_require_grad: bool = True) -> Tensor:
    """Draw a small tensor of any dtype, shape and bit pattern, contiguous or not."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(SHAPES)
    size = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        data = bytearray(byte & 1 for byte in data)
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    if tensor.dim() >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    if may_require_grad and (dtype.is_floating_point or dtype.is_complex) and draw(st.booleans()):
        tensor = tensor.detach().requires_grad_()
    return tensor


@st.composite
def sparse_tensors(draw: st.DrawFn, *, may_require_grad: bool = True) -> Tensor:
    """Draw a small COO tensor, coalesced or not, whose elements may be tensors in their turn."""
    values = draw(tensors(may_require_grad=False).filter(lambda tensor: tensor.dim() > 0))
    sparse_shape = draw(st.lists(st.integers(1, 4), max_size=2))
    count = len(values)
    columns = st.tuples(*[st.integers(0, size - 1) for size in sparse_shape])
    chosen = draw(st.lists(columns, min_size=count, max_size=count))
    is_coalesced = chosen == sorted(set(chosen)) and draw(st.booleans())
    indices = torch.tensor(chosen, dtype=torch.int64).reshape(count, len(sparse_shape)).t()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental", UserWarning)
        tensor = torch.sparse_coo_tensor(
            indices,
            values,
            [*sparse_shape, *values.shape[1:]],
            is_coalesced=is_coalesced,
            check_invariants=False,
        )
    is_differentiable = values.dtype.is_floating_point or values.dtype.is_complex
    return tensor.requires_grad_(may_require_grad and is_differentiable and draw(st.booleans()))


KEYS = st.one_of(STRINGS, st.integers(-(2**70), 2**70), st.binary(max_size=4), st.none())
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.complex_numbers(),
    STRINGS,
    st.binary(max_size=8),
    tensors(),
    sparse_tensors(),
    st.builds(
        Reference,
        STRINGS,
        STRINGS,
        st.integers(1, MAX_ID),
        st.integers(1, MAX_ID),
        st.lists(STRINGS, max_size=2).map(tuple),
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(Coded, STRINGS, inner),
    ),
    max_leaves=6,
)
LIMITS = st.builds(Limits, *[st.integers(1, MAX_ID)] * 5)

FIELDS: dict[f.Field, st.SearchStrategy[Any]] = {
    f.ID: IDS,
    f.BOOL: st.booleans(),
    f.OPTIONAL_BOOL: st.none() | st.booleans(),
    f.STRING: STRINGS,
    f.OPTIONAL_STRING: st.none() | STRINGS,
    f.STRINGS: st.lists(STRINGS, max_size=3).map(tuple),
    f.IDS: st.lists(IDS, max_size=3).map(tuple),
    f.METADATA: st.builds(m.AutogradMetadata, IDS, IDS),
    f.OPTIONAL_METADATA: st.none() | st.builds(m.AutogradMetadata, st.integers(1, MAX_ID), IDS),
    f.GRADIENTS: st.lists(
        st.one_of(
            st.none(),
            tensors(may_require_grad=False),
            sparse_tensors(may_require_grad=False),
        ),
        max_size=5,
    ),
    f.VALUE: VALUES,
    f.ARGS: st.lists(VALUES, max_size=3).map(tuple),
    f.KWARGS: st.dictionaries(STRINGS, VALUES, max_size=2),
    f.MODES: st.builds(
        m.Modes,
        st.booleans(),
        st.booleans(),
        st.lists(st.tuples(STRINGS, STRINGS), max_size=2).map(tuple),
        st.none() | st.booleans(),
    ),
    f.HANDSHAKE["version"]: st.integers(1, 2**16 - 1),
    f.HANDSHAKE["incarnation"]: st.text("0123456789abcdef", min_size=32, max_size=32),
    f.HANDSHAKE["limits"]: LIMITS,
    f.HANDSHAKE["heartbeat"]: SECONDS,
}
"""What each kind of field may hold."""


def messages_of(cls: type[m.Message]) -> st.SearchStrategy[m.Message]:
    """Return a strategy for messages of one type."""
    return st.builds(cls, **{name: FIELDS[field] for name, field in SCHEMAS[cls].fields.items()})


MESSAGES = st.sampled_from(list(SCHEMAS)).flatmap(messages_of)
ENVELOPES = st.builds(Envelope, IDS, IDS, st.none() | st.floats(0, 1e300))


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
