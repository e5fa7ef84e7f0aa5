"""State dicts and gradients by name, as lists of items that travel in messages of bounded size.

A model may be larger than what a peer takes in of one message.  Its state travels in pieces then;
what of it waits to be fetched, or to be complete, is kept by whoever serves it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from zmq_autograd.errors import ProtocolError
from zmq_autograd.wire.limits import MAX_CONTAINERS, MIB, Limits
from zmq_autograd.wire.values import tensors_in

PIECE_BYTES: Final = 64 * MIB
"""What tensors of one piece take at most, unless one alone takes more: other messages wait for a
piece, not for a model."""

ITEM_HEADER_BYTES: Final = 256
"""What one item takes of a message's header at most, besides its key and values that are no
tensors: the tensor's dtype and shape, and the tags around it."""

Item = tuple[bool, str, Any]
"""An entry of a state dict; or, where the first is True, of its ``_metadata``."""


def items_of(state: Mapping[str, Any]) -> list[Item]:
    """Return what `state`, a state dict, holds."""
    metadata: Mapping[str, Any] = getattr(state, "_metadata", None) or {}
    return [
        *((False, key, value) for key, value in state.items()),
        *((True, key, value) for key, value in metadata.items()),
    ]


def state_of(items: Iterable[Item]) -> OrderedDict[str, Any]:
    """Return the state dict that holds `items`."""
    state: OrderedDict[str, Any] = OrderedDict()
    metadata: OrderedDict[str, Any] = OrderedDict()
    for is_metadata, key, value in items:
        (metadata if is_metadata else state)[key] = value
    # The versions of its modules' layouts: `load_state_dict` would take a state without for an old
    # one, and change it.
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def in_pieces(items: Iterable[Item], limits: Limits) -> list[list[Item]]:
    """Return `items` in as many lists as messages are needed to a side of these `limits`.

    What is too large for any message has one of its own, and sending that says so.
    """
    # Half of it is room enough for the rest of the message.
    most = (
        min(PIECE_BYTES, limits.message_bytes // 2),
        limits.header_bytes // 2,
        limits.frames // 2,
        MAX_CONTAINERS // 16,
    )
    pieces: list[list[Item]] = []
    room: tuple[int, ...] = ()
    for item in items:
        room = tuple(left - size for left, size in zip(room, _sizes(item), strict=False))
        if not room or min(room) < 0:
            pieces.append([])
            room = tuple(left - size for left, size in zip(most, _sizes(item), strict=True))
        pieces[-1].append(item)
    return pieces


def size_of(items: Iterable[Item]) -> int:
    """Return the bytes of all tensors in `items`."""
    return sum(_sizes(item)[0] for item in items)


def _sizes(item: Item) -> tuple[int, int, int, int]:
    """Return what `item` takes: bytes of tensors and of the header, frames, and containers."""
    tensors = list(tensors_in(item[2]))
    header = len(item[1].encode()) + ITEM_HEADER_BYTES * max(1, len(tensors))
    return sum(map(_bytes, tensors)), header, len(tensors), 1


def _bytes(tensor: Tensor) -> int:
    if tensor.layout is torch.strided:
        return tensor.nbytes
    return tensor._indices().nbytes + tensor._values().nbytes


def checked_items(value: Any) -> list[Item]:
    """Return `value`, which arrived, as the items that it should be.

    Raises:
        ProtocolError: it is something else.
    """
    if not isinstance(value, list) or not all(map(_is_item, value)):
        raise ProtocolError("state: expected a list of (is metadata, key, value)")
    return value


def _is_item(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) == 3
        and type(value[0]) is bool
        and isinstance(value[1], str)
    )
