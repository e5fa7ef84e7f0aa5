"""Arguments and results to plain msgpack and back.

Owns which values can travel: None, bool, int, float, complex, str, bytes, Tensor, what stands for
an object (`objects`), and lists, tuples and dicts of them.  What msgpack has stands for itself;
everything else is a map with exactly one key, its tag, so that a map is never data::

    (1, 2)          {"tuple": [1, 2]}
    {"a": 1}        {"dict": [["a", 1]]}
    1j              {"complex": [0.0, 1.0]}
    2**70           {"int": <9 bytes, big-endian, two's complement>}
    a tensor        {"tensor": 0}               the index of its frame
    a sparse one    {"sparse": [0, 1, [3, 3], false]}   of its two, its shape, is_coalesced
    an RRef         {"rref": [owner, incarnation, rref_id, fork_id, [endpoint, ...]]}
    an object       {"coded": [codec, value]}

No msgpack extension types, no names of classes: what arrives can only become these values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from torch import Tensor

from zmq_autograd.errors import ProtocolError, SerializationError
from zmq_autograd.ids import MAX_ID
from zmq_autograd.wire.limits import MAX_CONTAINERS, MAX_NESTING, MAX_NUMBER_KEYS
from zmq_autograd.wire.objects import Coded, Reference
from zmq_autograd.wire.tensors import TensorReader, TensorWriter

_MIN_INT: Final = -(2**63)
_MAX_INT: Final = 2**64 - 1
_PLAIN_TYPES: Final = frozenset((type(None), bool, int, float, str, bytes))
_KEY_TYPES: Final = (str, int, float, bytes, type(None))


def pack_value(value: Any, tensors: TensorWriter, depth: int = 0) -> Any:
    """Return `value` as msgpack can hold it; its tensors go to `tensors`.

    Raises:
        SerializationError: something inside cannot travel; it says what and what to do.
    """
    if value is None or isinstance(value, (bool, str, bytes)):
        return value
    if isinstance(value, Tensor):
        _count(tensors)
        place = tensors.add_once(value)
        return {"sparse" if isinstance(place, list) else "tensor": place}
    if isinstance(value, (int, float, complex)):
        return _pack_number(value, tensors)
    if isinstance(value, (list, tuple, dict, Coded)):
        return _pack_container(value, tensors, depth)
    if isinstance(value, Reference):
        _count(tensors)
        ids = [value.rref_id, value.fork_id]
        return {"rref": [value.owner, value.incarnation, *ids, list(value.endpoints)]}
    raise SerializationError(
        f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot travel: send "
        "tensors, numbers, str, bytes, None, RRefs, or lists, tuples and dicts of them, or "
        "register a codec for it"
    )


def unpack_value(packed: object, tensors: TensorReader, depth: int = 0) -> Any:
    """Return the value that `pack_value` packed.

    Raises:
        ProtocolError: `packed` is nothing that `pack_value` makes.
    """
    if type(packed) in _PLAIN_TYPES:
        return packed
    if type(packed) is list:
        return _unpack_items(packed, tensors, depth)
    if type(packed) is not dict or len(packed) != 1:
        raise ProtocolError(f"value: expected a map of one tag, got {type(packed).__name__}")
    ((tag, body),) = packed.items()
    unpack = _TAGS.get(tag)
    if unpack is None:
        raise ProtocolError(f"value: unknown tag {tag[:40]!r}")
    return unpack(body, tensors, depth)


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Yield every tensor in `value`, in the order of their frames, as deep as values can travel."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)) and depth <= MAX_NESTING:
        for item in _not_plain(value):
            yield from tensors_in(item, depth + 1)
    elif isinstance(value, Coded) and depth <= MAX_NESTING:
        yield from tensors_in(value.value, depth + 1)


def contains(value: Any, kind: type | tuple[type, ...], depth: int = 0) -> bool:
    """Tell whether `value` is, or has in it as deep as values can travel, one of `kind`."""
    if type(value) in _PLAIN_TYPES:
        return False
    if isinstance(value, kind):
        return True
    if depth > MAX_NESTING:
        return False
    if isinstance(value, (list, tuple, dict)):
        return any(contains(item, kind, depth + 1) for item in _not_plain(value))
    return isinstance(value, Coded) and contains(value.value, kind, depth + 1)


def replaced(
    value: Any, kind: type | tuple[type, ...], replace: Callable[[Any], Any], depth: int = 0
) -> Any:
    """Return `value` with whatever in it is one of `kind` replaced, without looking into that."""
    if type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, kind):
        return replace(value)
    if depth > MAX_NESTING:
        return value
    if isinstance(value, (list, tuple)):
        items = [replaced(item, kind, replace, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {k: replaced(v, kind, replace, depth + 1) for k, v in value.items()}
    if isinstance(value, Coded):
        return Coded(value.codec, replaced(value.value, kind, replace, depth + 1))
    return value


def _not_plain(container: Any) -> Collection[Any]:
    """Return what is in a list, tuple or dict; nothing if all of it is plain."""
    items: Collection[Any] = container.values() if isinstance(container, dict) else container
    return () if _PLAIN_TYPES.issuperset(map(type, items)) else items


def _pack_container(value: Any, tensors: TensorWriter, depth: int) -> Any:
    if depth == MAX_NESTING:
        raise SerializationError(f"a value nested deeper than {MAX_NESTING} levels cannot travel")
    _count(tensors, 1 + (len(value) if isinstance(value, dict) else 0))
    if isinstance(value, Coded):
        return {"coded": [value.codec, pack_value(value.value, tensors, depth + 1)]}
    if isinstance(value, list):
        return [pack_value(item, tensors, depth + 1) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [pack_value(item, tensors, depth + 1) for item in value]}
    if _has_too_many_numbers(value):
        raise SerializationError(
            f"a dict with more than {MAX_NUMBER_KEYS} numbers as keys cannot travel: "
            "send a list of pairs"
        )
    return {"dict": [_pack_item(k, v, tensors, depth + 1) for k, v in value.items()]}


def _count(tensors: TensorWriter, more: int = 1) -> None:
    tensors.containers += more
    if tensors.containers > MAX_CONTAINERS:
        raise SerializationError(
            f"more than {MAX_CONTAINERS} lists, tuples, dicts and values that are not plain cannot "
            "travel in one message: send tensors"
        )


def _pack_item(key: Any, value: Any, tensors: TensorWriter, depth: int) -> list[Any]:
    if not isinstance(key, _KEY_TYPES):
        raise SerializationError(
            f"a dict key of type {type(key).__name__} cannot travel: use str, numbers, bytes, None"
        )
    return [pack_value(key, tensors, depth), pack_value(value, tensors, depth)]


def _pack_number(value: complex, tensors: TensorWriter) -> Any:
    if isinstance(value, int):
        if _MIN_INT <= value <= _MAX_INT:
            return int(value)
        _count(tensors)
        return {"int": value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)}
    if isinstance(value, float):
        return float(value)
    _count(tensors)
    return {"complex": [value.real, value.imag]}


def _has_too_many_numbers(keys: Collection[Any]) -> bool:
    if len(keys) <= MAX_NUMBER_KEYS:
        return False
    return sum(isinstance(key, (int, float)) for key in keys) > MAX_NUMBER_KEYS


def _one_deeper(tensors: TensorReader, depth: int, *, entries: int = 0) -> int:
    """Enter one more list, tuple or dict of the message."""
    if depth == MAX_NESTING:
        raise ProtocolError(f"value nested deeper than {MAX_NESTING} levels")
    _note(tensors, 1 + entries)
    return depth + 1


def _note(tensors: TensorReader, more: int = 1) -> None:
    tensors.containers += more
    if tensors.containers > MAX_CONTAINERS:
        raise ProtocolError(
            f"more than {MAX_CONTAINERS} lists, tuples, dicts and values that are not plain"
        )


def _unpack_items(packed: list[Any], tensors: TensorReader, depth: int) -> list[Any]:
    inner = _one_deeper(tensors, depth)
    if _PLAIN_TYPES.issuperset(map(type, packed)):  # a million numbers in milliseconds
        return packed
    return [unpack_value(item, tensors, inner) for item in packed]


def _unpack_tensor(body: object, tensors: TensorReader, depth: int) -> Tensor:
    return tensors.take(body)


def _unpack_sparse(body: object, tensors: TensorReader, depth: int) -> Tensor:
    return tensors.take_sparse(body)


def _unpack_tuple(body: object, tensors: TensorReader, depth: int) -> tuple[Any, ...]:
    if type(body) is not list:
        raise ProtocolError(f"value: expected a list in a tuple, got {type(body).__name__}")
    return tuple(_unpack_items(body, tensors, depth))


def _unpack_dict(body: object, tensors: TensorReader, depth: int) -> dict[Any, Any]:
    if type(body) is not list or not all(type(pair) is list and len(pair) == 2 for pair in body):
        raise ProtocolError("value: expected a list of [key, value] in a dict")
    inner = _one_deeper(tensors, depth, entries=len(body))
    keys = [unpack_value(key, tensors, inner) for key, _ in body]
    for key in keys:
        if not isinstance(key, _KEY_TYPES):
            raise ProtocolError(f"value: a dict key cannot be a {type(key).__name__}")
    if _has_too_many_numbers(keys):
        raise ProtocolError(f"value: a dict has more than {MAX_NUMBER_KEYS} numbers as keys")
    values = [unpack_value(value, tensors, inner) for _, value in body]
    unpacked = dict(zip(keys, values, strict=True))
    if len(unpacked) != len(body):
        raise ProtocolError("value: a dict has the same key twice")
    return unpacked


def _unpack_complex(body: object, tensors: TensorReader, depth: int) -> complex:
    if type(body) is not list or len(body) != 2 or any(type(part) is not float for part in body):
        raise ProtocolError("value: expected two floats in a complex")
    return complex(*body)


def _unpack_int(body: object, tensors: TensorReader, depth: int) -> int:
    if type(body) is not bytes or len(body) < 9:
        raise ProtocolError("value: expected at least 9 bytes in an int")
    return int.from_bytes(body, "big", signed=True)


def _unpack_reference(body: object, tensors: TensorReader, depth: int) -> Reference:
    _note(tensors)
    if type(body) is list and len(body) == 5:
        owner, incarnation, rref_id, fork_id, endpoints = body
        if (
            (type(owner), type(incarnation), type(endpoints)) == (str, str, list)
            and all(type(number) is int and 0 < number <= MAX_ID for number in (rref_id, fork_id))
            and all(type(endpoint) is str for endpoint in endpoints)
        ):
            return Reference(owner, incarnation, rref_id, fork_id, tuple(endpoints))
    raise ProtocolError(
        "value: expected [owner, incarnation, rref id, fork id, [endpoint, ...]] in an rref"
    )


def _unpack_coded(body: object, tensors: TensorReader, depth: int) -> Coded:
    if type(body) is not list or len(body) != 2 or type(body[0]) is not str:
        raise ProtocolError("value: expected [codec, value] in a coded")
    return Coded(body[0], unpack_value(body[1], tensors, _one_deeper(tensors, depth)))


_TAGS: Final[dict[str, Callable[[object, TensorReader, int], Any]]] = {
    "tensor": _unpack_tensor,
    "sparse": _unpack_sparse,
    "tuple": _unpack_tuple,
    "dict": _unpack_dict,
    "complex": _unpack_complex,
    "int": _unpack_int,
    "rref": _unpack_reference,
    "coded": _unpack_coded,
}
