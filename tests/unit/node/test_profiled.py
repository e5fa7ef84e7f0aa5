"""How the events of a call travel, and how the other side's times become this one's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmq_autograd.errors import ProtocolError
from zmq_autograd.node.profiled import (
    MAX_BYTES,
    MAX_EVENTS,
    Event,
    ProfilerOptions,
    clean,
    pack,
    unpack,
)
from zmq_autograd.wire import DEFAULT_LIMITS, encode
from zmq_autograd.wire.messages import ForwardResponse

PREFIX = "call#f(alice -> bob)#remote_op: "


def arrived(value: object, *, sent: int = 0, received: int = 1000) -> list[Event]:
    return unpack(value, PREFIX, "bob", 1, sent, received)


def packed(*events: Event, took: int = 100) -> dict[str, Any]:
    return pack(events, "bob", 5_000_000, 5_000_000 + took)


def test_options_travel() -> None:
    options = ProfilerOptions(record_shapes=True, with_flops=True)
    assert options.to_value() == {
        "record_shapes": True,
        "profile_memory": False,
        "with_stack": False,
        "with_flops": True,
    }
    assert ProfilerOptions.from_value(options.to_value()) == options
    assert ProfilerOptions.from_value({"with_wings": True}) == ProfilerOptions()


@pytest.mark.parametrize("value", [1, "record_shapes", {"record_shapes": 1}, [True]])
def test_other_options_are_refused(value: object) -> None:
    with pytest.raises(ProtocolError, match="profiler"):
        ProfilerOptions.from_value(value)


def test_events_are_packed_as_the_protocol_says() -> None:
    event = Event(
        "aten::mm",
        5_000_010,
        5_000_030,
        3,
        shapes="[[2, 2], [2, 2]]",
        stack="f.py(1): f",
        memory=16,
        flops=24,
    )
    assert pack([event], "bob", 5_000_000, 5_000_100, left_out=2) == {
        "took": 100,
        "left_out": 2,
        "texts": ["aten::mm", "bob", "[[2, 2], [2, 2]]", "f.py(1): f"],
        "events": [[0, 1, 2, 3, 10, 20, 3, 0, 16, 24]],
    }


def test_what_arrives_is_what_was_packed() -> None:
    event = Event("aten::mm", 5_000_010, 5_000_030, 3, "carol", 7, True, "[[2]]", "s", 16, 24)
    # 1000 between request and reply, of which 100 over there: 450 each way.
    assert arrived(packed(event)) == [
        Event(PREFIX + "aten::mm", 460, 480, 3, "carol", 1, True, "[[2]]", "s", 16, 24)
    ]


@pytest.mark.parametrize("took", [0, 1000, 10_000, -5])
@pytest.mark.parametrize("start", [-(10**15), 0, 10**15])
def test_nothing_lies_outside_its_call(took: int, start: int) -> None:
    event = Event("op", 5_000_000 + start, 5_000_000 + start + 50, 1)
    (found,) = arrived(packed(event, took=took), sent=200, received=900)
    assert 200 <= found.start <= found.end <= 900


def test_what_was_left_out_is_told() -> None:
    events = [Event(f"op {i}", 0, 10_000 - i, 1) for i in range(MAX_EVENTS + 5)]
    value = pack(events, "bob", 0, 20_000, left_out=3)
    *kept, note = arrived(value)
    assert [event.name for event in kept] == [PREFIX + event.name for event in events[:MAX_EVENTS]]
    assert note.name == PREFIX + "(8 shorter events left out)"
    assert note.worker == "bob"


def test_events_take_no_more_than_their_share_of_a_header() -> None:
    large = Event("x", 0, 2**62, 2**62, shapes="é" * 2000, memory=2**62, flops=2**62)
    events = [replace(large, name=f"{i:0900}") for i in range(500)]
    value = pack(events, "bob", -(2**62), 0)
    assert 0 < len(value["events"]) < len(events) == len(value["events"]) + value["left_out"]
    many = pack([large] * MAX_EVENTS, "bob", -(2**62), 0)
    for reply in (value, many):
        header = memoryview(encode(ForwardResponse(profiler_events=reply))[0]).nbytes
        assert header < MAX_BYTES + 1024 < DEFAULT_LIMITS.header_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"took": None},
        {"left_out": "1"},
        {"texts": [1]},
        {"texts": ["x" * 1001]},
        {"events": [[0] * 9]},
        {"events": [[0] * 11]},
        {"events": [[9] + [0] * 9]},
        {"events": [[-1] + [0] * 9]},
        {"events": [[0] * 9 + [2**63]]},
        {"events": [[True] * 10]},
        {"events": 5},
    ],
    ids=str,
)
def test_malformed_events_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="profiler events"):
        arrived(packed(Event("op", 0, 1, 1)) | change)


values = st.recursive(
    st.none() | st.integers() | st.text() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=11)
        | st.dictionaries(st.sampled_from(["took", "left_out", "texts", "events"]), inner)
    ),
)


@given(values)
def test_whatever_arrives_is_events_or_refused(value: object) -> None:
    try:
        found = arrived(value)
    except ProtocolError:
        return
    assert all(0 <= event.start <= event.end <= 1000 for event in found)


def test_names_are_fit_for_a_trace() -> None:
    assert clean('a"b\\c\nd\x1b[0m é') == "a?b?c?d?[0m é"
    assert len(clean("x" * 5000)) == 1000
