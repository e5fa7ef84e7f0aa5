"""The message family: one frozen dataclass per type, named as torch names them.

Owns what each message means; knows nothing of bytes (see `codec`), of sessions or of what a handler
does with it.  Field by field, what is said here is what travels; ``docs/protocol.md`` has the same
table with an example of each in bytes.  Ids are unsigned 64-bit, 0 stands for none.

Messages that hold tensors compare by identity: equality of tensors is a question for torch.
"""

from zmq_autograd.wire.messages.base import (
    Message,
    Reply,
    Request,
)
from zmq_autograd.wire.messages.calls import (
    ForwardRequest,
    ForwardResponse,
    Modes,
)
from zmq_autograd.wire.messages.passes import (
    AbortPass,
    AbortPassResponse,
    AutogradMetadata,
    BackwardRequest,
    BackwardResponse,
    CleanupContextRequest,
    CleanupContextResponse,
    CommitPass,
    CommitPassResponse,
    Gradients,
    PropagateGradientsRequest,
    PropagateGradientsResponse,
    StartPass,
    StartPassResponse,
)
from zmq_autograd.wire.messages.references import (
    RRefAcceptRequest,
    RRefAcceptResponse,
    RRefBackwardRequest,
    RRefBackwardResponse,
    RRefDeleteRequest,
    RRefDeleteResponse,
    RRefFetchRequest,
    RRefFetchResponse,
    RRefForkRequest,
    RRefForkResponse,
)
from zmq_autograd.wire.messages.sessions import (
    PROTOCOL_VERSION,
    Cancel,
    ErrorResponse,
    Heartbeat,
    Hello,
    Status,
    StatusResponse,
    Welcome,
)

__all__ = [
    "Message",
    "Reply",
    "Request",
    "ForwardRequest",
    "ForwardResponse",
    "Modes",
    "AbortPass",
    "AbortPassResponse",
    "AutogradMetadata",
    "BackwardRequest",
    "BackwardResponse",
    "CleanupContextRequest",
    "CleanupContextResponse",
    "CommitPass",
    "CommitPassResponse",
    "Gradients",
    "PropagateGradientsRequest",
    "PropagateGradientsResponse",
    "StartPass",
    "StartPassResponse",
    "RRefAcceptRequest",
    "RRefAcceptResponse",
    "RRefBackwardRequest",
    "RRefBackwardResponse",
    "RRefDeleteRequest",
    "RRefDeleteResponse",
    "RRefFetchRequest",
    "RRefFetchResponse",
    "RRefForkRequest",
    "RRefForkResponse",
    "Cancel",
    "ErrorResponse",
    "Heartbeat",
    "Hello",
    "PROTOCOL_VERSION",
    "Status",
    "StatusResponse",
    "Welcome",
]
