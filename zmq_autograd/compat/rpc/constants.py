"""Numbers that torch's RPC has names for."""

from __future__ import annotations

from typing import Final

DEFAULT_RPC_TIMEOUT_SEC: Final = 60.0
"""Seconds that a call may take unless told otherwise."""

UNSET_RPC_TIMEOUT: Final = -1.0
"""Stands for the default where a timeout is expected; 0 stands for no limit."""

DEFAULT_SHUTDOWN_TIMEOUT: float = 0
"""Seconds that `shutdown` waits for the others; 0 for no limit."""

DEFAULT_INIT_METHOD: Final = "env://"
"""Where the store is that workers meet at."""

DEFAULT_NUM_WORKER_THREADS: Final = 16
"""Kept for the programs that read or set it: here threads are started as they are needed."""


def seconds_of(timeout: float) -> float | None:
    """Return a timeout as the rest of the package takes it: None for no limit."""
    return None if timeout == 0 else timeout
