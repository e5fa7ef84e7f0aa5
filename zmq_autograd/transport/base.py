"""The contract that every transport keeps; what moves is lists of frames, never their meaning.

A `Link` is one connection to one peer: it lives until one side closes it or it breaks, and is
never re-established under the same object, so nothing meant for one life of a peer can reach the
next.  A `Listener` accepts links, `Transport.dial` makes them.

Rules of the contract, held for each transport by ``tests/contract``:

1. All callbacks run in the event loop's thread, one at a time, and must not block.
2. Messages arrive whole, in order, each once, or the link is lost and its handler hears so.
3. ``link_lost`` is called exactly once, after the last message, unless this side closed the link.
4. `Link.send` never blocks.  A read-only buffer may be read until it has been sent; a writable one
   is copied before ``send`` returns, so later writes to it cannot tear what travels.
5. A message over the limits is taken in and thrown away in bounded slices of time; its handler
   hears `LinkHandler.message_refused`, and the link goes on.
6. Until `Link.admit` is called, a peer may have no more than `UNADMITTED_BYTES` under way and
   `UNADMITTED_SECONDS` of time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from zmq_autograd.errors import ZmqAutogradError
from zmq_autograd.wire import Buffer as Buffer
from zmq_autograd.wire.limits import KIB

UNADMITTED_BYTES: Final = 64 * KIB
"""Bytes a peer may send before it is admitted: a handshake takes a few hundred."""

UNADMITTED_SECONDS: Final = 5.0
"""Seconds a peer may take to be admitted."""

HIGH_WATER_BYTES: Final = 16 * 1024 * KIB
"""Bytes waiting in a link above which `Link.drained` waits."""


class LinkClosed(ZmqAutogradError):
    """The link is closed or broken: the frames were not sent."""


@dataclass(frozen=True, slots=True)
class Silence:
    """How long a link has been silent, in seconds.

    Attributes:
        received: since the last byte came in, of whole messages or of parts.
        acknowledged: since the peer's host last showed any sign of life, acknowledgements of the
            network's own included; None where the network does not tell.
    """

    received: float
    acknowledged: float | None


class Link(Protocol):
    """One connection to one peer."""

    @property
    def address(self) -> str:
        """The other end for people to read: the dialled endpoint, or where the peer came from."""

    @property
    def pending_bytes(self) -> int:
        """Bytes accepted by `send` that have not been handed to the network's own queue yet."""

    def send(self, frames: Sequence[Buffer]) -> None:
        """Queue one message.

        Raises:
            LinkClosed: the link is closed or broken.
        """

    async def drained(self) -> None:
        """Wait until less than `HIGH_WATER_BYTES` wait to be sent, or the link is gone.

        Cancelling it has no effect on the link.
        """

    def admit(self) -> None:
        """Lift the bounds for strangers: the peer has said who it is."""

    def silence(self) -> Silence:
        """Say for how long nothing has come from the peer."""

    def close(self) -> None:
        """Close the link at once or after what was queued has left, whichever the bound allows.

        Idempotent.  The handler hears nothing more.
        """


class LinkHandler(Protocol):
    """Who owns a link hears of it."""

    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        """Take one message: its frames are the handler's own, to keep and to write to."""

    def message_refused(self, link: Link, reason: str) -> None:
        """Hear that a message over the limits was thrown away."""

    def link_lost(self, link: Link, reason: str) -> None:
        """Hear that the link is broken, or that its peer closed it."""


Accept = Callable[[Link], LinkHandler]
"""Called with each new link of a listener, before its first message; returns who will own it."""


class Listener(Protocol):
    """An open door."""

    @property
    def endpoint(self) -> str:
        """The endpoint with its real port, as a peer would dial it."""

    def close(self) -> None:
        """Accept no more and close all its links.  Idempotent."""


class Transport(Protocol):
    """Makes listeners and links, and takes them down together."""

    async def listen(self, endpoint: str, accept: Accept) -> Listener:
        """Open `endpoint`; port 0 or ``*`` takes a free port.

        Raises:
            ConfigurationError: the endpoint is malformed or cannot be bound.
        """

    async def dial(self, endpoint: str, handler: LinkHandler, timeout: float | None) -> Link:
        """Connect to `endpoint`, trying again until `timeout` seconds are over.

        Raises:
            ConfigurationError: the endpoint is malformed.
            WorkerLost: nobody answered there in time; the reason says what was seen.

        Cancelling it leaves nothing behind.
        """

    async def close(self) -> None:
        """Close every link and listener; returns within `LINGER_SECONDS` plus a second."""


LINGER_SECONDS: Final = 2.0
"""Seconds that closed links may take to hand what was queued to the network."""
