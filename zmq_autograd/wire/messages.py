"""The message family: one frozen dataclass per type, named as torch names them.

Owns what each message means; knows nothing of bytes (see `codec`), of sessions or of what a handler
does with it.  Field by field, what is said here is what travels; ``docs/protocol.md`` has the same
table with an example of each in bytes.  Ids are unsigned 64-bit, 0 stands for none.

Messages that hold tensors compare by identity: equality of tensors is a question for torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from torch import Tensor

from zmq_autograd.wire.limits import DEFAULT_LIMITS, Limits

PROTOCOL_VERSION: Final = 1
"""The version of the wire format: two sides must name the same one."""

Gradients = Sequence[Tensor | None]
"""One gradient per tensor of the forward message, in its order; None where it is undefined."""


class Message:
    """Base of all messages."""

    __slots__ = ()


class Reply(Message):
    """A message that ends a request."""

    __slots__ = ()


class Request(Message):
    """A message that asks for exactly one reply, of the type `reply` or an `ErrorResponse`."""

    __slots__ = ()
    reply: ClassVar[type[Reply]]


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
class Modes:
    """The modes of torch under which a call was made, and so runs.

    Attributes:
        grad_enabled: as ``torch.is_grad_enabled()``.
        inference_mode: as ``torch.is_inference_mode_enabled()``.
        autocast: pairs of device type and dtype name for which autocast was on.
    """

    grad_enabled: bool = True
    inference_mode: bool = False
    autocast: tuple[tuple[str, str], ...] = ()


# --- gradients -----------------------------------------------------------------------------------


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

    metadata: AutogradMetadata
    grads: Gradients
    retain_graph: bool = False
    pass_id: int = 0


# --- calls ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ForwardResponse(Reply):
    """The result of a call (torch: ``RpcWithAutograd`` response).

    Attributes:
        result: what the function returned.
        metadata: the message that carried it back, where it is on the autograd graph.
        profiler_events: what the profiler saw, where the request asked for it.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
    """

    result: Any = None
    metadata: AutogradMetadata | None = None
    profiler_events: Any = None
    committed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ForwardRequest(Request):
    """A call of a registered function (torch: ``RpcWithAutograd`` request).

    Attributes:
        function: the registered name, with ``.method`` for a method of a registered object.
        args: positional arguments.
        kwargs: keyword arguments.
        metadata: the context and message, None outside a context.
        modes: the caller's modes of torch.
        profiler: configuration of the caller's profiler, None where none runs.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
    """

    reply: ClassVar = ForwardResponse

    function: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    metadata: AutogradMetadata | None = None
    modes: Modes = Modes()
    profiler: Any = None
    committed: int = 0


# --- contexts and passes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CleanupContextResponse(Reply):
    """The context is gone here and on every worker reached from here."""


@dataclass(frozen=True, slots=True)
class CleanupContextRequest(Request):
    """Drop a context (torch: ``CleanupAutogradContextReq``); idempotent.

    Attributes:
        context_id: the context.
        committed: its last pass that the sender knows to be complete, 0 for none.
    """

    reply: ClassVar = CleanupContextResponse

    context_id: int
    committed: int = 0


@dataclass(frozen=True, slots=True)
class StartPassResponse(Reply):
    """The receiver takes part in the pass.

    Attributes:
        is_complete: its part is complete, and so are the parts of all whom it told first; False
            if it was told of the pass before, by somebody else.
    """

    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class StartPass(Request):
    """Announce a backward pass over an edge between two workers.

    Attributes:
        context_id: the context.
        pass_id: the pass, whose turn the context's owner granted.
        message_ids: forward messages of the receiver's over which the sender will propagate
            gradients, defined or not; whatever else the receiver sent it gets none.
        retain_graph: keep the graph for another pass.
        inputs_only: accumulate no gradients of leaves: the initiator named those that it wants.
        accumulate_grad: add the gradients of leaves to their ``.grad`` too.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
    """

    reply: ClassVar = StartPassResponse

    context_id: int
    pass_id: int
    message_ids: Sequence[int] = ()
    retain_graph: bool = False
    inputs_only: bool = False
    accumulate_grad: bool = False
    committed: int = 0


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
    """The backward pass is complete everywhere."""


@dataclass(frozen=True, slots=True)
class BackwardRequest(Request):
    """Ask a context's owner, along the way the context came, to run a backward pass.

    Whoever asks first takes part in it with the roots that it keeps under `pass_id`.

    Attributes:
        context_id: the context.
        pass_id: what the pass will be called.
        retain_graph: as in `StartPass`.
        inputs_only: as in `StartPass`.
        accumulate_grad: as in `StartPass`.
    """

    reply: ClassVar = BackwardResponse

    context_id: int
    pass_id: int
    retain_graph: bool = False
    inputs_only: bool = False
    accumulate_grad: bool = False


# --- remote references ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RRefBackwardResponse(Reply):
    """The backward pass from the owner's value is complete."""


