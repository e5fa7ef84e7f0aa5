"""A link's handler for tests: keeps what it hears and lets a test wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from zmq_autograd.transport import Link

DEADLINE_SECONDS: Final = 10.0


class Recorder:
    """Keeps messages as bytes, refusals and losses in the order in which they were heard."""

    def __init__(self, link: Link | None = None) -> None:
        self.link = link
        self.messages: list[list[bytes]] = []
        self.refusals: list[str] = []
        self.losses: list[str] = []
        # Messages that had been heard when the link was lost.
        self.messages_at_loss = -1
        self.views: list[memoryview] = []
        self._changed = asyncio.Event()

    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        self.link = link
        self.messages.append([bytes(frame) for frame in frames])
        self.views = frames
        self._changed.set()

    def message_refused(self, link: Link, reason: str) -> None:
        self.refusals.append(reason)
        self._changed.set()

    def link_lost(self, link: Link, reason: str) -> None:
        self.losses.append(reason)
        self.messages_at_loss = len(self.messages)
        self._changed.set()

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait until `reached` holds, which is looked at after each thing heard."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not reached():
                self._changed.clear()
                await self._changed.wait()

    async def until_messages(self, count: int) -> None:
        """Wait for the message number `count`."""
        await self.until(lambda: len(self.messages) >= count)
