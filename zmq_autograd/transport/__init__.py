"""Moves lists of frames between processes, never knowing what they mean.

`zmq_autograd.transport.base` has the contract; `zmq_autograd.transport.zmq` keeps it over a network
and `zmq_autograd.transport.memory` inside a process.  `Transports` picks by an endpoint's scheme
and is what a node uses.
"""

from __future__ import annotations

from zmq_autograd.transport.base import (
    HIGH_WATER_BYTES,
    LINGER_SECONDS,
    UNADMITTED_BYTES,
    UNADMITTED_SECONDS,
    Accept,
    Buffer,
    Link,
    LinkClosed,
    LinkHandler,
    Listener,
    Silence,
    Transport,
)
from zmq_autograd.transport.endpoints import Endpoint, is_loopback, parse_endpoint
from zmq_autograd.transport.memory import MemoryLink, MemoryListener, MemoryTransport
from zmq_autograd.transport.transports import Transports
from zmq_autograd.transport.zmq import ZmqTransport

__all__ = [
    "Link",
    "LinkHandler",
    "Listener",
    "Transport",
    "Accept",
    "Buffer",
    "Silence",
    "LinkClosed",
    "Transports",
    "ZmqTransport",
    "MemoryTransport",
    "MemoryListener",
    "MemoryLink",
    "Endpoint",
    "parse_endpoint",
    "is_loopback",
    "UNADMITTED_BYTES",
    "UNADMITTED_SECONDS",
    "HIGH_WATER_BYTES",
    "LINGER_SECONDS",
]
