"""What every transport asks of the frames that it is given to send."""

from __future__ import annotations

from collections.abc import Sequence

from zmq_autograd.transport.base import Buffer


def frame_size(frame: Buffer) -> int:
    """Return the bytes of `frame`.

    Raises:
        TypeError: it is no buffer.
        ValueError: its memory is not contiguous.
    """
    if type(frame) is bytes:
        return len(frame)
    view = memoryview(frame)
    if not view.c_contiguous:
        raise ValueError("frame: expected contiguous memory")
    return view.nbytes


def frame_sizes(frames: Sequence[Buffer]) -> list[int]:
    """Return the bytes of each frame of a message.

    Raises:
        TypeError: a frame is no buffer.
        ValueError: a frame's memory is not contiguous, or there is no frame.
    """
    if not frames:
        raise ValueError("message: expected at least one frame, got none")
    return [frame_size(frame) for frame in frames]


def hold(frames: Sequence[Buffer]) -> list[Buffer]:
    """Return frames that nobody will write to while they wait: writable ones are copied."""
    return [
        frame if type(frame) is bytes or memoryview(frame).readonly else bytes(frame)
        for frame in frames
    ]
