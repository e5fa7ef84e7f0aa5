"""Opening and closing a hundred times leaves no descriptor, thread or task."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from tests.faults import zmtp_peer
from zmq_autograd.errors import WorkerLost
from zmq_autograd.transport import LINGER_SECONDS, Link, ZmqTransport

TIMES = 100


class Heard:
    """Sets an event with each thing heard."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        self.event.set()

    def message_refused(self, link: Link, reason: str) -> None:
        self.event.set()

    def link_lost(self, link: Link, reason: str) -> None:
        self.event.set()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def _use(endpoint: str, closed_first: int) -> None:
    server, client, heard = ZmqTransport(), ZmqTransport(), Heard()
    listener = await server.listen(endpoint, lambda link: heard)
    link = await client.dial(listener.endpoint, Heard(), timeout=5)
    link.send([b"hello"])
    async with asyncio.timeout(5):
        await heard.event.wait()
    first, second = (server, client) if closed_first else (client, server)
    await first.close()
    await second.close()


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
async def test_opening_and_closing_leaves_nothing(scheme: str, tmp_path: Path) -> None:
    endpoint = "tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/s"
    await _use(endpoint, 0)
    descriptors, threads = _descriptors(), threading.active_count()
    for turn in range(TIMES):
        await _use(endpoint, turn % 2)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert threading.active_count() == threads
    assert _descriptors() == descriptors
    assert not os.listdir(tmp_path)


async def test_links_that_come_and_go_leave_nothing_on_a_listener() -> None:
    server, client = ZmqTransport(), ZmqTransport()
    lost = asyncio.Semaphore(0)

    class Counting(Heard):
        def link_lost(self, link: Link, reason: str) -> None:
            lost.release()

    listener = await server.listen("tcp://127.0.0.1:0", lambda link: Counting())
    before = 0
    for turn in range(TIMES):
        link = await client.dial(listener.endpoint, Heard(), timeout=5)
        link.send([b"hello"])
        link.close()
        async with asyncio.timeout(5):
            await lost.acquire()
        if turn == TIMES // 2:
            before = _descriptors()
    async with asyncio.timeout(5):
        while _descriptors() > before:  # the system tells nobody
            await asyncio.sleep(0.01)
    await client.close()
    await server.close()


async def test_dials_refused_again_and_again_leave_nothing() -> None:
    probe = ZmqTransport()
    listener = await probe.listen("tcp://127.0.0.1:0", lambda link: Heard())
    endpoint = listener.endpoint
    await probe.close()
    before = _descriptors()
    transport = ZmqTransport()
    for _ in range(5):
        with pytest.raises(WorkerLost):
            await transport.dial(endpoint, Heard(), timeout=0.1)
    await transport.close()
    assert _descriptors() == before


async def test_closing_is_bounded_though_a_peer_never_reads() -> None:
    transport = ZmqTransport()
    with zmtp_peer.hostile_server(socket_type=b"ROUTER") as server:
        link = await transport.dial(server.endpoint, Heard(), timeout=5)
        for _ in range(100):
            link.send([b"h", bytes(1 << 20)])
        started = time.monotonic()
        await transport.close()
        assert time.monotonic() - started < LINGER_SECONDS + 1
