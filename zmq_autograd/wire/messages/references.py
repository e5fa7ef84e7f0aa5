"""Remote references: their values, and who holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from zmq_autograd.wire.messages.base import Reply, Request
from zmq_autograd.wire.messages.passes import AutogradMetadata


@dataclass(frozen=True, slots=True)
class RRefBackwardResponse(Reply):
    """The backward pass from the owner's value is complete.

    Attributes:
        committed: the context's last pass that the sender knows to be complete.
    """

    committed: int = 0


@dataclass(frozen=True, slots=True)
class RRefBackwardRequest(Request):
    """Run a backward pass from the value of an RRef, at its owner (torch: ``RRefBackwardReq``).

    Attributes:
        rref_id: the value.
        context_id: the context.
        retain_graph: keep the graph for another pass.
        accumulate_grad: add the gradients of leaves to their ``.grad`` too.
        check_nan: as in `StartPass`.
    """

    reply: ClassVar = RRefBackwardResponse
    is_limited: ClassVar = False

    rref_id: int
    context_id: int
    retain_graph: bool = False
    accumulate_grad: bool = False
    check_nan: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RRefFetchResponse(Reply):
    """The value of an RRef.

    Attributes:
        value: the value itself.
        metadata: the message that carried it, where it is on the autograd graph.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
    """

    value: Any = None
    metadata: AutogradMetadata | None = None
    committed: int = 0


@dataclass(frozen=True, slots=True)
class RRefFetchRequest(Request):
    """Ask an RRef's owner for its value (torch: ``PYTHON_RREF_FETCH_CALL``).

    Attributes:
        rref_id: the value.
        metadata: the context and message, None outside a context.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
        from_owner: the sender opened the context.
    """

    reply: ClassVar = RRefFetchResponse

    rref_id: int
    metadata: AutogradMetadata | None = None
    committed: int = 0
    from_owner: bool = False


@dataclass(frozen=True, slots=True)
class RRefForkResponse(Reply):
    """The owner counts the fork."""


@dataclass(frozen=True, slots=True)
class RRefForkRequest(Request):
    """Tell an RRef's owner of another holder (torch: ``RREF_FORK_REQUEST``).

    Attributes:
        rref_id: the value.
        fork_id: the new holder's reference.
    """

    reply: ClassVar = RRefForkResponse
    is_limited: ClassVar = False

    rref_id: int
    fork_id: int


@dataclass(frozen=True, slots=True)
class RRefAcceptResponse(Reply):
    """The parent may let go."""


@dataclass(frozen=True, slots=True)
class RRefAcceptRequest(Request):
    """Tell the holder that passed an RRef on that the new one is counted (``RREF_CHILD_ACCEPT``).

    Attributes:
        rref_id: the value.
        fork_id: the new holder's reference.
    """

    reply: ClassVar = RRefAcceptResponse
    is_limited: ClassVar = False

    rref_id: int
    fork_id: int


@dataclass(frozen=True, slots=True)
class RRefDeleteResponse(Reply):
    """The owner no longer counts that holder."""


@dataclass(frozen=True, slots=True)
class RRefDeleteRequest(Request):
    """Tell an RRef's owner that a holder let go (torch: ``RREF_USER_DELETE``); idempotent.

    Attributes:
        rref_id: the value.
        fork_id: the reference that was let go.
    """

    reply: ClassVar = RRefDeleteResponse
    is_limited: ClassVar = False

    rref_id: int
    fork_id: int
