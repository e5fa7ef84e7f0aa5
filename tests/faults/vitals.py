"""How a process does: how long its event loop stood still, and what it holds open."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Final

_TICK_SECONDS: Final = 0.002

# "Time spent on the CPU, time spent waiting for one", in nanoseconds, of the thread that reads it.
_SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")


class Stalls:
    """Measures how long the loop kept everybody waiting, without what the machine took from it.

    A thread that is ready to run and gets no processor, because others use them all, is not held up
    by anything it does itself: that time, where the system tells it, does not count.
    """

    def __init__(self) -> None:
        self.longest = 0.0
        self.longest_on_the_clock = 0.0
        self._task = asyncio.create_task(self._tick(), name="stalls")

    async def _tick(self) -> None:
        before, waited_before = time.monotonic(), _waited_for_a_processor()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now, waited = time.monotonic(), _waited_for_a_processor()
            gap = now - before - _TICK_SECONDS
            self.longest_on_the_clock = max(self.longest_on_the_clock, gap)
            self.longest = max(self.longest, gap - (waited - waited_before))
            before, waited_before = now, waited

    async def stop(self) -> None:
        """End the measuring."""
        self._task.cancel()
        await asyncio.wait([self._task])


def _waited_for_a_processor() -> float:
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1  # the one that listed them


def say(measured: str) -> None:
    """Show what was measured with the test's output."""
    sys.stdout.write(f"{measured}\n")
