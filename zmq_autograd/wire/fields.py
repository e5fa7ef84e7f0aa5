"""The kinds of fields that headers are made of: each packs a value and checks what arrives.

Knows nothing of which message has which field; that is the table in `codec`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Final

from torch import Tensor

from zmq_autograd.errors import ProtocolError, SerializationError
from zmq_autograd.ids import MAX_ID
from zmq_autograd.wire.limits import Limits, short
from zmq_autograd.wire.messages import AutogradMetadata, Modes
from zmq_autograd.wire.tensors import TensorReader, TensorWriter
from zmq_autograd.wire.values import pack_value, unpack_value

Header = dict[str, Any]

_ABSENT: Final = object()


@dataclass(frozen=True, slots=True)
class Field:
    """One kind of field.

    Attributes:
        pack: writes a value into the header under a name; raises SerializationError.
        unpack: takes it out of the header again; raises ProtocolError.
    """

    pack: Callable[[Header, str, Any, TensorWriter], None]
    unpack: Callable[[Header, str, TensorReader], Any]


def _plain(expected: str, is_right: Callable[[Any], bool]) -> Field:
    """Make a field that stands in the header as it is; `is_right` tells a good value."""

    def pack(header: Header, name: str, value: Any, tensors: TensorWriter) -> None:
        if not is_right(value):
            raise SerializationError(f"field {name!r}: expected {expected}, got {short(value)}")
        header[name] = value

    def unpack(header: Header, name: str, tensors: TensorReader) -> Any:
        value = header.pop(name, _ABSENT)
        if value is _ABSENT or not is_right(value):
            got = "nothing" if value is _ABSENT else short(value)
            raise ProtocolError(f"field {name!r}: expected {expected}, got {got}")
        return value

    return Field(pack, unpack)


def _converted(field: Field, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> Field:
    """Make a field that stands in the header as `field` does, after a conversion."""
    return Field(
        lambda header, name, value, tensors: field.pack(header, name, pack(value), tensors),
        lambda header, name, tensors: unpack(field.unpack(header, name, tensors)),
    )


def _as_list(value: Any) -> Any:
    """Return a list or tuple as a list, and anything else as it is, for the field to refuse."""
    return list(value) if isinstance(value, (list, tuple)) else value


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_ID


def _is_strings(value: Any) -> bool:
    return type(value) is list and all(type(item) is str for item in value)


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


ID: Final = _plain("an unsigned 64-bit int", _is_id)
BOOL: Final = _plain("a bool", lambda value: type(value) is bool)
OPTIONAL_BOOL: Final = _plain("a bool or nil", lambda value: value is None or type(value) is bool)
STRING: Final = _plain("a string", lambda value: type(value) is str)
OPTIONAL_STRING: Final = _plain(
    "a string or nil", lambda value: value is None or type(value) is str
)
STRINGS: Final = _converted(_plain("a list of strings", _is_strings), _as_list, tuple)
IDS: Final = _converted(
    _plain("a list of ids", lambda value: type(value) is list and all(map(_is_id, value))),
    _as_list,
    tuple,
)
_SECONDS: Final = _plain("seconds above 0", _is_seconds)
_VERSION: Final = _plain("a version", lambda value: type(value) is int and 0 < value < 2**16)


# --- autograd metadata: two ids at the header's top level ----------------------------------------


def _pack_metadata(header: Header, name: str, value: Any, tensors: TensorWriter) -> None:
    if not isinstance(value, AutogradMetadata):
        raise SerializationError(f"field {name!r}: expected AutogradMetadata, got {short(value)}")
    ID.pack(header, "context_id", value.context_id, tensors)
    ID.pack(header, "message_id", value.message_id, tensors)


def _unpack_metadata(header: Header, name: str, tensors: TensorReader) -> AutogradMetadata:
    context_id = ID.unpack(header, "context_id", tensors)
    return AutogradMetadata(context_id, ID.unpack(header, "message_id", tensors))


def _pack_optional_metadata(header: Header, name: str, value: Any, tensors: TensorWriter) -> None:
    if isinstance(value, AutogradMetadata) and not value.context_id:
        raise SerializationError(f"field {name!r}: expected the id of a context or None, got 0")
    _pack_metadata(header, name, AutogradMetadata(0, 0) if value is None else value, tensors)


def _unpack_optional_metadata(
    header: Header, name: str, tensors: TensorReader
) -> AutogradMetadata | None:
    metadata = _unpack_metadata(header, name, tensors)
    if metadata.context_id:
        return metadata
    if metadata.message_id:
        raise ProtocolError(f"message {metadata.message_id} of no context")
    return None


METADATA: Final = Field(_pack_metadata, _unpack_metadata)
OPTIONAL_METADATA: Final = Field(_pack_optional_metadata, _unpack_optional_metadata)


# --- gradients: where each that is defined is, nil for each that is not --------------------------


def _pack_gradients(header: Header, name: str, value: Any, tensors: TensorWriter) -> None:
    if not isinstance(value, (list, tuple)):
        raise SerializationError(f"field {name!r}: expected a list, got {short(value)}")
    header[name] = [_pack_gradient(name, grad, tensors) for grad in value]


def _pack_gradient(name: str, grad: Any, tensors: TensorWriter) -> Any:
    if grad is None:
        return None
    if not isinstance(grad, Tensor):
        raise SerializationError(f"field {name!r}: expected tensors or None, got {short(grad)}")
    # Never one frame for two gradients: each becomes a tensor that its receiver may write to.
    return tensors.add(grad, detached=True)


def _unpack_gradients(header: Header, name: str, tensors: TensorReader) -> list[Tensor | None]:
    packed = header.pop(name, None)
    if type(packed) is not list:
        raise ProtocolError(f"field {name!r}: expected a list, got {short(packed)}")
    # A sparse gradient stands there as a list, which begins with the indices of its two frames.
    places = [place[:2] if type(place) is list else [place] for place in packed]
    indices = [index for place in places for index in place if place != [None]]
    if indices != list(range(len(indices))):
        raise ProtocolError(f"field {name!r}: expected the tensors in order, each once")
    grads = [None if place is None else _gradient(place, tensors) for place in packed]
    if any(grad is not None and grad.requires_grad for grad in grads):
        raise ProtocolError(f"field {name!r}: expected gradients that do not require grad")
    return grads


def _gradient(place: Any, tensors: TensorReader) -> Tensor:
    if type(place) is list:
        return tensors.take_sparse(place, is_gradient=True)
    return tensors.take(place)


GRADIENTS: Final = Field(_pack_gradients, _unpack_gradients)


# --- values --------------------------------------------------------------------------------------


def _pack_value(header: Header, name: str, value: Any, tensors: TensorWriter) -> None:
    header[name] = pack_value(value, tensors)


def _unpack_value(header: Header, name: str, tensors: TensorReader) -> Any:
    if name not in header:
        raise ProtocolError(f"field {name!r}: expected a value, got nothing")
    return unpack_value(header.pop(name), tensors)


def _pack_args(header: Header, name: str, value: Any, tensors: TensorWriter) -> None:
    if not isinstance(value, (list, tuple)):
        raise SerializationError(f"field {name!r}: expected a list, got {short(value)}")
    header[name] = [pack_value(item, tensors) for item in value]


def _unpack_args(header: Header, name: str, tensors: TensorReader) -> tuple[Any, ...]:
    packed = header.pop(name, None)
    if type(packed) is not list:
        raise ProtocolError(f"field {name!r}: expected a list, got {short(packed)}")
    return tuple(unpack_value(item, tensors) for item in packed)


def _pack_kwargs(header: Header, name: str, value: Any, tensors: TensorWriter) -> None:
    if not isinstance(value, Mapping) or not all(type(key) is str for key in value):
        raise SerializationError(f"field {name!r}: expected a dict with names as keys")
    header[name] = {key: pack_value(item, tensors) for key, item in value.items()}


def _unpack_kwargs(header: Header, name: str, tensors: TensorReader) -> dict[str, Any]:
    packed = header.pop(name, None)
    if type(packed) is not dict:
        raise ProtocolError(f"field {name!r}: expected a map, got {short(packed)}")
    return {key: unpack_value(item, tensors) for key, item in packed.items()}


VALUE: Final = Field(_pack_value, _unpack_value)
ARGS: Final = Field(_pack_args, _unpack_args)
KWARGS: Final = Field(_pack_kwargs, _unpack_kwargs)


# --- modes and limits ----------------------------------------------------------------------------


def _is_modes(value: Any) -> bool:
    return (
        type(value) is list
        and len(value) in (3, 4)
        and type(value[0]) is bool
        and type(value[1]) is bool
        and type(value[2]) is list
        and all(_is_strings(pair) and len(pair) == 2 for pair in value[2])
        and all(type(check_nan) is bool for check_nan in value[3:])
    )


def _pack_modes(value: Any) -> Any:
    if not isinstance(value, Modes) or not isinstance(value.autocast, (list, tuple)):
        return value
    autocast = [_as_list(pair) for pair in value.autocast]
    anomaly = [] if value.check_nan is None else [value.check_nan]
    return [value.grad_enabled, value.inference_mode, autocast, *anomaly]


MODES: Final = _converted(
    _plain("[grad_enabled, inference_mode, [[device type, dtype], ...]]", _is_modes),
    _pack_modes,
    lambda packed: Modes(packed[0], packed[1], tuple((p[0], p[1]) for p in packed[2]), *packed[3:]),
)

_LIMIT_NAMES: Final = {field.name for field in dataclass_fields(Limits)}


def _is_limits(value: Any) -> bool:
    return (
        type(value) is dict
        and value.keys() == _LIMIT_NAMES
        and all(_is_id(limit) and limit for limit in value.values())
    )


_LIMITS: Final = _converted(
    _plain(f"a map of {', '.join(sorted(_LIMIT_NAMES))}", _is_limits),
    lambda limits: asdict(limits) if isinstance(limits, Limits) else limits,
    lambda packed: Limits(**packed),
)

HANDSHAKE: Final = {
    "version": _VERSION,
    "name": STRING,
    "incarnation": _plain(
        "32 hexadecimal digits",
        lambda value: (
            type(value) is str and len(value) == 32 and not value.strip("0123456789abcdef")
        ),
    ),
    "limits": _LIMITS,
    "features": STRINGS,
    "heartbeat": _SECONDS,
}
