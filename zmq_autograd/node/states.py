"""States of modules and optimizers, as lists of items that travel in messages of bounded size.

A model may be larger than what a peer takes in of one message.  Its state travels in pieces then:
`read_all` and `load_all` ask for that, `States` serves it, and keeps what waits to be fetched, or
to be complete.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import Tensor

from zmq_autograd.errors import ProtocolError, ResourceExhausted
from zmq_autograd.node.current import served_call, served_value
from zmq_autograd.wire.limits import MAX_CONTAINERS, MIB, Limits
from zmq_autograd.wire.values import tensors_in

PIECE_BYTES: Final = 64 * MIB
"""What tensors of one piece take at most, unless one alone takes more: other messages wait for a
piece, not for a model."""

ITEM_HEADER_BYTES: Final = 256
"""What one item takes of a message's header at most, besides its key and values that are no
tensors: the tensor's dtype and shape, and the tags around it."""

MOST_STATES: Final = 8
"""What may be kept of the states of one object, in sizes of its own: float64 values for a module of
one byte each, or the states that eight peers are fetching.  What is no tensor is counted as the
headers that it came in, full ones."""

Item = tuple[bool, str, Any]
"""An entry of a state dict; or, where the first is True, of its ``_metadata``."""

Handed = tuple[list[Item], Any, int]
"""The first piece of a state, an RRef to all if there are more, and how many there are."""

Method = Callable[[str], Callable[..., Awaitable[Any]]]
"""Makes a coroutine function of the name of a method of a remote object."""


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


# --- in pieces -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Kept:
    """A state that travels in pieces, some of which are still to be fetched, or to come.

    Attributes:
        pieces: as far as they are there.
        size: the bytes that they are counted as.
    """

    pieces: list[list[Item]] = field(default_factory=list)
    size: int = 0


class States:
    """The states of one object that travel in pieces, each kept as long as a peer holds an RRef.

    What is kept of all of them together is bounded; beyond that ResourceExhausted is raised.
    """

    def __init__(self, own: Callable[[], Iterable[Item]], what: str) -> None:
        """Keep no more than `MOST_STATES` times what `own` returns, which errors call `what`."""
        self._own = own
        self._what = what
        self._kept: WeakSet[Kept] = WeakSet()

    def hand_out(self, items: Iterable[Item]) -> Handed:
        """Return what the peer is told of `items`; keep them if one message is too small."""
        pieces = in_pieces(items, served_call().peer.limits) or [[]]
        if len(pieces) == 1:
            return pieces[0], None, 1
        kept = Kept()
        self._keep(kept, pieces)
        return pieces[0], served_call().node.rrefs.keep(kept), len(pieces)

    async def read_piece(self, rref: Any, number: int) -> list[Item]:
        """Return another piece of what was handed out."""
        pieces = _kept_by(rref).pieces
        if type(number) is not int or number not in range(len(pieces)):
            raise ProtocolError(f"state: expected a piece below {len(pieces)}, got {number!r:.100}")
        return pieces[number]

    async def add_piece(self, piece: list[Item], rref: Any = None) -> Any:
        """Keep another piece of a state that is to be loaded; return an RRef to all of them."""
        kept = Kept() if rref is None else _kept_by(rref)
        self._keep(kept, [checked_items(piece)])
        return served_call().node.rrefs.keep(kept) if rref is None else rref

    def whole(self, last: list[Item], rref: Any) -> list[Item]:
        """Return a state that is to be loaded: the pieces that `rref` refers to, and the last."""
        pieces = [] if rref is None else _kept_by(rref).pieces
        return [item for piece in [*pieces, checked_items(last)] for item in piece]

    def check_size(self, size: int) -> None:
        """Raise ResourceExhausted if that is more than may be kept, in bytes."""
        most = MOST_STATES * counted(self._own())
        if size > most:
            name = served_call().node.name
            raise ResourceExhausted(
                f"worker {name!r} would keep states of {size} bytes: the limit is {most}, "
                f"{MOST_STATES} times what {self._what}",
                worker=name,
            )

    def _keep(self, kept: Kept, pieces: list[list[Item]]) -> None:
        size = sum(map(counted, pieces))
        self.check_size(size + sum(each.size for each in {kept, *self._kept}))
        kept.pieces += pieces
        kept.size += size
        self._kept.add(kept)


def counted(items: Iterable[Item]) -> int:
    """Return the bytes that `items` are counted as: what they take in messages to this worker."""
    limits: Limits = served_call().node.me.limits
    return sum(size_of(piece) + limits.header_bytes for piece in in_pieces(items, limits))


def _kept_by(rref: Any) -> Kept:
    return served_value(rref, Kept, "a state that is kept")


async def read_all(method: Method, name: str) -> list[Item]:
    """Return all that the method `name` of a remote object hands out."""
    handed = await method(name)()
    if not isinstance(handed, tuple) or len(handed) != 3 or not isinstance(handed[2], int):
        raise ProtocolError("state: expected a piece, an RRef and how many pieces there are")
    first, kept, count = handed
    items = checked_items(first)
    for number in range(1, count):
        items += checked_items(await method("read_piece")(kept, number))
    return items


async def load_all(method: Method, items: Iterable[Item], limits: Limits, *args: Any) -> Any:
    """Have a remote object load `items`, in messages to a worker of these `limits`.

    `args` go with the last piece; what the object says to that is returned.
    """
    *pieces, last = in_pieces(items, limits) or [[]]
    kept = None
    for piece in pieces:
        kept = await method("add_piece")(piece, kept)
    return await method("load_pieces")(last, kept, *args)
