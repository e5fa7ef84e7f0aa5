"""Where the user's own profile gets to hear of calls: torch offers no way to add events to one.

So the profile that runs in a thread is looked for, once, among all objects that there are, when the
first call is made under it; and that one object, never its class, is given a method of its own that
adds our events to those that torch has.  Under Kineto (``torch.profiler``, and
``torch.autograd.profiler.profile``) those are what it parses its results with, and exports a Chrome
trace with.  A legacy profile's class becomes one that sees its events come.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextvars import Context
from typing import Any, Final

from torch._C._autograd import _profiler_enabled, _profiler_type
from torch._C._profiler import ActiveProfilerType, _RecordFunctionFast
from torch.autograd import profiler, profiler_legacy
from torch.autograd.profiler_util import EventList, FunctionEvent

from zmq_autograd.node.profiled import Event, ProfilerOptions
from zmq_autograd.node.recorder import Recorder, current_recorder

logger = logging.getLogger("zmq_autograd")

SEARCH_AGAIN_SECONDS: Final = 1.0
"""Seconds after which a profile that was not found is looked for again: it can take 100 ms."""

NODE_IDS: Final[dict[str, int]] = {}
"""What ``FunctionEvent.node_id`` is by a worker's name, "" for this process; -1 where not here."""

_FIRST_THREAD: Final = 2**32  # numbers of other workers' threads: no thread here has one

_MARK: Final = "zmq_autograd::profile "


def recorder_here() -> Recorder | None:
    """Return what is to hear of a call that is made here, None where no profiler runs."""
    known = current_recorder.get()
    recorder = None if known is None else known()
    if recorder is not None and not recorder.is_over:
        return recorder
    return _of_thread() if _profiler_enabled() else None


def carry(context: Context) -> None:
    """Have what runs in `context`, in another thread, be heard of by this thread's profile."""
    recorder = recorder_here()
    if recorder is not None:
        context.run(current_recorder.set, weakref.ref(recorder))


class ProfileRecorder(Recorder):
    """Collects what is added to torch's profiles.

    Attributes:
        mark: the name of a range that was recorded at `marked`, by a legacy profile.
        marked: in nanoseconds since 1970.
    """

    mark = ""
    marked = 0

    def __init__(self, profiles: list[Any]) -> None:
        """Collect for `profiles`, as long as one of them runs."""
        names = ProfilerOptions.__dataclass_fields__
        super().__init__(
            ProfilerOptions(**{name: any(getattr(p, name) for p in profiles) for name in names})
        )
        self._profiles = [weakref.ref(profile) for profile in profiles]
        self._has_ended = False

    @property
    def is_over(self) -> bool:  # type: ignore[override]
        """Whether none of the profiles runs any more."""
        profiles = (ref() for ref in self._profiles)
        return self._has_ended or not any(p is not None and _is_running(p) for p in profiles)

    def end(self) -> None:
        """Take in that the profile has what was collected."""
        self._has_ended = True

    def function_events(self, base: int) -> list[Any]:
        """Return what was collected since `base`, in nanoseconds since 1970, as torch has it.

        Their times begin at `base`.
        """
        threads: dict[tuple[int, str, int], int] = {}
        return [_function_event(event, base, threads) for event in self._since(base)]

    def chrome_events(self, base: int, zero: int) -> list[dict[str, Any]]:
        """Return what was collected since `base` as entries of a trace whose times begin at `zero`.

        Each worker is a process of its own there.
        """
        events = self._since(base)
        workers = sorted({event.worker for event in events} - {""})
        names = [_named_process(worker) for worker in workers]
        return names + [e for i, event in enumerate(events) for e in _chrome(event, i, zero)]

    def _since(self, base: int) -> list[Event]:
        # A profile may have several cycles; each begins with nothing.
        return [event for event in self.events if event.start >= base]


# --- finding -------------------------------------------------------------------------------------


