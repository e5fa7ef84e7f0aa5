"""Message ids that say where in a program a message was made, and so are the same on every run.

The order in which a worker sums what comes back for its messages goes by their ids.  Random ones
would change it from run to run; these depend on the program alone: on the call that is being
served, on the task, and on how many messages that one has made before.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final
from weakref import WeakKeyDictionary

_REPLY: Final = 2**64 - 1


class Place:
    """Where messages are made: a served call, or the program that opened the context."""

    def __init__(self, context_id: int, served: int = 0) -> None:
        """Make a place in the context, in the call that message `served` made, 0 for none."""
        self._context_id = context_id
        self._key = struct.pack("<?Q", bool(served), served ^ context_id if served else 0)
        self._tasks: WeakKeyDictionary[asyncio.Task[object], tuple[int, Iterator[int]]] = (
            WeakKeyDictionary()
        )
        self._task_numbers = itertools.count()

    def next_id(self) -> int:
        """Return the id of the next message that the running task makes here."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("expected a running task")
        if task not in self._tasks:
            self._tasks[task] = next(self._task_numbers), itertools.count()
        number, messages = self._tasks[task]
        return self._id(number, next(messages))

    @property
    def reply_id(self) -> int:
        """The id of the reply to the served call."""
        return self._id(_REPLY, 0)

    def _id(self, task: int, message: int) -> int:
        digest = blake2b(self._key + struct.pack("<2Q", task, message), digest_size=8).digest()
        # Mixed with the context's random id they are as unique as that; 0 stands for none.
        return int.from_bytes(digest, "little") ^ self._context_id or 1
