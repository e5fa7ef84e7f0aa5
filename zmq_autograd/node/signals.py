"""SIGINT and SIGTERM end what serves for ever: all of it, since signals are the process's."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

# What ends each of those that serve at the moment, in whichever thread, and its loop.
_stops: Final[list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = []
# How often the main thread hears the signals at the moment, and who heard them before.
_depth = 0
_previous: Final[dict[signal.Signals, Any]] = {}


@contextmanager
def stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """Have `stop` set when a signal comes, as long as the main thread hears them.

    In the main thread it does; in any other it takes `signals_heard` there.
    """
    serving = asyncio.get_running_loop(), stop
    _stops.append(serving)
    try:
        with signals_heard():
            yield
    finally:
        _stops.remove(serving)


@contextmanager
def signals_heard() -> Iterator[None]:
    """Have signals end what serves; in the main thread, elsewhere this changes nothing.

    Afterwards the signals go where they went before.
    """
    global _depth
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _depth == 0:
        _previous.update({number: signal.signal(number, _stop_all) for number in STOP_SIGNALS})
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            for number in STOP_SIGNALS:
                signal.signal(number, _previous.pop(number))


def _stop_all(number: int, _: object) -> None:
    stops = list(_stops)
    if not stops:  # nothing serves yet, or any more: it goes where it went before
        signal.signal(number, _previous[signal.Signals(number)])
        signal.raise_signal(number)
    for loop, stop in stops:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(stop.set)
