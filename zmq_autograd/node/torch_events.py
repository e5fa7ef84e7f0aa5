"""What is collected for torch's own profiles, in the form that those have of events.

A ``FunctionEvent`` for each, or entries of a Chrome trace.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch.autograd import profiler_legacy
from torch.autograd.profiler_util import FunctionEvent

from zmq_autograd.node.profiled import Event, ProfilerOptions
from zmq_autograd.node.recorder import Recorder

_FIRST_THREAD: Final = 2**32  # numbers of other workers' threads: no thread here has one

_numbers: dict[str, int] = {}


def number_workers(numbers: Mapping[str, int]) -> None:
    """Have events tell, as ``node_id``, which worker they are of: by name, "" is this process.

    Those that have no number get -1, as all had before.
    """
    global _numbers
    _numbers = dict(numbers)


class ProfileRecorder(Recorder):
    """Collects what is added to torch's profiles."""

    def __init__(self, profiles: list[Any]) -> None:
        """Collect for `profiles`, as long as one of them runs."""
        names = ProfilerOptions.__dataclass_fields__
        super().__init__(
            ProfilerOptions(**{name: any(getattr(p, name) for p in profiles) for name in names})
        )
        self._profiles = [weakref.ref(profile) for profile in profiles]

    @property
    def is_over(self) -> bool:  # type: ignore[override]
        """Whether none of the profiles runs any more."""
        profiles = (ref() for ref in self._profiles)
        return not any(p is not None and is_running(p) for p in profiles)

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


def is_running(profile: Any) -> bool:
    """Say whether a profile of torch's, of either kind, runs."""
    if not getattr(profile, "entered", False):
        return False
    if isinstance(profile, profiler_legacy.profile):
        return profile.function_events is None
    return bool(profile.profiling_start_time_ns > profile.profiling_end_time_ns)


def in_order(events: list[Any]) -> list[Any]:
    """Return events as torch has them, in the order in which profiles have those."""
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
        node_id=_numbers.get(event.worker, -1),
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
