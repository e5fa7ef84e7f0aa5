"""Who the ends of a session are, and what a session tells its owner to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from zmq_autograd.errors import ZmqAutogradError
from zmq_autograd.wire import Envelope, Limits
from zmq_autograd.wire.limits import DEFAULT_LIMITS
from zmq_autograd.wire.messages import Message, Reply, Request

HEARTBEAT_SECONDS: Final = 1.0
"""Default time without anything sent after which a heartbeat goes out."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who one end of a session is.

    Attributes:
        name: the worker's name.
        incarnation: which life of it.
        limits: what it is ready to take in.
        features: what it can do beyond the protocol's version.
        heartbeat: seconds after which it sends something at the latest.
    """

    name: str
    incarnation: str
    limits: Limits = DEFAULT_LIMITS
    features: tuple[str, ...] = ()
    heartbeat: float = HEARTBEAT_SECONDS


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` in `envelope`."""

    envelope: Envelope
    message: Message


@dataclass(frozen=True, slots=True)
class Opened:
    """The handshake is done; `peer` is at the other end."""

    peer: Identity


@dataclass(frozen=True, slots=True)
class HandleRequest:
    """The peer sent a request: handle it and `Session.reply` to `request_id`.

    `deadline`, on the session's clock, is when the peer stops waiting; None for never.
    """

    request_id: int
    message: Request
    deadline: float | None


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Nobody awaits the reply to `request_id` of the peer's any more."""

    request_id: int


@dataclass(frozen=True, slots=True)
class FinishRequest:
    """Our request `request_id` ended with `outcome`: a reply, or the error to raise."""

    request_id: int
    outcome: Reply | ZmqAutogradError


@dataclass(frozen=True, slots=True)
class Close:
    """Send what is queued and close the link; `reason` says why, for people."""

    reason: str


Action = Send | Opened | HandleRequest | StopRequest | FinishRequest | Close
