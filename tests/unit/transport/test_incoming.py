"""Limits on what comes in, frame by frame."""

from __future__ import annotations

import pytest

from zmq_autograd.transport.incoming import Incoming, Received
from zmq_autograd.wire.limits import Limits

LIMITS = Limits(header_bytes=4, frames=3, frame_bytes=10, message_bytes=20)


def _take(incoming: Incoming, sizes: list[int]) -> Received:
    for size in sizes:
        if incoming.accepts(size):
            incoming.keep(memoryview(bytearray(size)))
    return incoming.finish()


@pytest.mark.parametrize("sizes", [[0], [4], [4, 10, 6], [1, 0, 0, 0], [0, 10, 10]])
def test_what_is_within_the_limits_is_kept(sizes: list[int]) -> None:
    received = _take(Incoming(LIMITS), sizes)
    assert [frame.nbytes for frame in received.frames] == sizes
    assert received.refusal is None
    assert received.size == sum(sizes)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([5], "header: expected at most 4 bytes, got 5; 1 frames with 5 bytes were thrown away"),
        ([1, 2, 11], "frame 1: expected at most 10 bytes, got 11; 3 frames with 14 bytes"),
        ([1, 0, 0, 0, 0, 0], "expected at most 3 frames after the header, got more; 6 frames"),
        ([4, 10, 7], "message: expected at most 20 bytes, got more; 3 frames with 21 bytes"),
    ],
)
def test_what_is_beyond_is_thrown_away_with_the_reason(sizes: list[int], told: str) -> None:
    incoming = Incoming(LIMITS)
    received = _take(incoming, sizes)
    assert received.frames == []
    assert received.refusal is not None
    assert told in received.refusal
    assert received.size == sum(sizes)
    assert _take(incoming, [4, 10, 6]).refusal is None
