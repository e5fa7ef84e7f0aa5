"""Where the user's own profile gets to hear of calls: torch offers no way to add events to one.

So the profile that runs in a thread is looked for, once, among all objects that there are, when the
first call is made under it; and that one object, never its class, is given a method of its own that
adds our events to those that torch has.  Under Kineto (``torch.profiler``, and
``torch.autograd.profiler.profile``) those are what it parses its results with, and exports a Chrome
trace with.  `legacy_profiles` has what is done to a legacy profile.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import threading
import time
import weakref
from contextvars import Context
from typing import Any, Final

from torch._C._autograd import _profiler_enabled, _profiler_type
from torch._C._profiler import ActiveProfilerType
from torch.autograd import profiler, profiler_legacy

from zmq_autograd.node import legacy_profiles
from zmq_autograd.node.recorder import Recorder, current_recorder
from zmq_autograd.node.torch_events import ProfileRecorder, in_order, is_running

logger = logging.getLogger("zmq_autograd")

SEARCH_AGAIN_SECONDS: Final = 1.0
"""Seconds after which a profile that was not found is looked for again: it can take 100 ms."""


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
    return [found for found in objects if issubclass(type(found), kind) and is_running(found)]


def _of_class(kind: type) -> list[Any]:
    """Return all objects of `kind`, and more: they refer to their class, as each object does."""
    return gc.get_referrers(kind, *kind.__subclasses__())


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
    return in_order(events)


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


def _of_legacy() -> ProfileRecorder | None:
    profiles = _running(profiler_legacy.profile, _of_class(profiler_legacy.profile))
    return legacy_profiles.hear(profiles) if profiles else None


_FINDERS: Final = {
    ActiveProfilerType.KINETO: _of_kineto,
    ActiveProfilerType.LEGACY: _of_legacy,
}
