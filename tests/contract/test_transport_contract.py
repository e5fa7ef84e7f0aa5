"""What every transport promises, tried on each of them: `zmq_autograd.transport.base`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.contract.ends import connected
from tests.contract.recorder import Recorder
from zmq_autograd.errors import ConfigurationError, ZmqAutogradError
from zmq_autograd.transport import (
    HIGH_WATER_BYTES,
    LINGER_SECONDS,
    UNADMITTED_BYTES,
    Link,
    LinkClosed,
    Transports,
)
from zmq_autograd.wire.limits import MIB, Limits

SMALL = Limits(header_bytes=1000, frames=10, frame_bytes=100_000, message_bytes=300_000)


async def test_messages_arrive_whole_and_in_order_both_ways(endpoint: str) -> None:
    sent = [[b"%d" % index, bytes(index % 50)] for index in range(1000)]
    async with connected(endpoint) as ends:
        for message in sent:
            ends.near.send(message)
            ends.far.send(message)
        await ends.far_heard.until_messages(len(sent))
        await ends.near_heard.until_messages(len(sent))
        assert ends.far_heard.messages == sent
        assert ends.near_heard.messages == sent


@pytest.mark.parametrize(
    "message",
    [
        [b""],
        [b"", b""],
        [b"header", b"", b"x", b""],
        [b"header", *(b"%d" % index for index in range(4096))],
        [b"header", bytes(255), bytes(256), bytes(8192), bytes(128 * 1024), bytes(5 * MIB)],
    ],
    ids=["one-empty", "two-empty", "empty-between", "many", "large"],
)
async def test_frames_keep_their_bounds(endpoint: str, message: list[bytes]) -> None:
    async with connected(endpoint) as ends:
        ends.near.send(message)
        await ends.far_heard.until_messages(1)
        ends.far.send(message)
        await ends.near_heard.until_messages(1)
        assert ends.far_heard.messages == [message]
        assert ends.near_heard.messages == [message]


async def test_received_frames_are_writable_and_the_receivers_own(endpoint: str) -> None:
    async with connected(endpoint) as ends:
        frames = [b"header", bytes(10), bytes(100_000), bytes(MIB)]
        ends.near.send(frames)
        await ends.far_heard.until_messages(1)
        views = ends.far_heard.views
        for view in views:
            assert not view.readonly
            view[:] = b"\xff" * len(view)
        assert all(set(bytes(view)) == {0xFF} for view in views)
        assert frames[1:] == [bytes(10), bytes(100_000), bytes(MIB)]


@pytest.mark.parametrize("size", [10, 100_000, MIB])
async def test_later_writes_do_not_tear_what_was_sent(endpoint: str, size: int) -> None:
    async with connected(endpoint) as ends:
        for value in range(200 if size < MIB else 40):
            memory = bytearray([value]) * size
            ends.near.send([b"header", memory])
            memory[:] = b"\xff" * size
        count = value + 1
        await ends.far_heard.until_messages(count)
        for value, message in enumerate(ends.far_heard.messages):
            assert message[1] == bytes([value]) * size


@pytest.mark.parametrize("limits", [SMALL])
@pytest.mark.parametrize(
    ("message", "told"),
    [
        ([bytes(1001)], "at most 1000 bytes, got 1001"),
        ([b"h", *[b""] * 11], "at most 10 frames"),
        ([b"h", *[bytes(100_000)] * 4], "at most 300000 bytes"),
        ([b"h", *[b""] * 100_000], "100001 frames with 1 bytes were thrown away"),
    ],
    ids=["header", "frames", "message", "very-many-frames"],
)
async def test_a_message_over_a_limit_is_refused_and_the_link_goes_on(
    endpoint: str, limits: Limits, message: list[bytes], told: str
) -> None:
    async with connected(endpoint, limits) as ends:
        ends.near.send(message)
        ends.near.send([b"next", b"good"])
        await ends.far_heard.until_messages(1)
        assert ends.far_heard.messages == [[b"next", b"good"]]
        assert len(ends.far_heard.refusals) == 1
        assert told in ends.far_heard.refusals[0]
        assert not ends.far_heard.losses


async def test_a_frame_over_its_limit_is_refused_or_ends_the_link(endpoint: str) -> None:
    async with connected(endpoint, SMALL) as ends:
        ends.near.send([b"h", bytes(100_001)])
        await ends.far_heard.until(lambda: bool(ends.far_heard.refusals or ends.far_heard.losses))
        assert not ends.far_heard.messages
        if not ends.far_heard.refusals:
            await ends.near_heard.until(lambda: bool(ends.near_heard.losses))


@pytest.mark.parametrize("closer", ["near", "far"])
async def test_the_other_side_hears_the_end_once_and_after_the_last_message(
    endpoint: str, closer: str
) -> None:
    async with connected(endpoint) as ends:
        link, heard = (
            (ends.near, ends.far_heard) if closer == "near" else (ends.far, ends.near_heard)
        )
        own = ends.near_heard if closer == "near" else ends.far_heard
        for index in range(500):
            link.send([b"%d" % index, bytes(2000)])
        link.close()
        link.close()
        await heard.until(lambda: bool(heard.losses))
        assert heard.messages_at_loss == 500
        assert [message[0] for message in heard.messages] == [b"%d" % i for i in range(500)]
        await ends.near_transport.close()
        await ends.far_transport.close()
        assert len(heard.losses) == 1
        assert not own.losses


async def test_closing_flushes_both_ways_though_the_other_side_sends_too(endpoint: str) -> None:
    """Unread input must not make the kernel throw away what was written before the end."""
    async with connected(endpoint) as ends:
        for index in range(100):
            ends.near.send([b"%d" % index, bytes(20_000)])
            ends.far.send([b"%d" % index, bytes(20_000)])
        ends.far.close()
        await ends.near_heard.until(lambda: bool(ends.near_heard.losses))
        assert ends.near_heard.messages_at_loss == 100


async def test_closing_the_transport_flushes_what_was_queued(endpoint: str) -> None:
    async with connected(endpoint) as ends:
        for _ in range(300):
            ends.far.send([b"header", bytes(100_000)])
        await ends.far_transport.close()
        await ends.near_heard.until(lambda: bool(ends.near_heard.losses))
        assert ends.near_heard.messages_at_loss == 300


async def test_sending_on_a_closed_link_raises(endpoint: str) -> None:
    async with connected(endpoint) as ends:
        ends.near.close()
        with pytest.raises(LinkClosed):
            ends.near.send([b"late"])
        await ends.far_heard.until(lambda: bool(ends.far_heard.losses))
        with pytest.raises(LinkClosed):
            ends.far.send([b"late"])
        assert issubclass(LinkClosed, ZmqAutogradError)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ([], ValueError),
        ([b"h", memoryview(bytes(10))[::2]], (ValueError, BufferError)),
        ([b"h", "text"], TypeError),
    ],
    ids=["none", "strided", "text"],
)
async def test_a_message_that_cannot_be_sent_leaves_the_link_as_it_was(
    endpoint: str, message: list[bytes], error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    async with connected(endpoint) as ends:
        with pytest.raises(error):
            ends.near.send(message)
        ends.near.send([b"good"])
        await ends.far_heard.until_messages(1)
        assert ends.far_heard.messages == [[b"good"]]


async def test_a_stalled_peer_holds_up_nobody_else(endpoint: str) -> None:
    """One peer reads nothing while another one is served, and closing stays bounded."""
    server = Transports()
    served: dict[bytes, Link] = {}
    heard_first = asyncio.Event()

    class Greeted(Recorder):
        def frames_received(self, link: Link, frames: list[memoryview]) -> None:
            served[bytes(frames[0])] = link
            if len(served) == 2:
                heard_first.set()

    def accept(link: Link) -> Recorder:
        link.admit()
        return Greeted(link)

    stalled, lively = Transports(), Transports()
    blocked, lively_heard = _Blocked(), Recorder()
    try:
        listener = await server.listen(endpoint, accept)
        stalled_link = await stalled.dial(listener.endpoint, blocked, timeout=5)
        lively_link = await lively.dial(listener.endpoint, lively_heard, timeout=5)
        lively_link.admit()
        stalled_link.admit()
        stalled_link.send([b"stalled"])
        lively_link.send([b"lively"])
        async with asyncio.timeout(5):
            await heard_first.wait()
        _stop_reading(stalled_link)
        block = bytes(MIB)
        for _ in range(160):
            served[b"stalled"].send([b"h", block])
        assert served[b"stalled"].pending_bytes > HIGH_WATER_BYTES
        waiting = asyncio.create_task(served[b"stalled"].drained())
        for index in range(200):
            served[b"lively"].send([b"%d" % index])
        await lively_heard.until_messages(200)
        assert not waiting.done()
        started = time.monotonic()
        await server.close()
        assert time.monotonic() - started < LINGER_SECONDS + 1
        await waiting
    finally:
        await stalled.close()
        await lively.close()
        await server.close()


class _Blocked(Recorder):
    """A peer that is not meant to hear anything."""


def _stop_reading(link: Link) -> None:
    """Make this end of `link` read nothing any more."""
    stall: Callable[[], None] | None = getattr(link, "stall", None)
    if stall is not None:
        stall()
        return
    socket = link._socket  # type: ignore[attr-defined]
    socket._loop.remove_reader(socket._fd)
    socket._scheduled = True


def _read_again(link: Link) -> None:
    """Undo `_stop_reading`."""
    resume: Callable[[], None] | None = getattr(link, "resume", None)
    if resume is not None:
        resume()
        return
    socket = link._socket  # type: ignore[attr-defined]
    if socket._closed:
        return  # the guard looks for messages as well, and found the last one before
    socket._loop.add_reader(socket._fd, socket._drain)
    socket._scheduled = False
    socket.drain_soon()


@pytest.mark.parametrize("closer", ["near", "far"])
@pytest.mark.parametrize("count", [30, 300])
async def test_what_was_sent_before_the_end_is_heard_by_who_reads_late(
    endpoint: str, closer: str, count: int
) -> None:
    """Fewer and more messages than libzmq holds, and the end, come before any is received."""
    async with connected(endpoint) as ends:
        sender, receiver, heard = ends.near, ends.far, ends.far_heard
        if closer == "far":
            sender, receiver, heard = ends.far, ends.near, ends.near_heard
        _stop_reading(receiver)
        receiver.send([b"unread", bytes(1000)])
        for _ in range(count):
            sender.send([b"header", bytes(1000)])
        sender.close()
        await asyncio.sleep(0.05)
        _read_again(receiver)
        await heard.until(lambda: bool(heard.losses))
        assert heard.messages_at_loss == count


async def test_drained_waits_for_room_and_queued_messages_follow(endpoint: str) -> None:
    async with connected(endpoint) as ends:
        block = bytes(MIB)
        for index in range(200):
            ends.near.send([b"%d" % index, block])
        await ends.near.drained()
        assert ends.near.pending_bytes < HIGH_WATER_BYTES
        await ends.far_heard.until_messages(200)
        assert [message[0] for message in ends.far_heard.messages] == [
            b"%d" % i for i in range(200)
        ]
        assert ends.near.pending_bytes == 0


async def test_silence_grows_until_something_comes(endpoint: str) -> None:
    async with connected(endpoint) as ends:
        await asyncio.sleep(0.15)
        before = ends.far.silence()
        assert 0.1 <= before.received < 5
        ends.near.send([b"sound"])
        await ends.far_heard.until_messages(1)
        assert ends.far.silence().received < 0.1
        assert before.acknowledged is None or before.acknowledged < 5


async def test_a_stranger_that_sends_too_much_is_cut(endpoint: str) -> None:
    server, client = Transports(), Transports()
    heard, client_heard = Recorder(), Recorder()
    try:
        listener = await server.listen(endpoint, lambda link: heard)
        link = await client.dial(listener.endpoint, client_heard, timeout=5)
        link.admit()
        link.send([b"h", bytes(UNADMITTED_BYTES + 1)])
        await client_heard.until(lambda: bool(client_heard.losses))
        await heard.until(lambda: bool(heard.losses))
        assert "before it was admitted" in heard.losses[0]
        assert len(heard.losses) == 1
    finally:
        await client.close()
        await server.close()


async def test_the_handler_may_close_everything_from_within(endpoint: str) -> None:
    async with connected(endpoint) as ends:
        closing: list[asyncio.Task[None]] = []

        class Closing(Recorder):
            def frames_received(self, link: Link, frames: list[memoryview]) -> None:
                super().frames_received(link, frames)
                link.close()
                closing.append(asyncio.ensure_future(ends.far_transport.close()))

        ends.far.handler = Closing()  # type: ignore[attr-defined]
        for _ in range(10):
            ends.near.send([b"x"])
        await ends.near_heard.until(lambda: bool(ends.near_heard.losses))
        assert len(closing) == 1
        await closing[0]


@pytest.mark.parametrize(
    "malformed",
    ["", "tcp://", "tcp://127.0.0.1", "udp://127.0.0.1:1", "tcp://::1:5", "tcp://[::1]", "ipc://"],
)
async def test_a_malformed_endpoint_is_named(malformed: str) -> None:
    transport = Transports()
    try:
        for attempt in (
            transport.listen(malformed, lambda link: Recorder()),
            transport.dial(malformed, Recorder(), timeout=1),
        ):
            with pytest.raises(ConfigurationError) as caught:
                await attempt
            assert repr(malformed) in str(caught.value)
            assert isinstance(caught.value, ValueError)
    finally:
        await transport.close()