@dataclass(frozen=True, slots=True)
class RRefBackwardRequest(Request):
    """Run a backward pass from the value of an RRef, at its owner (torch: ``RRefBackwardReq``).

    Attributes:
        rref_id: the value.
        context_id: the context.
        retain_graph: keep the graph for another pass.
    """

    reply: ClassVar = RRefBackwardResponse

    rref_id: int
    context_id: int
    retain_graph: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class RRefFetchResponse(Reply):
    """The value of an RRef.

    Attributes:
        value: the value itself.
        metadata: the message that carried it, where it is on the autograd graph.
    """

    value: Any = None
    metadata: AutogradMetadata | None = None


@dataclass(frozen=True, slots=True)
class RRefFetchRequest(Request):
    """Ask an RRef's owner for its value (torch: ``PYTHON_RREF_FETCH_CALL``).

    Attributes:
        rref_id: the value.
        metadata: the context and message, None outside a context.
    """

    reply: ClassVar = RRefFetchResponse

    rref_id: int
    metadata: AutogradMetadata | None = None


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

    rref_id: int
    fork_id: int


# --- the session's own ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome(Reply):
    """Open a session: the answer to `Hello`.

    Attributes:
        name: the accepting worker's name.
        incarnation: which life of it, 32 hexadecimal digits.
        limits: what it is ready to take in.
        features: what it can do beyond this version of the protocol.
        heartbeat: seconds after which it sends a `Heartbeat` if it had nothing else to send.
        version: the version of the protocol it speaks.
    """

    name: str
    incarnation: str
    limits: Limits = DEFAULT_LIMITS
    features: Sequence[str] = ()
    heartbeat: float = 1.0
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Hello(Request):
    """Ask for a session: the first message of who dialled.

    Attributes:
        name: the dialling worker's name.
        incarnation: which life of it, 32 hexadecimal digits.
        limits: what it is ready to take in.
        features: what it can do beyond this version of the protocol.
        heartbeat: seconds after which it sends a `Heartbeat` if it had nothing else to send.
        version: the version of the protocol it speaks.
    """

    reply: ClassVar = Welcome

    name: str
    incarnation: str
    limits: Limits = DEFAULT_LIMITS
    features: Sequence[str] = ()
    heartbeat: float = 1.0
    version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    """Still here.  One way, whenever nothing else was sent for a while."""


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """The sender no longer awaits the reply to one of its requests.  One way, idempotent.

    Attributes:
        cancelled_id: the request's id.
    """

    cancelled_id: int


@dataclass(frozen=True, slots=True, eq=False)
class StatusResponse(Reply):
    """What a worker says of itself.

    Attributes:
        status: names to plain values.
    """

    status: Any = None


@dataclass(frozen=True, slots=True)
class Status(Request):
    """Ask a worker what it is doing."""

    reply: ClassVar = StatusResponse


@dataclass(frozen=True, slots=True)
class ErrorResponse(Reply):
    """The request failed; takes the place of any reply.

    Attributes:
        code: which error of `zmq_autograd.errors`; see `session.failures`.
        text: what went wrong, at most a few KiB.
        origin: the worker where it happened.
        type_name: the type of the exception raised there.
        traceback: that worker's traceback, None where it keeps it to itself.
        path: the workers that the error crossed, the one that sends this last message first.
        incarnation: of a lost worker.
        context_id: of a missing context.
        message_ids: still awaited when time ran out.
        workers: still awaited when time ran out.
        retryable: the same request may succeed if sent again.
    """

    code: str
    text: str
    origin: str
    type_name: str = ""
    traceback: str | None = None
    path: Sequence[str] = ()
    incarnation: str = ""
    context_id: int = 0
    message_ids: Sequence[int] = ()
    workers: Sequence[str] = ()
    retryable: bool = False
