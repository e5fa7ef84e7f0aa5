"""Ids: unsigned 64-bit numbers, unique without coordination and across restarts.

Ground floor: imports nothing of the package.  0 stands for "none" everywhere on the wire, so no
id is ever 0.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from typing import Final

ID_BITS: Final = 64
MAX_ID: Final = 2**ID_BITS - 1


def random_id() -> int:
    """Return a fresh id that nobody can guess: for contexts and sessions.

    Drawn from the system's random source.  Among a million ids the chance of any two being equal
    is below 3e-8.
    """
    return secrets.randbelow(MAX_ID) + 1


def consecutive_ids() -> Iterator[int]:
    """Yield ids that follow each other from a random start: for messages, passes and requests.

    Two workers, or two lives of one worker, give out the same id only where their ranges overlap:
    for a thousand ranges of a million ids each, with probability below 1e-7.
    """
    start = random_id()
    # `count` and `map` are safe to share between threads; a generator would not be.
    return map(lambda number: (number - 1) % MAX_ID + 1, itertools.count(start))


def new_incarnation() -> str:
    """Return the name of one life of one worker: 128 random bits as 32 hexadecimal digits."""
    return secrets.token_hex(16)
