"""Arguments and results as they travel: plain values, with tensors and RRefs beside them.

Owns what may travel at all.  Everything but numbers, str, bytes and None is a list that begins with
a tag; functions and classes go by their names and are looked up where they arrive; objects of other
types go by a registered codec.  Nothing is pickled::

    (1, tensor)         ["tuple", 1, ["tensor", 0]]
    torch.add           ["name", "torch:add"]
    MyPoint(1, 2)       ["coded", "program:MyPoint", ["tuple", 1, 2]]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from zmq_autograd.compat.rpc.errors import CannotTravel, NotAllowed
from zmq_autograd.compat.rpc.names import Names
from zmq_autograd.compat.rpc.strides import strides_of, with_strides
from zmq_autograd.compat.rpc.worker_info import WorkerInfo
from zmq_autograd.node.codecs import Codecs
from zmq_autograd.wire.limits import MAX_NUMBER_KEYS

if TYPE_CHECKING:
    from zmq_autograd.compat.rpc.rref import PyRRef

_PLAIN: Final = frozenset((type(None), bool, int, float, complex, str, bytes))
_FUNCTIONS: Final = (FunctionType, BuiltinFunctionType, MethodDescriptorType)
_OF_TORCH: Final = (torch.dtype, torch.layout, torch.memory_format)

_HASHED: Final = (set, frozenset, dict, OrderedDict)


def _keys(keys: Collection[Any]) -> Collection[Any]:
    """Return `keys`, of which few enough are numbers: a peer could choose those to collide.

    Raises:
        ValueError: there are more than a dict of the wire may have.
    """
    if sum(not isinstance(key, (str, bytes)) for key in keys) > MAX_NUMBER_KEYS:
        raise ValueError(
            f"a dict or set with more than {MAX_NUMBER_KEYS} numbers, or keys made of them, cannot "
            "travel: send a list"
        )
    return keys


# What torch's operators return, with names for its items.
_RETURN_TYPES: Final[dict[str, Callable[[list[Any]], Any]]] = {
    f"return_types.{kind.__qualname__}": kind
    for kind in vars(torch.return_types).values()
    if isinstance(kind, type) and kind.__module__ == "torch.return_types"
}
_SEQUENCES: Final[dict[Any, str]] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    torch.Size: "size",
    **{kind: name for name, kind in _RETURN_TYPES.items()},
}
_FROM_ITEMS: Final[dict[str, Callable[[list[Any]], Any]]] = {
    "list": list,
    "tuple": tuple,
    "set": lambda items: set(_keys(items)),
    "frozenset": lambda items: frozenset(_keys(items)),
    "size": torch.Size,
    **_RETURN_TYPES,
    "slice": lambda items: slice(*items),
    "range": lambda items: range(*items),
    "dict": lambda items: dict(zip(_keys(items[::2]), items[1::2], strict=True)),
    "ordered": lambda items: OrderedDict(zip(_keys(items[::2]), items[1::2], strict=True)),
    "worker": lambda items: WorkerInfo(*items),
    "device": lambda items: torch.device(*items),
}
_TORCH_VALUES: Final[dict[str, Any]] = {
    str(value): value for value in vars(torch).values() if isinstance(value, _OF_TORCH)
}


@dataclass(slots=True)
class Packed:
    """A value taken apart.

    Attributes:
        skeleton: plain values.
        tensors: its tensors, in order.
        rrefs: its RRefs, in order.
    """

    skeleton: Any = None
    tensors: list[Tensor] = field(default_factory=list)
    rrefs: list[Any] = field(default_factory=list)


class Values:
    """What can travel between processes whose names are `names`."""

    def __init__(self, names: Names) -> None:
        """Let plain values, tensors, RRefs, and what `names` has a name for, travel."""
        self._names = names
        self._codecs = Codecs("")  # the process's, not a worker's

    def codec(
        self, kind: type, *, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]
    ) -> None:
        """Let objects of a type, and of its subclasses, travel; both sides register it.

        One that has a codec gets another: a notebook's cell may be run again.

        Args:
            kind: a class with a name of its own, ``module:qualified.name``.
            pack: makes of an object what can travel, or returns the object if it can.  Tensors in
                it stay on the graph.
            unpack: makes an object of that.

        Raises:
            CannotTravel: the class is local to a function.
            ConfigurationError: `kind` is no type of the program's, or a function is none.
        """
        self._codecs.discard(self._names.name_of(kind))
        self._codecs.add(kind, self._names.name_of(kind), pack, unpack)

    def pack(self, value: Any) -> Packed:
        """Take `value` apart.

        Raises:
            CannotTravel: something in it cannot travel; it says what and what to do.
        """
        packed = Packed()
        packed.skeleton = self._pack(value, packed)
        return packed

    def unpack(
        self, skeleton: Any, tensors: list[Tensor], rrefs: Iterable[Any], rref: Callable[..., Any]
    ) -> Any:
        """Put a value together again.

        Args:
            skeleton: as it arrived.
            tensors: as they arrived.
            rrefs: as they arrived, not yet what a program holds.
            rref: makes what a program holds of one of `rrefs` and what the skeleton says of it.

        Raises:
            NotAllowed: a function or class may not be used here, or a type has no codec.
            ValueError: it is nothing that `pack` makes.
        """
        return self._unpack(skeleton, _Parts(tensors, list(rrefs), rref))

    # --- packing ---------------------------------------------------------------------------------

    def _pack(self, value: Any, packed: Packed) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind in _HASHED:
            _check_keys(value)
        if kind in _SEQUENCES:
            if _PLAIN.issuperset(map(type, value)):
                return [_SEQUENCES[kind], *value]
            return [_SEQUENCES[kind], *(self._pack(item, packed) for item in value)]
        if isinstance(value, Tensor):
            packed.tensors.append(value)
            return ["tensor", len(packed.tensors) - 1, *strides_of(value)]
        if kind is dict or kind is OrderedDict:
            items = [self._pack(part, packed) for pair in value.items() for part in pair]
            return ["dict" if kind is dict else "ordered", *items]
        return self._pack_object(value, packed)

    def _pack_object(self, value: Any, packed: Packed) -> Any:
        codec = self._codecs.codec_of(value)
        if codec is not None and (made := codec.pack(value)) is not value:
            return ["coded", codec.name, self._pack(made, packed)]
        if hasattr(value, "_pack_rref"):
            rref: PyRRef[Any] = value
            packed.rrefs.append(rref)
            return ["rref", len(packed.rrefs) - 1, *rref._pack_rref()]
        if isinstance(value, (*_FUNCTIONS, type)):
            return ["type" if isinstance(value, type) else "name", self._names.name_of(value)]
        if isinstance(value, MethodType):
            if isinstance(value.__self__, type):
                return ["name", self._names.name_of(value)]
            return ["method", self._pack(value.__self__, packed), value.__name__]
        if isinstance(value, Enum):
            return ["enum", self._names.name_of(type(value)), value.name]
        if isinstance(value, tuple) and hasattr(type(value), "_fields"):
            items = [self._pack(item, packed) for item in value]
            return ["named", self._names.name_of(type(value)), *items]
        return _pack_leaf(value)

    # --- unpacking -------------------------------------------------------------------------------

    def _unpack(self, skeleton: Any, parts: _Parts) -> Any:
        if type(skeleton) is not list:
            return skeleton
        tag, *items = skeleton
        if tag in _FROM_ITEMS:
            return _FROM_ITEMS[tag]([self._unpack(item, parts) for item in items])
        if tag == "tensor":
            return with_strides(parts.tensors[items[0]], items[1:])
        if tag == "rref":
            return parts.rref(parts.rrefs[items[0]], *items[1:])
        return self._unpack_object(tag, items, parts)

    def _unpack_object(self, tag: Any, items: list[Any], parts: _Parts) -> Any:
        name, *rest = items
        match tag:
            case "name":
                return self._names.find(name)
            case "type":
                return self._names.find_class(name)
            case "method":
                return self._names.method_of(self._unpack(name, parts), rest[0])
            case "coded":
                codec = self._codecs.named(name)
                if codec is None:
                    raise NotAllowed(f"objects of type {name!r} have no codec here: {_HOW}")
                return codec.unpack(self._unpack(rest[0], parts))
            case "enum":
                return self._enum(name)[rest[0]]
            case "named":
                fields = [self._unpack(item, parts) for item in rest]
                return self._named_tuple(name)._make(fields)
            case "torch":
                return _TORCH_VALUES[name]
        raise ValueError(f"a value with an unknown tag arrived: {str(tag)[:40]!r}")

    def _enum(self, name: str) -> type[Enum]:
        kind = self._names.find_class(name)
        if not issubclass(kind, Enum):
            raise NotAllowed(f"{name!r} is no enum")
        return kind

    def _named_tuple(self, name: str) -> Any:
        kind = self._names.find_class(name)
        if not issubclass(kind, tuple) or not hasattr(kind, "_make"):
            raise NotAllowed(f"{name!r} is no named tuple")
        return kind


def _check_keys(value: Collection[Any]) -> None:
    try:
        _keys(value)
    except ValueError as error:
        raise CannotTravel(str(error)) from error


@dataclass(slots=True)
class _Parts:
    tensors: list[Tensor]
    rrefs: list[Any]
    rref: Callable[..., Any]


_HOW: Final = "register one in every process (rpc.codec), or send what it is made of"


def _pack_leaf(value: Any) -> Any:
    if isinstance(value, (slice, range)):
        return [type(value).__name__, value.start, value.stop, value.step]
    if isinstance(value, WorkerInfo):
        return ["worker", value.name, value.id]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, _OF_TORCH):
        return ["torch", str(value)]
    if isinstance(value, torch._C.Future):
        raise CannotTravel(
            "Can not pickle torch.futures.Future, and send it neither: wait for its value, or mark "
            "the function that returns it by @rpc.functions.async_execution"
        )
    kind = type(value)
    raise CannotTravel(
        f"an object of type {kind.__module__}.{kind.__qualname__} cannot travel: {_HOW}"
    )
