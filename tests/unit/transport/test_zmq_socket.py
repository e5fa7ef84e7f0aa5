"""libzmq's descriptor shows edges: what arrives must be found whatever consumed the edge."""

from __future__ import annotations

import asyncio
import threading

import pytest

from zmq_autograd.transport import Link, ZmqTransport, guard


class Heard:
    """Keeps the last link and an event for each message."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self.heard = asyncio.Event()

    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        self.link = link
        self.heard.set()

    def message_refused(self, link: Link, reason: str) -> None:
        raise AssertionError(reason)

    def link_lost(self, link: Link, reason: str) -> None:
        raise AssertionError(reason)


async def test_a_send_that_takes_the_edge_hides_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    # The guard looks for messages as well, and would find after a while what is hidden.
    monkeypatch.setattr(guard, "STRANGER_LOOK_SECONDS", 60)
    monkeypatch.setattr(guard, "LOOK_SECONDS", 60)
    transport, near_heard, far_heard = ZmqTransport(), Heard(), Heard()
    try:
        listener = await transport.listen("tcp://127.0.0.1:0", lambda link: far_heard)
        near = await transport.dial(listener.endpoint, near_heard, timeout=5)
        near.send([b"first"])
        async with asyncio.timeout(5):
            await far_heard.heard.wait()
        far = far_heard.link
        assert far is not None
        for _ in range(20):
            far_heard.heard.clear()
            near_heard.heard.clear()
            near.send([b"arrives while the loop is busy"])
            threading.Event().wait(0.01)
            far.send([b"takes the edge"])
            async with asyncio.timeout(1):
                await far_heard.heard.wait()
                await near_heard.heard.wait()
    finally:
        await transport.close()
