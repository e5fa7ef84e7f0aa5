"""Tensors to raw frames and back.

Owns what of a tensor travels: dtype, shape, the requires_grad flag, and its elements in row-major
order, little-endian.  Strides, storage and device do not travel.  Knows nothing of messages (see
`codec`) or of autograd beyond the flag.
"""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from zmq_autograd.errors import ProtocolError, SerializationError
from zmq_autograd.wire.limits import KIB, MAX_DIMENSIONS, MAX_ELEMENTS, Limits, short

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("zmq_autograd sends tensors in little-endian order; this machine is not")

DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        *(
            getattr(torch, name)
            for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")
            if hasattr(torch, name)  # younger than the oldest torch supported
        ),
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex32,
        torch.complex64,
        torch.complex128,
    )
}
"""Every dtype that torch can copy byte for byte, by its name on the wire."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

ADOPT_BYTES: Final = 128 * KIB
"""Received frames from this length on become a tensor's memory as they are; shorter ones are
copied, which costs less than keeping the frame and gives torch's own alignment of 64 bytes."""

TensorSpec = list[Any]
"""How a tensor stands in the header: ``[dtype name, [dimension, ...], requires_grad]``."""


class TensorWriter:
    """Collects the tensors of one message: their specs and, in the same order, their frames."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []
        self.frames: list[memoryview] = []
        self._index_of: dict[int, int] = {}
        self._seen: list[Tensor] = []  # holds the tensors whose `id` is a key above
        self.containers = 0  # kept by `values`, which bounds it

    def add(self, tensor: Tensor, *, detached: bool = False) -> int:
        """Take one more frame for `tensor` and return its index.

        Args:
            tensor: whose elements are read, here or when the frame is sent.
            detached: it arrives without its requires_grad flag.

        Raises:
            SerializationError: the tensor cannot travel.
        """
        # A subclass or a mode may change what the plain questions and copies below mean.
        with torch._C.DisableTorchFunction():
            check_travels(tensor)
            frame = _elements(tensor)
            requires_grad = tensor.requires_grad and not detached
            self.specs.append([_NAMES[tensor.dtype], list(tensor.shape), requires_grad])
        self.frames.append(frame)
        return len(self.specs) - 1

    def add_once(self, tensor: Tensor) -> int:
        """Like `add`, but the same tensor object again is the same frame again."""
        index = self._index_of.get(id(tensor))
        if index is None:
            index = self._index_of[id(tensor)] = self.add(tensor)
            self._seen.append(tensor)
        return index


class TensorReader:
    """The tensors of one received message.  Checks all of them before it makes the first."""

    def __init__(
        self, specs: object, frames: Sequence[memoryview], limits: Limits, *, adopt: bool
    ) -> None:
        """Check `specs` against `frames`.

        Args:
            specs: what the header says, not to be trusted.
            frames: one per tensor.
            limits: of this side.
            adopt: the frames are nobody else's: writable ones may become tensors' memory.

        Raises:
            ProtocolError: they do not fit each other or pass the limits.
        """
        if not isinstance(specs, list):
            raise ProtocolError(f"field 'tensors': expected a list, got {type(specs).__name__}")
        if len(specs) != len(frames):
            raise ProtocolError(f"expected {len(specs)} tensor frames, got {len(frames)}")
        self._specs = [
            _checked(spec, frame, limits) for spec, frame in zip(specs, frames, strict=True)
        ]
        self._frames = frames
        self._adopt = adopt
        self._made: dict[int, Tensor] = {}
        self.containers = 0  # kept by `values`, which bounds it

    def take(self, index: object) -> Tensor:
        """Return tensor `index`: the same object however often it is asked for.

        Raises:
            ProtocolError: there is no such tensor, or its bytes are no values of its dtype.
        """
        if type(index) is not int or not 0 <= index < len(self._specs):
            raise ProtocolError(
                f"expected a tensor index below {len(self._specs)}, got {short(index)}"
            )
        tensor = self._made.get(index)
        if tensor is None:
            dtype, shape, requires_grad = self._specs[index]
            # The mode belongs to the thread; a tensor made in it could never be on a graph.
            with torch.inference_mode(False):
                tensor = _tensor(self._frames[index], dtype, shape, adopt=self._adopt)
                tensor.requires_grad_(requires_grad)
            self._made[index] = tensor
        return tensor

    def check_all_taken(self) -> None:
        """Raise ProtocolError if a frame belongs to nothing in the message."""
        if len(self._made) != len(self._specs):
            unused = next(i for i in range(len(self._specs)) if i not in self._made)
            raise ProtocolError(f"tensor frame {unused} is used by no field")


def check_travels(tensor: Tensor) -> None:
    """Raise SerializationError if `tensor` cannot travel, saying what to do instead."""
    kind = _without_elements(tensor)
    if kind:
        raise SerializationError(
            f"{kind} cannot travel: it has no elements of its own in one block of memory; "
            "send plain tensors"
        )
    if tensor.layout is not torch.strided:
        raise SerializationError(
            f"a tensor of layout {tensor.layout} cannot travel: send tensor.to_dense()"
        )
    if tensor.dtype not in _NAMES:
        raise SerializationError(
            f"a tensor of dtype {tensor.dtype} cannot travel: its elements cannot be copied byte "
            "for byte; send tensor.dequantize() or another dtype"
        )
    if tensor.dim() > MAX_DIMENSIONS or tensor.numel() > MAX_ELEMENTS:
        raise SerializationError(
            f"a tensor of {tensor.dim()} dimensions and {tensor.numel()} elements cannot travel: "
            f"limits are {MAX_DIMENSIONS} and {MAX_ELEMENTS}"
        )
    if tensor.numel() and not tensor._is_zerotensor() and _is_freed(tensor):
        raise SerializationError("a tensor whose storage was freed cannot travel")


def _without_elements(tensor: Tensor) -> str:
    """Return which kind of tensor without memory of its own this is, empty if it is none."""
    if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return f"a {type(tensor).__name__}"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor inside a transform of torch.func"
    if is_lazy(tensor):
        return "an uninitialized parameter"
    if tensor.is_nested:
        return "a nested tensor"
    return "a meta tensor" if tensor.is_meta else ""


def _is_freed(tensor: Tensor) -> bool:
    """Tell whether the storage is too short for the elements, which it may be after a resize."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    return tensor.untyped_storage().nbytes() < needed


