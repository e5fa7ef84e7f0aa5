"""Tensors to raw frames and back.

Owns what of a tensor travels: dtype, shape, the requires_grad flag, and its elements in row-major
order, little-endian.  Strides, storage and device do not travel.  A sparse (COO) tensor is two
frames, see `sparse`.  Knows nothing of messages (see `codec`) or of autograd beyond the flag.
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
from zmq_autograd.wire import sparse
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

_LAYOUTS: Final = (torch.strided, torch.sparse_coo)

ADOPT_BYTES: Final = 128 * KIB
"""Received frames from this length on become a tensor's memory as they are; shorter ones are
copied, which costs less than keeping the frame and gives torch's own alignment of 64 bytes."""

TensorSpec = list[Any]
"""How a tensor stands in the header: ``[dtype name, [dimension, ...], requires_grad]``."""

SparseParts = list[Any]
"""Of what frames a sparse tensor is: ``[indices, values, [dimension, ...], is_coalesced]``."""


class TensorWriter:
    """Collects the tensors of one message: their specs and, in the same order, their frames."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []
        self.frames: list[memoryview] = []
        self._place_of: dict[int, int | SparseParts] = {}
        self._seen: list[Tensor] = []  # holds the tensors whose `id` is a key above
        self.containers = 0  # kept by `values`, which bounds it

    def add(self, tensor: Tensor, *, detached: bool = False) -> int | SparseParts:
        """Take one more frame for `tensor` and return its index, or two and how they make it up.

        Args:
            tensor: whose elements are read, here or when the frame is sent.
            detached: it arrives without its requires_grad flag.

        Raises:
            SerializationError: the tensor cannot travel.
        """
        # A subclass or a mode may change what the plain questions and copies below mean.
        with torch._C.DisableTorchFunction():
            check_travels(tensor)
            # What was made in inference mode can be on no graph, whatever its flag says.
            requires_grad = tensor.requires_grad and not (detached or tensor.is_inference())
            if tensor.layout is torch.sparse_coo:
                return self._add_sparse(tensor, requires_grad=requires_grad)
            return self._add_frame(tensor, requires_grad=requires_grad)

    def add_once(self, tensor: Tensor) -> int | SparseParts:
        """Like `add`, but the same tensor object again is the same frame again."""
        place = self._place_of.get(id(tensor))
        if place is None:
            place = self._place_of[id(tensor)] = self.add(tensor)
            self._seen.append(tensor)
        return place

    def _add_frame(self, tensor: Tensor, *, requires_grad: bool) -> int:
        frame = _elements(tensor)
        self.specs.append([_NAMES[tensor.dtype], list(tensor.shape), requires_grad])
        self.frames.append(frame)
        return len(self.specs) - 1

    def _add_sparse(self, tensor: Tensor, *, requires_grad: bool) -> SparseParts:
        indices, values = sparse.indices_of(tensor).cpu(), sparse.values_of(tensor)
        shape, coalesced = list(tensor.shape), tensor.is_coalesced()
        problem = sparse.problem_of(indices, shape, coalesced=coalesced)
        if problem:
            raise SerializationError(f"a sparse tensor cannot travel: {problem}")
        places = [
            self._add_frame(indices, requires_grad=False),
            self._add_frame(values, requires_grad=requires_grad),
        ]
        return [*places, shape, coalesced]


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
        self._limits = limits
        self._made: dict[int, Tensor] = {}
        # By the frame of the indices; and the frames of all sparse tensors.
        self._sparse: dict[int, tuple[SparseParts, Tensor]] = {}
        self._parts: set[int] = set()
        self.containers = 0  # kept by `values`, which bounds it

    def take(self, index: object) -> Tensor:
        """Return tensor `index`: the same object however often it is asked for.

        Raises:
            ProtocolError: there is no such tensor, or its bytes are no values of its dtype.
        """
        number = self._checked_index(index)
        if number in self._parts:
            raise ProtocolError(f"tensor frame {number} is a part of a sparse tensor")
        tensor = self._made.get(number)
        if tensor is None:
            # The mode belongs to the thread; a tensor made in it could never be on a graph.
            with torch.inference_mode(False):
                tensor = self._plain(number).requires_grad_(self._specs[number][2])
            self._made[number] = tensor
        return tensor

    def take_sparse(self, parts: object, *, is_gradient: bool = False) -> Tensor:
        """Return the sparse tensor of `parts`: the same object however often it is asked for.

        Args:
            parts: `SparseParts`, not to be trusted.
            is_gradient: whoever takes it compares its shape with that of a tensor of its own.

        Raises:
            ProtocolError: there are no such tensors, they are no sparse one, or a dense one of its
                shape would pass the limits.
        """
        if not isinstance(parts, list) or len(parts) != 4:
            raise ProtocolError(
                "sparse tensor: expected [indices, values, shape, is_coalesced], got "
                f"{short(parts)}"
            )
        first = self._checked_index(parts[0])
        made = self._sparse.get(first)
        if made is not None and made[0] == parts:
            return made[1]
        with torch.inference_mode(False):
            tensor = self._assembled(first, parts, is_gradient=is_gradient)
        self._sparse[first] = parts, tensor
        return tensor

    def check_all_taken(self) -> None:
        """Raise ProtocolError if a frame belongs to nothing in the message."""
        if len(self._made) + len(self._parts) != len(self._specs):
            taken = self._parts.union(self._made)
            unused = next(i for i in range(len(self._specs)) if i not in taken)
            raise ProtocolError(f"tensor frame {unused} is used by no field")

    def _checked_index(self, index: object) -> int:
        if type(index) is not int or not 0 <= index < len(self._specs):
            raise ProtocolError(
                f"expected a tensor index below {len(self._specs)}, got {short(index)}"
            )
        return index

    def _plain(self, index: int) -> Tensor:
        dtype, shape, _ = self._specs[index]
        return _tensor(self._frames[index], dtype, shape, adopt=self._adopt)

    def _assembled(self, first: int, parts: SparseParts, *, is_gradient: bool) -> Tensor:
        """Make a sparse tensor of frames that are no other tensor's, nor a part of one.

        Who can write to its indices could make torch write to anywhere.
        """
        second, shape, coalesced = self._checked_index(parts[1]), parts[2], parts[3]
        for index in (first, second):
            if index in self._parts or index in self._made or first == second:
                raise ProtocolError(f"tensor frame {index} is used by two tensors")
        dtype, of_indices, requires_grad = self._specs[first]
        if dtype is not torch.int64 or requires_grad:
            raise ProtocolError("sparse tensor: expected indices of int64")
        if type(coalesced) is not bool:
            raise ProtocolError(
                f"sparse tensor: expected a bool for is_coalesced, got {short(coalesced)}"
            )
        dtype, of_values, requires_grad = self._specs[second]
        size = _size(shape, dtype)
        # What computes with an argument may well make a dense tensor of it.
        if not is_gradient and size > self._limits.message_bytes:
            raise ProtocolError(
                f"sparse tensor: as a dense one its {size} bytes would pass the limit of "
                f"{self._limits.message_bytes}"
            )
        problem = sparse.problem_of_shapes(of_indices, of_values, shape)
        if not problem:
            indices = self._plain(first)
            problem = sparse.problem_of(indices, shape, coalesced=coalesced)
        if problem:
            raise ProtocolError(f"sparse tensor: {problem}")
        self._parts |= {first, second}
        values = self._plain(second)
        with _without_complex_half_warning(dtype):
            tensor = sparse.assembled(indices, values, shape, coalesced=coalesced)
        return tensor.requires_grad_(requires_grad)


def check_travels(tensor: Tensor) -> None:
    """Raise SerializationError if `tensor` cannot travel, saying what to do instead."""
    kind = _without_elements(tensor)
    if kind:
        raise SerializationError(
            f"{kind} cannot travel: it has no elements of its own in one block of memory; "
            "send plain tensors"
        )
    if tensor.layout not in _LAYOUTS:
        raise SerializationError(
            f"a tensor of layout {tensor.layout} cannot travel: send tensor.to_dense(), or "
            "tensor.to_sparse() if it has few elements"
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
    if tensor.layout is torch.sparse_coo or not tensor.numel() or tensor._is_zerotensor():
        return
    if _is_freed(tensor):
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
    size = _size(shape, dtype)
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


def _size(shape: object, dtype: torch.dtype) -> int:
    """Return the bytes of a dense tensor, with dimensions of 0 counted as 1.

    So the others are bounded even where one is 0: what a handler computes from such a tensor (a sum
    over the empty dimension, say) would be as large as they are.
    """
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor: expected up to {MAX_DIMENSIONS} dimensions")
    return math.prod(_dimension(dim) or 1 for dim in shape) * dtype.itemsize


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
