"""Messages about contexts and backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from zmq_autograd.wire.messages.base import Reply, Request

Gradients = Sequence[Tensor | None]
"""One gradient per tensor of the forward message, in its order; None where it is undefined."""


@dataclass(frozen=True, slots=True)
class AutogradMetadata:
    """Which send and receive functions belong together (torch: ``AutogradMetadata``).

    Attributes:
        context_id: the distributed autograd context.
        message_id: the forward message within it, the same on both sides.
    """

    context_id: int
    message_id: int


@dataclass(frozen=True, slots=True)
class PropagateGradientsResponse(Reply):
    """The gradients were taken over (torch: ``PropagateGradientsResp``)."""


@dataclass(frozen=True, slots=True, eq=False)
class PropagateGradientsRequest(Request):
    """Gradients on their way back over one forward message (torch: ``PropagateGradientsReq``).

    Sent by the worker that received the forward message to the one that sent it.

    Attributes:
        metadata: the context, and the forward message.
        grads: one per tensor of that message; None where undefined (nothing travels for it).
        retain_graph: keep the graph for another pass.
        pass_id: the backward pass, 0 outside the engine.
    """

    reply: ClassVar = PropagateGradientsResponse
    is_limited: ClassVar = False

    metadata: AutogradMetadata
    grads: Gradients
    retain_graph: bool = False
    pass_id: int = 0


@dataclass(frozen=True, slots=True)
class CleanupContextResponse(Reply):
    """The context is gone here and on every worker reached from here."""


@dataclass(frozen=True, slots=True)
class CleanupContextRequest(Request):
    """Drop a context (torch: ``CleanupAutogradContextReq``); idempotent.

    Attributes:
        context_id: the context.
        committed: its last pass that the sender knows to be complete, 0 for none.
        lost: the worker whose loss on the way to the owner is why, empty if the owner ended it.
    """

    reply: ClassVar = CleanupContextResponse
    is_limited: ClassVar = False

    context_id: int
    committed: int = 0
    lost: str = ""


@dataclass(frozen=True, slots=True)
class StartPassResponse(Reply):
    """The pass is known here.

    Attributes:
        is_complete: this worker's part is complete, and so are the parts of all whom it told first;
            False if it was told of the pass before, by somebody else.
        takes_part: False if no gradients will come from here: nothing of the context is known, or
            nothing was exchanged with the sender when the pass began here.
    """

    is_complete: bool = True
    takes_part: bool = True


@dataclass(frozen=True, slots=True)
class StartPass(Request):
    """Announce a backward pass over an edge between two workers.

    Attributes:
        context_id: the context.
        pass_id: the pass; the context's owner counts them from 1.
        message_ids: forward messages of the receiver's over which the sender will propagate
            gradients, defined or not; whatever else the receiver sent it gets none.
        awaited_ids: forward messages of the sender's over which it awaits gradients from the
            receiver.  Who hears of the pass by this message answers with a `StartPass` of its own,
            unless it will propagate exactly those.
        retain_graph: keep the graph for another pass.
        inputs_only: accumulate no gradients of leaves: the initiator named those that it wants.
        accumulate_grad: add the gradients of leaves to their ``.grad`` too.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
        asked_id: the `BackwardRequest` that asked for it, 0 if the owner did.
        check_nan: whether anomaly mode looks for NaN, None where that is off.
    """

    reply: ClassVar = StartPassResponse
    is_limited: ClassVar = False

    context_id: int
    pass_id: int
    message_ids: Sequence[int] = ()
    awaited_ids: Sequence[int] = ()
    retain_graph: bool = False
    inputs_only: bool = False
    accumulate_grad: bool = False
    committed: int = 0
    asked_id: int = 0
    check_nan: bool | None = None


@dataclass(frozen=True, slots=True)
class CommitPassResponse(Reply):
    """The pass's gradients are the context's now."""


@dataclass(frozen=True, slots=True)
class CommitPass(Request):
    """Tell that a pass is complete everywhere, where no other message of the context says so.

    Attributes:
        context_id: the context.
        committed: the pass.
    """

    reply: ClassVar = CommitPassResponse
    is_limited: ClassVar = False

    context_id: int
    committed: int


@dataclass(frozen=True, slots=True)
class AbortPassResponse(Reply):
    """Nothing of the pass is left here.

    Attributes:
        message_ids: forward messages whose gradients were awaited here and behind.
        workers: the workers that they were awaited from, and those still busy.
    """

    message_ids: Sequence[int] = ()
    workers: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class AbortPass(Request):
    """End a backward pass everywhere, with its first cause, whose fields are `ErrorResponse`'s.

    From who told the receiver of the pass it is to be obeyed; from anybody else it goes up to the
    context's owner, who decides.

    Attributes:
        context_id: the context.
        pass_id: the pass.
        code: what went wrong.
        text: in words.
        origin: the worker where it was seen.
        type_name: the type of the exception raised there.
        traceback: that worker's traceback, None where it keeps it to itself.
        path: the workers that it crossed, the one that sends this last message first.
        incarnation: of a lost worker.
        message_ids: still awaited when time ran out.
        workers: still awaited when time ran out.
    """

    reply: ClassVar = AbortPassResponse
    is_limited: ClassVar = False

    context_id: int
    pass_id: int
    code: str
    text: str
    origin: str
    type_name: str = ""
    traceback: str | None = None
    path: Sequence[str] = ()
    incarnation: str = ""
    message_ids: Sequence[int] = ()
    workers: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class BackwardResponse(Reply):
    """The backward pass is complete everywhere.

    Attributes:
        pass_id: what the owner called it.
    """

    pass_id: int = 0


@dataclass(frozen=True, slots=True)
class BackwardRequest(Request):
    """Ask a context's owner, along the way the context came, to run a backward pass.

    Whoever asked takes part in it, once it starts, with the roots that it keeps under `asked_id`.

    Attributes:
        context_id: the context.
        asked_id: which request this is, on its whole way.
        retain_graph: as in `StartPass`.
        inputs_only: as in `StartPass`.
        accumulate_grad: as in `StartPass`.
        check_nan: as in `StartPass`.
    """

    reply: ClassVar = BackwardResponse
    is_limited: ClassVar = False

    context_id: int
    asked_id: int
    retain_graph: bool = False
    inputs_only: bool = False
    accumulate_grad: bool = False
    check_nan: bool | None = None
