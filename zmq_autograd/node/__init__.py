"""One running worker inside: channels, handlers, registered functions and compute threads."""

from zmq_autograd.node.caller import Caller, Home, call_owned, has_not_left
from zmq_autograd.node.channel import Channel
from zmq_autograd.node.codecs import Codecs
from zmq_autograd.node.compute import compute
from zmq_autograd.node.current import current_call, current_modes
from zmq_autograd.node.dispatcher import Dispatcher, Handler
from zmq_autograd.node.forks import Fork, Held
from zmq_autograd.node.node import Node
from zmq_autograd.node.registry import RESERVED_PREFIX, Expose, Registry

__all__ = [
    "Caller",
    "Channel",
    "Codecs",
    "Dispatcher",
    "Expose",
    "Fork",
    "Handler",
    "Held",
    "Home",
    "Node",
    "RESERVED_PREFIX",
    "Registry",
    "call_owned",
    "compute",
    "current_call",
    "current_modes",
    "has_not_left",
]
