"""Backward passes across workers: decides which messages to send, and what to wait for.

Knows workers by two narrow protocols (`host`), never sockets or sessions.  Start reading at
`context`; docs/engine.md has the why.
"""

from zmq_autograd.engine.context import BACKWARD_TIMEOUT, Context, local_context
from zmq_autograd.engine.contexts import Contexts
from zmq_autograd.engine.host import Host, Peer, current_span
from zmq_autograd.engine.local_context import LocalContext, Scope, current_scope, keeps

__all__ = [
    "BACKWARD_TIMEOUT",
    "Context",
    "Contexts",
    "Host",
    "LocalContext",
    "Peer",
    "Scope",
    "current_scope",
    "current_span",
    "keeps",
    "local_context",
]
