"""One message on its way in, frame by frame: kept within the limits, thrown away beyond them.

Pure: knows neither sockets nor loops.  Every transport feeds its frames through it, so that all
refuse the same messages in the same words.
"""

from __future__ import annotations

from typing import NamedTuple

from zmq_autograd.wire.limits import Limits


class Received(NamedTuple):
    """A message that has come in whole.

    Attributes:
        frames: its frames; empty if it was refused.
        refusal: why it was thrown away, None if it was not.
        size: bytes of all its frames, the thrown away ones included.
    """

    frames: list[memoryview]
    refusal: str | None
    size: int


class Incoming:
    """Collects the frames of one message after the other."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reset()

    def _reset(self) -> None:
        self._frames: list[memoryview] = []
        self._count = 0
        self._size = 0
        self._refusal: str | None = None

    def accepts(self, size: int) -> bool:
        """Count the next frame of the message, `size` bytes long; say whether to `keep` it.

        The first one beyond the limits frees all that was kept.
        """
        self._count += 1
        self._size += size
        if self._refusal is None:
            self._refusal = self._refuse(size)
            if self._refusal is None:
                return True
            self._frames = []
        return False

    def keep(self, frame: memoryview) -> None:
        """Keep the frame that was just accepted."""
        self._frames.append(frame)

    def finish(self) -> Received:
        """Return the message, whose last frame was added, and start with the next one."""
        refusal = self._refusal
        if refusal is not None:
            refusal += f"; {self._count} frames with {self._size} bytes were thrown away"
        received = Received(self._frames, refusal, self._size)
        self._reset()
        return received

    def _refuse(self, size: int) -> str | None:
        limits = self._limits
        if self._count == 1:
            if size > limits.header_bytes:
                return f"header: expected at most {limits.header_bytes} bytes, got {size}"
        elif size > limits.frame_bytes:
            index = self._count - 2
            return f"frame {index}: expected at most {limits.frame_bytes} bytes, got {size}"
        if self._count > limits.frames + 1:
            return f"message: expected at most {limits.frames} frames after the header, got more"
        if self._size > limits.message_bytes:
            return f"message: expected at most {limits.message_bytes} bytes, got more"
        return None
