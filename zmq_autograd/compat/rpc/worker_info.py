"""Who a worker is: its name and its number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_MAX_NAME: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_:-]+")
_MAX_ID: Final = 2**15 - 1


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's name and its id, which is its rank.

    Raises:
        RuntimeError: the name or the id cannot be a worker's.
    """

    name: str
    id: int

    def __post_init__(self) -> None:
        if not self.name:
            raise RuntimeError("Worker name must be non-empty")
        if len(self.name) >= _MAX_NAME:
            raise RuntimeError(
                f"Worker name must be shorter than {_MAX_NAME} characters, got {len(self.name)}"
            )
        if not _NAME.fullmatch(self.name):
            raise RuntimeError(f"Worker name must match {_NAME.pattern}, got {self.name!r}")
        if not 0 <= self.id <= _MAX_ID:
            raise RuntimeError(f"Worker id must be from 0 to {_MAX_ID}, got {self.id}")

    def __str__(self) -> str:
        return f"WorkerInfo(id={self.id}, name={self.name})"

    __repr__ = __str__
