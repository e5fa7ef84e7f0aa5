"""What comes in over TCP from who knows whom harms nobody: the next good link works at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

import psutil
import pytest
import zmq

from tests.faults import zmtp_peer
from zmq_autograd.errors import WorkerLost
from zmq_autograd.transport import Link, ZmqTransport, guard
from zmq_autograd.transport.zmq_listener import MAX_UNADMITTED
from zmq_autograd.wire.limits import DEFAULT_LIMITS, GIB, KIB, MIB, Limits

LONGEST_STALL_SECONDS: Final = 0.1

# Two megabytes on the wire.
EMPTY_FRAMES: Final = 1_000_000


@dataclass
class Heard:
    """What a handler hears, as short as these tests need it."""

    headers: list[bytes] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    echoes: bool = False

    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        self.headers.append(bytes(frames[0]))
        if self.echoes:
            link.send(frames)

    def message_refused(self, link: Link, reason: str) -> None:
        self.refusals.append(reason)

    def link_lost(self, link: Link, reason: str) -> None:
        self.losses.append(reason)


def say(measured: str) -> None:
    """Print what was measured; pytest shows it where a test fails, or with ``-s``."""
    sys.stdout.write(f"{measured}\n")


async def until(reached: Callable[[], bool], seconds: float = 10) -> None:
    """Look every few milliseconds until `reached`."""
    async with asyncio.timeout(seconds):
        while True:
            if reached():
                return
            await asyncio.sleep(0.005)


class Stalls:
    """Measures for how long the loop kept everybody waiting, less what its thread waited for a CPU.

    On a machine that others use as well, the time during which none was given to this thread says
    nothing about the transport; Linux counts it.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self._statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._task = asyncio.create_task(self._tick(), name="stalls")

    def _now(self) -> float:
        _ran, waited, _turns = os.pread(self._statistics, 100, 0).split()
        return time.monotonic() - int(waited) / 1e9

    async def _tick(self) -> None:
        before = self._now()
        while True:
            await asyncio.sleep(0.001)
            now = self._now()
            self.longest = max(self.longest, now - before)
            before = now

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        os.close(self._statistics)


@dataclass
class Door:
    """A listener that admits who says ``admit`` first, and what its links heard."""

    transport: ZmqTransport
    endpoint: str
    stalls: Stalls
    heard: list[Heard]
    peers: list[socket.socket] = field(default_factory=list)

    def connect(self) -> socket.socket:
        """Open a bare TCP connection, closed with the door."""
        self.peers.append(zmtp_peer.connect(self.endpoint))
        return self.peers[-1]

    async def shake_hands(self) -> socket.socket:
        """Open a connection and go through ZeroMQ's handshake."""
        peer = self.connect()
        await asyncio.to_thread(zmtp_peer.shake_hands, peer, b"DEALER")
        return peer

    async def check_good_link(self) -> None:
        """A good peer comes and has its message echoed."""
        good, heard = ZmqTransport(), Heard()
        try:
            link = await good.dial(self.endpoint, heard, timeout=5)
            link.admit()
            link.send([b"admit"])
            await until(lambda: heard.headers == [b"admit"], 5)
        finally:
            await good.close()


