"""Limits on what one message may hold, named and checked before anything is allocated.

The same numbers bound the transport (frames, bytes), ``decode`` (header, dimensions, elements) and
what a session lets run at once.  Each side tells its own in the handshake, and the other keeps to
them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from zmq_autograd import ids
from zmq_autograd.errors import ConfigurationError

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

MAX_DIMENSIONS: Final = 64
"""Dimensions of one tensor: numpy's limit and torch's own for most kernels."""

MAX_ELEMENTS: Final = 2**48
"""Elements of one tensor, and the largest single dimension even where another one is 0."""

MAX_NESTING: Final = 64
"""Levels of lists, tuples and dicts inside one argument."""

MAX_NUMBER_KEYS: Final = 1024
"""Numbers among the keys of one dict: they hash to themselves, so a peer could choose them to
collide, and to fill a dict with n of them would take time in proportion to n squared."""

MAX_CONTAINERS: Final = 16 * KIB
"""Lists, tuples, dicts, their entries, and tagged values in one message: each costs its receiver
microseconds of its event loop, for as little as one byte."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side of a session is ready to take in.

    Attributes:
        header_bytes: length of frame 0.
        frames: raw frames after the header.
        frame_bytes: length of one raw frame; ZeroMQ closes a connection that announces more.
        message_bytes: length of all frames of one message together.
        requests: requests of one peer that may be under way at once.
    """

    header_bytes: int = 256 * KIB
    frames: int = 4096
    frame_bytes: int = GIB
    message_bytes: int = 2 * GIB
    requests: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 < value <= ids.MAX_ID:
                raise ConfigurationError(
                    f"limit {field.name}: expected an int from 1 to {ids.MAX_ID}, got {value!r}"
                )


DEFAULT_LIMITS: Final = Limits()


def short(value: object) -> str:
    """Show a value that somebody sent or wants to send, in bounded space."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print large ones
        return f"an int of {value.bit_length()} bits"
    text = ascii(value) if isinstance(value, (str, int, float, bytes)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