# One type for all lengths: ctypes would make, and throw away, a class for each of them.
_Memory: Final = ctypes.c_ubyte * 2**62


def memory_of(tensor: Tensor) -> memoryview:
    """Return a writable view of the elements of a contiguous, non-empty CPU tensor.

    The view keeps the tensor alive.  Goes by address, since numpy, torch's own way to the buffer
    protocol, is no dependency of the core and knows neither bfloat16 nor float8.
    """
    memory = _Memory.from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # what keeps it alive
    return memoryview(memory).cast("B")[: tensor.nbytes]


def _elements(tensor: Tensor) -> memoryview:
    """Return the elements of `tensor`, read-only where they are a copy that nobody else has."""
    if not tensor.numel():
        return memoryview(b"")
    with _without_complex_half_warning(tensor.dtype):
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        if plain._is_zerotensor():
            plain = torch.zeros(plain.shape, dtype=plain.dtype, device="cpu")
        plain = plain.cpu().contiguous()
    if type(plain) is not Tensor:
        kind = type(plain).__name__
        raise SerializationError(f"a tensor cannot travel while a mode of torch makes it a {kind}")
    memory = memory_of(plain)
    shared = tensor.device.type == "cpu" and plain.data_ptr() == _address(tensor)
    return memory if shared else memory.toreadonly()


def _address(tensor: Tensor) -> int:
    return 0 if tensor._is_zerotensor() else tensor.data_ptr()


def _checked(
    spec: object, frame: memoryview, limits: Limits
) -> tuple[torch.dtype, list[int], bool]:
    """Check one tensor's spec against its frame; allocate nothing."""
    if not isinstance(spec, list) or len(spec) != 3:
        raise ProtocolError(f"tensor: expected [dtype, shape, requires_grad], got {short(spec)}")
    name, shape, requires_grad = spec
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ProtocolError(f"tensor: unknown dtype {short(name)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor: expected up to {MAX_DIMENSIONS} dimensions")
    # Dimensions are bounded even where another is 0: what a handler computes from such a tensor
    # (a sum over the empty dimension, say) would be as large as the others.
    size = math.prod(_dimension(dim) or 1 for dim in shape) * dtype.itemsize
    if size > limits.message_bytes:
        raise ProtocolError(f"tensor: {size} bytes pass the limit of {limits.message_bytes}")
    expected = 0 if 0 in shape else size
    if expected != frame.nbytes:
        raise ProtocolError(
            f"tensor: {name} of shape {short(shape)} takes {expected} bytes, got {frame.nbytes}"
        )
    if type(requires_grad) is not bool:
        raise ProtocolError(f"tensor: expected a bool for requires_grad, got {short(spec[2])}")
    if requires_grad and not (dtype.is_floating_point or dtype.is_complex):
        raise ProtocolError(f"tensor: {name} cannot require grad")
    return dtype, shape, requires_grad


def _dimension(dim: object) -> int:
    if type(dim) is not int or not 0 <= dim <= MAX_ELEMENTS:
        raise ProtocolError(f"tensor: expected a dimension up to {MAX_ELEMENTS}, got {short(dim)}")
    return dim


def _tensor(frame: memoryview, dtype: torch.dtype, shape: list[int], *, adopt: bool) -> Tensor:
    """Return a tensor of the bytes in `frame` in memory of its own: writable and aligned."""
    with _without_complex_half_warning(dtype):
        if adopt and frame.nbytes >= ADOPT_BYTES and not frame.readonly:
            # Resized, not viewed: autograd treats views differently when they are written to.
            tensor = torch.frombuffer(frame, dtype=dtype).resize_(shape)
            # libzmq's memory lies at multiples of 8, which is what the largest real type needs.
            if tensor.data_ptr() % 8 == 0:
                return _check_bool(tensor)
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if frame.nbytes:
        memory_of(tensor)[:] = frame
    return _check_bool(tensor)


def _check_bool(tensor: Tensor) -> Tensor:
    # Any byte but 0 and 1 in a bool tensor is undefined behaviour in torch's kernels.
    if tensor.dtype is torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
        raise ProtocolError("tensor: expected bools of 0 and 1, got another byte")
    return tensor


@contextmanager
def _without_complex_half_warning(dtype: torch.dtype) -> Iterator[None]:
    """Keep torch's remark on complex32 ("experimental") from whom only passes it on."""
    if dtype is not torch.complex32:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental", UserWarning)
        yield
