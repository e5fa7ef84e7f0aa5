"""What RRefs stand on: forks, the values that they refer to, and the messages that they are in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeVar, cast

from zmq_autograd.node.registry import Entry, Turns
from zmq_autograd.wire.messages import (
    ForwardRequest,
    ForwardResponse,
    Message,
    RRefFetchResponse,
)
from zmq_autograd.wire.objects import Reference
from zmq_autograd.wire.values import contains, replaced

M = TypeVar("M", bound=Message)


@dataclass(slots=True, eq=False)
class Fork:
    """One holder's reference: what the object that a user holds stands on.

    Attributes:
        rref_id: the value.
        fork_id: this reference.
        reference: who the value's owner is, and where.
        peer: the owner, None on the owner itself and until it has been reached.
        is_claimed: the owner counts it, or was asked to in vain.
        is_let_go: nobody holds it any more.
        is_refused: it is good for nothing: it came twice, or home from a worker that the owner
            counts no fork of.
    """

    rref_id: int
    fork_id: int
    reference: Reference
    peer: Any = None
    is_claimed: bool = True
    is_let_go: bool = False
    is_refused: bool = False


class Held:
    """Base of what users hold of an RRef: letting go of the object lets go of its fork."""

    __slots__ = ("__weakref__", "fork")

    def __init__(self, fork: Fork) -> None:
        self.fork = fork

    def __reduce__(self) -> NoReturn:
        # A copy would share the fork, and lose it with the object that it was made of.
        raise TypeError("an RRef cannot be copied or pickled: pass it on in a call")


@dataclass(slots=True, eq=False)
class Owned:
    """A value that lives here.

    Attributes:
        value: it.
        turns: lets its methods run in turn; None before one is asked for.
        methods: those that its class offers, by name; None likewise.
        forks: who holds it, by fork id: the peer, None for this worker itself.
    """

    value: Any
    turns: Turns | None = None
    methods: dict[str, Entry] | None = None
    forks: dict[int, Any] = field(default_factory=dict)

    def is_held_by(self, peer: Any) -> bool:
        """Tell whether `peer` holds it, None for this worker itself; from any thread."""
        return any(is_same(holder, peer) for holder in list(self.forks.values()))

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Return what is entered to have no method of it running."""
        return nullcontext() if self.turns is None else self.turns.here()


Given = list[tuple[int, int]]
"""The forks that were made for one message: the value's id and the fork's, each time."""


def is_same(holder: Any, peer: Any) -> bool:
    """Tell whether two are the same worker, over whichever session; None is this worker itself."""
    if holder is None or peer is None:
        return holder is peer
    return bool(holder.incarnation == peer.incarnation)


_VALUES: Final[dict[type[Message], tuple[str, ...]]] = {
    ForwardRequest: ("args", "kwargs"),
    ForwardResponse: ("result",),
    RRefFetchResponse: ("value",),
}
"""The fields that hold values of users."""


def with_values(message: M, kind: type, replace: Callable[[Any], Any]) -> M:
    """Return `message` with whatever in its values is of `kind` replaced."""
    changed = {}
    for name in _VALUES.get(type(message), ()):
        value = getattr(message, name)
        if contains(value, kind):
            changed[name] = replaced(value, kind, replace)
    return cast(M, dataclasses.replace(cast(Any, message), **changed)) if changed else message
