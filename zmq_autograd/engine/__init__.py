"""Backward passes across workers: decides which messages to send, and what to wait for.

Knows workers by two narrow protocols (`host`), never sockets or sessions.  Start reading at
`context`; docs/engine.md has the why.
"""

from zmq_autograd.engine.context import (
    BACKWARD_TIMEOUT,
    Context,
    Scope,
    current_scope,
    keeps,
    reading,
)
from zmq_autograd.engine.contexts import Contexts
from zmq_autograd.engine.host import Host, Peer, current_span

__all__ = [
    "BACKWARD_TIMEOUT",
    "Context",
    "Contexts",
    "Host",
    "Peer",
    "Scope",
    "current_scope",
    "current_span",
    "keeps",
    "reading",
]