class _Found(threading.local):
    """What was found last for a thread.

    Attributes:
        recorder: that of the profile that runs in it, which holds it.
        missed: when none was found, by the monotonic clock.
    """

    recorder: weakref.ref[ProfileRecorder] | None = None
    missed = -SEARCH_AGAIN_SECONDS


_found: Final = _Found()


def _of_thread() -> Recorder | None:
    """Return the recorder of the profile that runs in this thread; it may be one unknown to us."""
    recorder = None if _found.recorder is None else _found.recorder()
    if recorder is not None and not recorder.is_over:
        return recorder
    find = _FINDERS.get(_profiler_type())
    if find is None or time.monotonic() < _found.missed + SEARCH_AGAIN_SECONDS:
        return None
    recorder = find()
    if recorder is None:
        _found.recorder, _found.missed = None, time.monotonic()
    else:
        _found.recorder = weakref.ref(recorder)
    return recorder


def _running(kind: type, objects: list[Any]) -> list[Any]:
    """Return those of `objects` that are profiles of `kind` and run."""
    return [found for found in objects if issubclass(type(found), kind) and _is_running(found)]


def _of_class(kind: type) -> list[Any]:
    """Return all objects of `kind`, and more: they refer to their class, as each object does."""
    return gc.get_referrers(kind, *kind.__subclasses__())


def _is_running(profile: Any) -> bool:
    if not getattr(profile, "entered", False):
        return False
    if isinstance(profile, profiler_legacy.profile):
        return profile.function_events is None
    return bool(profile.profiling_start_time_ns > profile.profiling_end_time_ns)


# --- Kineto --------------------------------------------------------------------------------------


def _of_kineto() -> ProfileRecorder | None:
    # There is no more than one in a process, most likely a young object: those are soon looked at.
    kind = profiler.profile
    profiles = (
        _running(kind, gc.get_objects(0))
        or _running(kind, gc.get_objects(1))
        or _running(kind, _of_class(kind))
    )
    if not profiles:
        return None
    recorder = ProfileRecorder(profiles)
    # Not the profile itself: it would hold itself, and all that was recorded, for ever.
    profile = weakref.ref(profiles[0])
    profiles[0]._parse_kineto_results = functools.partial(_parse, recorder, profile)
    profiles[0].export_chrome_trace = functools.partial(_export, recorder, profile)
    return recorder


def _parse(
    recorder: ProfileRecorder, profile: weakref.ref[Any], results: Any, *args: Any, **kwargs: Any
) -> list[Any]:
    """Do what ``profile._parse_kineto_results`` does, and add our events."""
    found: Any = profile()
    events = type(found)._parse_kineto_results(found, results, *args, **kwargs)
    events += recorder.function_events(results.trace_start_ns())
    return _in_order(events)


def _export(
    recorder: ProfileRecorder, profile: weakref.ref[Any], path: str, *args: Any, **kwargs: Any
) -> None:
    """Do what ``profile.export_chrome_trace`` does, and add our events to the file."""
    found: Any = profile()
    type(found).export_chrome_trace(found, path, *args, **kwargs)
    base = found.kineto_results.trace_start_ns()
    try:
        with open(path, encoding="utf-8") as file:
            trace = json.load(file, strict=False)
        events = recorder.chrome_events(base, trace.get("baseTimeNanoseconds", 0))
        trace["traceEvents"] += events
    except (ValueError, AttributeError, LookupError):  # it is the user's, as torch wrote it
        logger.warning("no remote events added to %s: it is not as expected", path, exc_info=True)
        return
    if events:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(trace, file)


# --- legacy --------------------------------------------------------------------------------------


class _LegacyProfile(profiler_legacy.profile):
    """What a legacy profile becomes when a call is made under it."""

    @property
    def function_events(self) -> EventList | None:
        """What it has seen, None while it runs."""
        return self.__dict__.get("function_events")

    @function_events.setter
    def function_events(self, events: EventList | None) -> None:
        if events is not None:
            _add_to(events)
        self.__dict__["function_events"] = events


