"""What a profiler is told of calls: what ran in compute threads, and on other workers.

A worker that serves a profiled call has a `Recorder` for it; so has a profile of torch's while it
runs (`torch_profiles`).  Calls made onward, and what computes, find theirs in a context variable.

Operators are recorded by torch's legacy profiler, which belongs to a thread: Kineto, which is
behind ``torch.profiler``, is there once in a process.  It runs in compute threads alone, from the
beginning of a function to its end.  Between two steps of a coroutine a range could be open: torch
crashes where one that the legacy profiler saw begin ends while Kineto runs in that thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, Final, TypeVar

import torch
from torch._C._autograd import (
    _disable_profiler_legacy,
    _enable_profiler_legacy,
    _profiler_enabled,
)
from torch._C._profiler import ProfilerConfig, ProfilerState
from torch.autograd import profiler_util

from zmq_autograd.errors import ProtocolError
from zmq_autograd.node.profiled import MAX_EVENTS, Event, ProfilerOptions, clean, pack, unpack

logger = logging.getLogger("zmq_autograd")

T = TypeVar("T")

REMOTE_OP: Final = "#remote_op: "
"""What stands between a call's name and that of what ran in it, as in torch.distributed.rpc."""

Clock = Callable[[], int]


class Recorder:
    """Collects events.

    Attributes:
        options: what is recorded of operators.
        is_over: nothing is collected for it any more.
    """

    is_over = False

    def __init__(
        self, options: ProfilerOptions, *, limit: int | None = None, clock: Clock = time.time_ns
    ) -> None:
        """Collect nothing yet.

        Args:
            options: what to record of operators.
            limit: how many events to keep, the longest ones; None for all.
            clock: the time in nanoseconds since 1970.
        """
        self.options = options
        self.clock = clock
        self._limit = limit
        self._events: list[Event] = []
        self._left_out = 0
        self._calls = itertools.count(1)
        self._lock = threading.Lock()  # several threads compute for one call

    @property
    def events(self) -> list[Event]:
        """What was collected."""
        with self._lock:
            return list(self._events)

    def add(self, events: Iterable[Event]) -> None:
        """Collect `events`."""
        with self._lock:
            self._events += events
            if self._limit is not None and len(self._events) > self._limit:
                self._left_out += len(self._events) - self._limit
                self._events = heapq.nlargest(self._limit, self._events, key=attrgetter("duration"))

    def recorded(self, function: Callable[[], T]) -> Callable[[], T]:
        """Return `function` so that what it runs is recorded, unless that is done there already."""

        def run() -> T:
            if _profiler_enabled():
                return function()
            _enable_profiler_legacy(_config(self.options))
            started = self.clock()
            try:
                return function()
            finally:
                self.add(_events(_disable_profiler_legacy(), started))

        return run

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Have a block be an event, which others may overlap: it may await."""
        start = self.clock()
        try:
            yield
        finally:
            thread = threading.get_native_id()
            self.add([Event(clean(name), start, self.clock(), thread, is_async=True)])

    @contextmanager
    def call(self, function: str, here: str, there: str) -> Iterator[Callable[[object], None]]:
        """Have a block that calls another worker be an event.

        Args:
            function: what is called.
            here: the name of the worker that calls.
            there: the name of the worker that is called.

        Yields:
            what to tell what the reply says that the profiler saw there.
        """
        given = _call_name.get()
        name = f"call#{function}({here} -> {there})" if given is None else given
        call = next(self._calls)
        start = self.clock()

        def saw(value: object) -> None:
            prefix, end = clean(name) + REMOTE_OP, self.clock()
            if value is None:  # the result left no room for them
                note = clean(prefix + "(events left out)")
                self.add([Event(note, end, end, 0, clean(there), call, is_async=True)])
                return
            try:
                events = unpack(value, prefix, there, call, start, end)
            except ProtocolError:  # a good result is not to be lost over this
                logger.warning("worker %r sent no profiler events", there, exc_info=True)
                return
            if given is not None:
                served = clean(prefix + function)
                events = [event for event in events if event.name != served]
            self.add(events)

        with self.span(name):
            yield saw


class CallRecorder(Recorder):
    """Collects the events of a call that is served here."""

    def __init__(self, options: ProfilerOptions, *, clock: Clock = time.time_ns) -> None:
        """Record a call that has just arrived."""
        super().__init__(options, limit=MAX_EVENTS, clock=clock)
        self._arrived = clock()

    @contextmanager
    def serving(self, function: str) -> Iterator[None]:
        """Have a block, which runs `function`, be what is recorded."""
        current_recorder.set(weakref.ref(self))
        with self.span(function):
            try:
                yield
            finally:
                self.is_over = True

    def packed(self, worker: str) -> Any:
        """Return what the reply of this worker carries."""
        longest = heapq.nlargest(MAX_EVENTS, self.events, key=attrgetter("duration"))
        return pack(longest, worker, self._arrived, self.clock(), self._left_out)


# Weak, since contexts live on: in tasks that a handler started, in threads that made a call.
current_recorder: Final[ContextVar[weakref.ref[Recorder] | None]] = ContextVar(
    "zmq_autograd_recorder", default=None
)

_call_name: Final[ContextVar[str | None]] = ContextVar("zmq_autograd_call_name", default=None)


@contextmanager
def call_named(name: str) -> Iterator[None]:
    """Have calls that are made in a block go by `name` in profiles.

    As torch.distributed.rpc has it: without the time that the other worker took as an event.
    """
    token = _call_name.set(name)
    try:
        yield
    finally:
        _call_name.reset(token)


def _config(options: ProfilerOptions) -> ProfilerConfig:
    return ProfilerConfig(
        ProfilerState.CPU,
        options.record_shapes or options.with_flops,
        options.profile_memory,
        options.with_stack,
        options.with_flops,
        False,  # modules, of TorchScript alone
        torch._C._profiler._ExperimentalConfig(),
    )


def _events(threads: list[list[Any]], started: int) -> list[Event]:
    """Return the events in what the legacy profiler, which began at `started`, has by thread."""
    records = [record for thread in threads for record in thread]
    first = next(record for record in records if record.name() == "__start_profile")

    def time_of(record: Any) -> int:
        return started + int(first.cpu_elapsed_us(record) * 1000)

    return [event for thread in threads for event in _ended(thread, time_of)]


def _ended(records: list[Any], time_of: Callable[[Any], int]) -> Iterator[Event]:
    """Yield the ranges of one thread that have ended."""
    begun: dict[int, Any] = {}
    memory: dict[int, int] = {}
    for record in records:
        kind, handle = record.kind(), record.handle()
        if kind == "push" and not _is_hidden(record.name()):
            begun[handle], memory[handle] = record, 0
        elif kind == "pop" and handle in begun:
            yield _event(begun.pop(handle), record, memory.pop(handle), time_of)
        elif kind == "memory_alloc":
            for outer in memory:
                memory[outer] += record.cpu_memory_usage()


def _is_hidden(name: str) -> bool:
    return bool(profiler_util._filter_name(name))  # type: ignore[no-untyped-call]


def _event(start: Any, end: Any, memory: int, time_of: Callable[[Any], int]) -> Event:
    shapes = start.shapes()
    return Event(
        clean(start.name()),
        time_of(start),
        time_of(end),
        start.thread_id(),
        shapes=str(shapes) if shapes else "",
        stack="\n".join(start.stack()),
        memory=memory,
        flops=start.flops(),
    )
