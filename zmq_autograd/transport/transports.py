"""All transports behind one: the scheme of an endpoint says which."""

from __future__ import annotations

import asyncio

from zmq_autograd.transport.base import Accept, Link, LinkHandler, Listener, Transport
from zmq_autograd.transport.endpoints import parse_endpoint
from zmq_autograd.transport.memory import MemoryTransport
from zmq_autograd.transport.zmq import ZmqTransport
from zmq_autograd.wire.limits import DEFAULT_LIMITS, Limits


class Transports:
    """Listens and dials by whatever an endpoint's scheme names."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        """Open nothing yet.

        Args:
            limits: on what one incoming message may hold.
        """
        network = ZmqTransport(limits)
        self._by_scheme: dict[str, Transport] = {
            "tcp": network,
            "ipc": network,
            "memory": MemoryTransport(limits),
        }

    async def listen(self, endpoint: str, accept: Accept) -> Listener:
        """Open `endpoint`; see `zmq_autograd.transport.base.Transport.listen`."""
        return await self._by_scheme[parse_endpoint(endpoint).scheme].listen(endpoint, accept)

    async def dial(self, endpoint: str, handler: LinkHandler, timeout: float | None) -> Link:
        """Connect to `endpoint`; see `zmq_autograd.transport.base.Transport.dial`."""
        transport = self._by_scheme[parse_endpoint(endpoint).scheme]
        return await transport.dial(endpoint, handler, timeout)

    async def close(self) -> None:
        """Close every link and listener; returns within `LINGER_SECONDS` plus a second."""
        await asyncio.gather(*(each.close() for each in set(self._by_scheme.values())))
