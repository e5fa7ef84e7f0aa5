"""SIGINT and SIGTERM end what serves for ever: all of it, since signals are the process's."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

# What ends each of those that serve at the moment, and who heard the signals before the first.
_stops: Final[list[asyncio.Event]] = []
_previous: Final[dict[signal.Signals, Any]] = {}


@contextmanager
def stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """Have `stop` set when a signal comes; only the main thread hears them.

    Afterwards the signals go where they went before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    if not _stops:
        _previous.update({number: signal.getsignal(number) for number in STOP_SIGNALS})
    _stops.append(stop)
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, _stop_all)
    try:
        yield
    finally:
        _stops.remove(stop)
        if not _stops:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, _previous.pop(number))


def _stop_all() -> None:
    for stop in _stops:
        stop.set()
