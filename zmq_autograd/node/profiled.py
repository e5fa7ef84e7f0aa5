"""What a profiler saw: one `Event` each, and how the events of a call travel with its reply.

Owns what the messages' ``profiler`` and ``profiler_events`` hold, how much that may be, and how
another worker's times become this one's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from zmq_autograd.errors import ProtocolError

MAX_EVENTS: Final = 1000
"""Events that a reply carries; the shortest are left out, and how many those are is told."""

MAX_BYTES: Final = 96 * 1024
"""What they may take of a message's header."""

MAX_TEXT: Final = 1000
"""Characters of a name, of shapes, of a stack."""

_EVENT_BYTES: Final = 64  # of an event's numbers, at most


@dataclass(frozen=True, slots=True)
class ProfilerOptions:
    """What the caller's profiler records, by torch's names (torch: ``ProfilerConfig``).

    Attributes:
        record_shapes: the shapes of what goes into operators.
        profile_memory: the memory that operators allocate.
        with_stack: the lines of Python that operators were called from.
        with_flops: the floating-point operations of operators.
    """

    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False

    def to_value(self) -> dict[str, bool]:
        """Return what a request carries of them."""
        return asdict(self)

    @classmethod
    def from_value(cls, value: object) -> ProfilerOptions:
        """Return what a request carried; options that this version does not know are left out.

        Raises:
            ProtocolError: `value` is nothing that `to_value` returns.
        """
        if not isinstance(value, dict) or not all(type(v) is bool for v in value.values()):
            raise ProtocolError("profiler: expected a dict of names to bools")
        return cls(**{name: value.get(name, False) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Event:
    """One range of time in one thread.

    Attributes:
        name: of the operator or the range; a call's, and `REMOTE_OP`, before what ran in it.
        start: when it began, in nanoseconds since 1970 by the clock of this process.
        end: when it ended, likewise.
        thread: a number of its thread.
        worker: the name of the worker where it was, "" for this one.
        call: which of this worker's calls brought it, 0 for none.
        is_async: others of its thread may overlap it: a call, say.
        shapes: of the inputs, as JSON; "" where not recorded.
        stack: lines of Python, the innermost first; "" where not recorded.
        memory: bytes allocated in it, less those freed.
        flops: floating-point operations; 0 where not known.
    """

    name: str
    start: int
    end: int
    thread: int
    worker: str = ""
    call: int = 0
    is_async: bool = False
    shapes: str = ""
    stack: str = ""
    memory: int = 0
    flops: int = 0

    @property
    def duration(self) -> int:
        """How long it took, in nanoseconds."""
        return self.end - self.start


def pack(
    events: Iterable[Event], worker: str, arrived: int, replied: int, left_out: int = 0
) -> dict[str, Any]:
    """Return `events`, the longest first, as a reply carries them, as many as there is room for.

    Args:
        events: those of the call; times as this worker has them.
        worker: this worker's name.
        arrived: when the request came, by the clock of the events.
        replied: when the reply went.
        left_out: how many events there were beside these.
    """
    texts: dict[str, int] = {}
    rows: list[list[int]] = []
    room = MAX_BYTES
    for event in events:
        strings = (event.name, event.worker or worker, event.shapes, event.stack)
        new = {text[:MAX_TEXT] for text in strings} - texts.keys()
        room -= _EVENT_BYTES + sum(5 + len(text.encode()) for text in new)
        if room < 0 or len(rows) == MAX_EVENTS:
            left_out += 1
            continue
        numbers = [texts.setdefault(text[:MAX_TEXT], len(texts)) for text in strings]
        times = [event.start - arrived, event.duration, event.thread]
        rows.append([*numbers, *times, int(event.is_async), event.memory, event.flops])
    return {"took": replied - arrived, "left_out": left_out, "texts": list(texts), "events": rows}


def unpack(
    value: object, prefix: str, worker: str, call: int, sent: int, received: int
) -> list[Event]:
    """Return the events of a reply with their times moved onto this side's clock.

    Half of the time between request and reply that the other side did not take is that of each
    way.  Nothing is put before the request or after the reply, whatever the other clock did.

    Args:
        value: what `pack` returned there.
        prefix: what all names begin with.
        worker: the name of the worker that replied.
        call: the number of the call.
        sent: when the request went, by this side's clock.
        received: when the reply came.

    Raises:
        ProtocolError: `value` is nothing that `pack` returns.
    """
    try:
        return list(_unpacked(value, prefix, worker, call, sent, received))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ProtocolError(f"profiler events: malformed ({error!r})") from error


def clean(text: str) -> str:
    """Return `text` as it may stand in torch's traces, which quote nothing."""
    kept = text[:MAX_TEXT]
    return "".join(c if c.isprintable() and c not in '"\\' else "?" for c in kept)


def _unpacked(
    value: Any, prefix: str, peer: str, call: int, sent: int, received: int
) -> Iterable[Event]:
    took, left_out = _int(value["took"]), _int(value["left_out"])
    texts = [_text(text) for text in value["texts"]]
    way = max(0, received - sent - took) // 2

    def here(time: int) -> int:
        return min(max(sent + way + time, sent), received)

    for row in value["events"]:
        name, worker, shapes, stack, start, duration, thread, is_async, memory, flops = map(
            _int, row
        )
        if min(name, worker, shapes, stack) < 0:
            raise ValueError("a text has a negative number")
        yield Event(
            clean(prefix + texts[name]),
            here(start),
            here(start + max(0, duration)),
            thread,
            clean(texts[worker]),
            call,
            bool(is_async),
            texts[shapes],
            texts[stack],
            memory,
            flops,
        )
    if left_out > 0:
        told = clean(f"{prefix}({left_out:,} shorter events left out)")
        yield Event(told, here(took), here(took), 0, clean(peer), call, is_async=True)


def _int(value: object) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"expected an int of 64 bits, got {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise ValueError(f"expected a text of up to {MAX_TEXT} characters")
    return value
