"""How a legacy profile of torch's hears of calls: its class becomes one that sees its events come.

Which of several that run is that of a thread shows in a mark, recorded there: its time is also what
leads from the profile's clock to ours.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

from torch._C._profiler import _RecordFunctionFast
from torch.autograd import profiler_legacy
from torch.autograd.profiler_util import EventList

from zmq_autograd.node.torch_events import ProfileRecorder, in_order

_MARK: Final = "zmq_autograd::profile "


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


class _MarkedRecorder(ProfileRecorder):
    """Collects what is added to one legacy profile.

    Attributes:
        mark: the name of a range that the profile records at `marked`.
        marked: in nanoseconds since 1970.
        has_ended: the profile has what was collected.
    """

    marked = 0
    has_ended = False

    def __init__(self, profiles: list[Any]) -> None:
        """Collect for one of `profiles`, as long as one of them runs."""
        super().__init__(profiles)
        self.mark = f"{_MARK}{id(self):x}"

    @property
    def is_over(self) -> bool:  # type: ignore[override]
        """Whether it has ended."""
        return self.has_ended or super().is_over


_marked: Final[weakref.WeakValueDictionary[str, _MarkedRecorder]] = weakref.WeakValueDictionary()


def hear(profiles: list[Any]) -> ProfileRecorder:
    """Return a recorder for this thread's profile: the one of these, all running, with its mark."""
    for profile in profiles:
        if type(profile) is profiler_legacy.profile:
            profile.__class__ = _LegacyProfile
    recorder = _MarkedRecorder(profiles)
    for profile in profiles:
        vars(profile).setdefault("_recorders", []).append(recorder)
    _marked[recorder.mark] = recorder
    before = recorder.clock()
    with _RecordFunctionFast(recorder.mark):
        recorder.marked = (before + recorder.clock()) // 2
    return recorder


def _add_to(events: EventList) -> None:
    """Add ours to the events of a profile that has just ended, in which marks stand for them."""
    marks = [event for event in events if event.name.startswith(_MARK)]
    for mark in marks:
        events.remove(mark)
        recorder = _marked.pop(mark.name, None)
        if recorder is not None:
            base = recorder.marked - round(mark.time_range.start * 1000)
            events += recorder.function_events(base)
            recorder.has_ended = True
    if marks:
        events[:] = in_order(events)
