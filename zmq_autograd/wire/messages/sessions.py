"""The session's own messages, and errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from zmq_autograd.wire.limits import DEFAULT_LIMITS, Limits
from zmq_autograd.wire.messages.base import Message, Reply, Request

PROTOCOL_VERSION: Final = 1
"""The version of the wire format: two sides must name the same one."""


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