@contextlib.asynccontextmanager
async def open_door(name: str, limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[Door]:
    """Open a door, and check and print how long the loop stood still meanwhile."""
    transport = ZmqTransport(limits)
    heard: list[Heard] = []

    class Admitting(Heard):
        def frames_received(self, link: Link, frames: list[memoryview]) -> None:
            if bytes(frames[0]) == b"admit":
                link.admit()
            super().frames_received(link, frames)

    def accept(link: Link) -> Heard:
        heard.append(Admitting(echoes=True))
        return heard[-1]

    stalls = Stalls()
    try:
        listener = await transport.listen("tcp://127.0.0.1:0", accept)
        door = Door(transport, listener.endpoint, stalls, heard)
        yield door
        for peer in door.peers:
            peer.close()
    finally:
        await stalls.stop()
        await transport.close()
    say(f"{name}: the loop's longest stall was {stalls.longest * 1000:.1f} ms")
    assert stalls.longest < LONGEST_STALL_SECONDS


NOISE: Final = {
    "random": random.Random(1).randbytes(100_000),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "half-signature": zmtp_peer.GREETING[:5],
    "half-greeting": zmtp_peer.GREETING[:30],
    "greeting": zmtp_peer.GREETING,
    "wrong-mechanism": zmtp_peer.GREETING[:12] + b"PLAIN".ljust(20, b"\0") + bytes(32),
    "wrong-socket-type": zmtp_peer.GREETING + zmtp_peer.ready(b"SUB"),
    "huge-command": zmtp_peer.GREETING + b"\x06" + (2**62).to_bytes(8, "big") + bytes(1000),
    "huge-frame": zmtp_peer.GREETING + zmtp_peer.ready(b"DEALER") + zmtp_peer.claim(2**62),
    "nothing": b"",
}


@pytest.mark.parametrize("noise", NOISE)
async def test_noise_does_not_reach_handlers_and_good_links_go_on(noise: str) -> None:
    async with open_door(noise) as door:
        peers = [door.connect() for _ in range(5)]
        for peer in peers:
            with contextlib.suppress(ConnectionError):
                peer.sendall(NOISE[noise])
        await door.check_good_link()
        peers[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for peer in door.peers:
            peer.close()
        await door.check_good_link()
        assert len(door.heard) == 2


async def test_who_is_silent_is_cut_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "UNADMITTED_SECONDS", 0.3)
    async with open_door("silent") as door:
        started = time.monotonic()
        silent = door.connect()
        spoke = await door.shake_hands()
        spoke.sendall(zmtp_peer.frame(b"who are you", more=False))
        assert await asyncio.to_thread(zmtp_peer.ended, silent)
        assert await asyncio.to_thread(zmtp_peer.ended, spoke)
        assert 0.25 < time.monotonic() - started < 1.5
        assert door.heard[0].losses == ["cut: it was not admitted within 0.3 s"]
        await door.check_good_link()


async def test_of_too_many_strangers_the_oldest_are_cut() -> None:
    async with open_door("many strangers") as door:
        extra = 20
        peers = [door.connect() for _ in range(MAX_UNADMITTED + extra)]
        for oldest in peers[:extra]:
            assert await asyncio.to_thread(zmtp_peer.ended, oldest)
        await door.check_good_link()
        peers[-1].setblocking(False)
        assert peers[-1].recv(100)  # libzmq's greeting: this one is still there
        with pytest.raises(BlockingIOError):
            peers[-1].recv(100)


async def test_many_newcomers_at_once_are_all_heard_though_the_loop_was_busy() -> None:
    count = 2 * MAX_UNADMITTED
    async with open_door("many newcomers") as door:
        with zmq.Context() as context:
            context.set(zmq.MAX_SOCKETS, 4 * count)
            newcomers = [context.socket(zmq.DEALER) for _ in range(count)]
            for newcomer in newcomers:  # without awaiting: the listener hears of none before all
                newcomer.linger = 0
                newcomer.connect(door.endpoint)
                newcomer.send(b"hello")
            try:
                await until(lambda: len(door.heard) == count, 30)
                for heard in door.heard:
                    assert heard.headers == [b"hello"]
            finally:
                for newcomer in newcomers:
                    newcomer.close()


async def test_a_million_empty_frames_are_refused_in_slices() -> None:
    async with open_door("a million empty frames") as door:
        peer = await door.shake_hands()
        peer.sendall(zmtp_peer.frame(b"admit", more=False))
        await until(lambda: bool(door.heard))
        message = zmtp_peer.frame(b"", more=True) * (EMPTY_FRAMES - 1)
        started = time.monotonic()
        await asyncio.to_thread(peer.sendall, message + zmtp_peer.frame(b"", more=False))
        peer.sendall(zmtp_peer.frame(b"next", more=False))
        await until(lambda: door.heard[0].headers == [b"admit", b"next"], 30)
        say(f"a million empty frames were taken in {time.monotonic() - started:.2f} s")
        assert len(door.heard[0].refusals) == 1
        assert f"{EMPTY_FRAMES} frames" in door.heard[0].refusals[0]


@pytest.mark.parametrize("size", [0, KIB])
async def test_an_endless_message_of_a_stranger_is_cut(size: int) -> None:
    """Empty frames cost libzmq 32 times their bytes: all of them would take over 700 MiB."""
    async with open_door(f"endless message, {size} B frames") as door:
        peer = await door.shake_hands()
        block = zmtp_peer.frame(bytes(size), more=True) * (MIB // (size + 2))
        before = worst = psutil.Process().memory_info().rss
        pouring = asyncio.create_task(asyncio.to_thread(zmtp_peer.pour, peer, block, 24))
        while not pouring.done():
            worst = max(worst, psutil.Process().memory_info().rss)
            await asyncio.sleep(0.002)
        sent, grown = await pouring, worst - before
        say(f"{sent / MIB:.1f} MiB sent, memory grew by {grown / MIB:.1f} MiB")
        assert await asyncio.to_thread(zmtp_peer.ended, peer)
        assert not door.heard
        assert grown < 192 * MIB
        await door.check_good_link()


async def test_an_endless_message_of_an_admitted_peer_is_cut_beyond_the_limit() -> None:
    limits = Limits(frame_bytes=MIB, message_bytes=MIB)
    async with open_door("endless message after admission", limits) as door:
        peer = await door.shake_hands()
        peer.sendall(zmtp_peer.frame(b"admit", more=False))
        await until(lambda: bool(door.heard))
        block = zmtp_peer.frame(bytes(KIB), more=True) * KIB
        sent = await asyncio.to_thread(zmtp_peer.pour, peer, block, 10_000)
        assert guard.SLACK_BYTES < sent < 10_000 * len(block)
        await until(lambda: bool(door.heard[0].losses))
        assert "under way" in door.heard[0].losses[0]
        await door.check_good_link()


async def test_an_admitted_peer_that_sends_much_is_not_cut() -> None:
    """Many times the limit of one message, in whole messages, faster than they are taken."""
    limits = Limits(frame_bytes=MIB, message_bytes=MIB)
    async with open_door("many whole messages", limits) as door:
        good, heard = ZmqTransport(limits), Heard()
        link = await good.dial(door.endpoint, heard, timeout=5)
        link.admit()
        link.send([b"admit"])
        await until(lambda: heard.headers == [b"admit"])
        for index in range(200):
            link.send([b"%d" % index, bytes(MIB // 2)])
        await until(lambda: len(heard.headers) == 201, 20)
        assert not heard.losses
        await good.close()


async def test_a_frame_that_claims_a_gigabyte_takes_none() -> None:
    async with open_door("a claim of 1 GiB") as door:
        before = psutil.Process().memory_info().rss
        peers = []
        for _ in range(8):
            peer = await door.shake_hands()
            peer.sendall(zmtp_peer.claim(GIB))
            peers.append(peer)
        sent = await asyncio.to_thread(zmtp_peer.pour, peers[0], bytes(MIB), 1000)
        grown = psutil.Process().memory_info().rss - before
        say(f"eight claims of 1 GiB: {sent / MIB:.0f} MiB sent, {grown / MIB:.0f} MiB grown")
        assert sent < 900 * MIB
        assert grown < 256 * MIB
        await door.check_good_link()


@pytest.mark.parametrize("noise", ["random", "http", "wrong-mechanism", "nothing"])
async def test_dialling_what_does_not_speak_zeromq_raises_in_time(noise: str) -> None:
    transport = ZmqTransport()
    with zmtp_peer.hostile_server(NOISE[noise]) as server:
        started = time.monotonic()
        with pytest.raises(WorkerLost) as caught:
            await transport.dial(server.endpoint, Heard(), timeout=0.5)
        assert time.monotonic() - started < 1.5
        say(f"{noise}: {caught.value}")
        await transport.close()


async def test_an_endless_message_of_a_dialled_peer_is_cut() -> None:
    transport, heard = ZmqTransport(), Heard()
    block = zmtp_peer.frame(b"", more=True) * 100_000
    with zmtp_peer.hostile_server(endless=block, socket_type=b"ROUTER") as server:
        await transport.dial(server.endpoint, heard, timeout=5)
        await until(lambda: bool(heard.losses))
        assert "before it was admitted" in heard.losses[0]
        assert not heard.headers
        await transport.close()


PEER: Final = """
import sys, time, zmq
dealer = zmq.Context().socket(zmq.DEALER)
dealer.connect(sys.argv[1])
dealer.send(b"admit")
time.sleep(60)
"""


async def test_a_killed_peer_is_lost_at_once() -> None:
    async with open_door("killed peer") as door:
        for turn in range(5):
            peer = await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, door.endpoint)
            try:
                await until(lambda turn=turn: len(door.heard) > turn)  # type: ignore[misc]
            finally:
                peer.kill()
            heard, killed = door.heard[turn], time.monotonic()
            await until(lambda heard=heard: bool(heard.losses), 1)  # type: ignore[misc]
            say(f"lost {(time.monotonic() - killed) * 1000:.1f} ms after the signal")
            await peer.wait()
            assert heard.headers == [b"admit"]
            assert len(heard.losses) == 1
