"""How often something that is not there yet is tried again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

FIRST_PAUSE_SECONDS: Final = 0.01
LONGEST_PAUSE_SECONDS: Final = 0.25


def pauses() -> Iterator[float]:
    """Yield the seconds to wait before each further attempt: twice as long each time, bounded."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