_marked: Final[weakref.WeakValueDictionary[str, ProfileRecorder]] = weakref.WeakValueDictionary()


def _of_legacy() -> ProfileRecorder | None:
    """Return a recorder for this thread's profile: of those that run, the one that gets a mark."""
    profiles = _running(profiler_legacy.profile, _of_class(profiler_legacy.profile))
    if not profiles:
        return None
    for profile in profiles:
        if type(profile) is profiler_legacy.profile:
            profile.__class__ = _LegacyProfile
    recorder = ProfileRecorder(profiles)
    for profile in profiles:
        vars(profile).setdefault("_recorders", []).append(recorder)
    recorder.mark = f"{_MARK}{id(recorder):x}"
    _marked[recorder.mark] = recorder
    before = recorder.clock()
    with _RecordFunctionFast(recorder.mark):
        recorder.marked = (before + recorder.clock()) // 2
    return recorder


_FINDERS: Final = {
    ActiveProfilerType.KINETO: _of_kineto,
    ActiveProfilerType.LEGACY: _of_legacy,
}


def _add_to(events: EventList) -> None:
    """Add ours to the events of a profile that has just ended, in which marks stand for them."""
    marks = [event for event in events if event.name.startswith(_MARK)]
    for mark in marks:
        events.remove(mark)
        recorder = _marked.pop(mark.name, None)
        if recorder is not None:
            base = recorder.marked - round(mark.time_range.start * 1000)
            events += recorder.function_events(base)
            recorder.end()
    if marks:
        events[:] = _in_order(events)


# --- what torch has of an event ------------------------------------------------------------------


def _in_order(events: list[Any]) -> list[Any]:
    return sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))


def _function_event(event: Event, base: int, threads: dict[tuple[int, str, int], int]) -> Any:
    # Events of one thread are taken to lie within each other: so a thread's for each call, whose
    # times are moved by more or less.
    thread = event.thread
    if event.worker:
        key = (event.call, event.worker, event.thread)
        thread = threads.setdefault(key, _FIRST_THREAD + len(threads))
    return FunctionEvent(  # type: ignore[no-untyped-call]
        id=0,
        name=event.name,
        trace_name=event.name,
        thread=thread,
        start_us=(event.start - base) / 1000,
        end_us=(event.end - base) / 1000,
        fwd_thread=0,
        input_shapes=_shapes(event),
        stack=event.stack.split("\n") if event.stack else [],
        cpu_memory_usage=event.memory,
        is_async=event.is_async,
        is_remote=bool(event.worker),
        node_id=NODE_IDS.get(event.worker, -1),
        flops=event.flops,
    )


def _shapes(event: Event) -> list[Any]:
    try:
        shapes = json.loads(event.shapes or "[]")
    except (ValueError, RecursionError):  # it was too long to travel whole, or the peer's fancy
        return []
    return shapes if isinstance(shapes, list) else []


def _named_process(worker: str) -> dict[str, Any]:
    name = f"worker {worker}"
    return {"ph": "M", "name": "process_name", "pid": name, "tid": 0, "args": {"name": name}}


def _chrome(event: Event, number: int, zero: int) -> Iterator[dict[str, Any]]:
    """Yield the entry of an event, or the two of one that others of its thread may overlap."""
    entry = {
        "name": event.name,
        "cat": "zmq_autograd",
        "pid": f"worker {event.worker}" if event.worker else os.getpid(),
        "tid": event.thread,
        "ts": (event.start - zero) / 1000,
    }
    if event.is_async:
        mark = {**entry, "id": f"za{number}"}
        yield {**mark, "ph": "b"}
        yield {**mark, "ph": "e", "ts": (event.end - zero) / 1000}
        return
    details = {"Input Dims": _shapes(event)} if event.shapes else {}
    yield {**entry, "ph": "X", "dur": event.duration / 1000, "args": details}
