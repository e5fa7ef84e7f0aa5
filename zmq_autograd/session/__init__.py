"""Two workers share a session: handshake, requests both ways, deadlines, liveness; without I/O.

`state` is the machine, `liveness` its arithmetic of time, `failures` how errors cross it.
"""

from zmq_autograd.session.actions import (
    HEARTBEAT_SECONDS,
    Action,
    Close,
    FinishRequest,
    HandleRequest,
    Identity,
    Opened,
    Send,
    StopRequest,
)
from zmq_autograd.session.deadlines import checked_timeout
from zmq_autograd.session.failures import error_response, exception_from
from zmq_autograd.session.liveness import LOST_AFTER_SECONDS
from zmq_autograd.session.state import Session, State

__all__ = [
    "Action",
    "Close",
    "FinishRequest",
    "HEARTBEAT_SECONDS",
    "HandleRequest",
    "Identity",
    "LOST_AFTER_SECONDS",
    "Opened",
    "Send",
    "Session",
    "State",
    "StopRequest",
    "checked_timeout",
    "error_response",
    "exception_from",
]
