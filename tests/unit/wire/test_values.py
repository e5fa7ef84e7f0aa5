"""Values: what can travel, as what it arrives, and what to do about what cannot."""

from __future__ import annotations

import enum
from collections import OrderedDict, namedtuple
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings

from tests.unit.wire.wire_samples import VALUES, same
from zmq_autograd.errors import ProtocolError, SerializationError
from zmq_autograd.wire import decode, encode
from zmq_autograd.wire.limits import MAX_CONTAINERS, MAX_NESTING, MAX_NUMBER_KEYS
from zmq_autograd.wire.messages import StatusResponse
from zmq_autograd.wire.objects import Coded, Reference
from zmq_autograd.wire.values import contains, replaced


def through(value: Any) -> Any:
    message = decode(encode(StatusResponse(value)))
    assert isinstance(message, StatusResponse)
    return message.status


def refused(packed: object) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode([msgpack.packb({"type": 0x49, "status": packed})])
    return str(caught.value)


def cannot_travel(value: Any) -> str:
    with pytest.raises(SerializationError) as caught:
        encode(StatusResponse(value))
    assert isinstance(caught.value, TypeError)
    return str(caught.value)


@settings(max_examples=500, deadline=None)
@given(VALUES)
def test_a_value_arrives_as_it_was_sent(value: Any) -> None:
    assert same(through(value), value)


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        2**64 - 1,
        2**64,
        -(2**63),
        -(2**63) - 1,
        2**71 - 1,
        2**71,
        -(2**71),
        10**6000,
        float("nan"),
        -0.0,
        float("-inf"),
        complex(float("nan"), -0.0),
        "",
        b"",
        "\x00\U0001f600",
        (),
        ((), [], {}),
        {None: 1, True: 2, 2: 3, 2.5: 4, "2": 5, b"2": 6, 2**70: 7},
        {"tensor": 0},
        {"dict": []},
    ],
    ids=lambda value: type(value).__name__,
)
def test_edges(value: Any) -> None:
    assert same(through(value), value)


class Colour(enum.IntEnum):
    RED = 3


class Big(int):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "arrives_as"),
    [
        (Colour.RED, 3),
        (Big(2**70), 2**70),
        (Point(1, 2), (1, 2)),
        (torch.Size([1, 2]), (1, 2)),
        (OrderedDict(a=1), {"a": 1}),
    ],
)
def test_a_subclass_arrives_as_its_plain_base(value: Any, arrives_as: Any) -> None:
    assert same(through(value), arrives_as)


def test_numbers_of_numpy_that_are_pythons_own_travel_and_others_do_not() -> None:
    numpy = pytest.importorskip("numpy")
    assert same(through(numpy.float64(0.5)), 0.5)
    assert same(through(numpy.str_("a")), "a")
    for value in (numpy.float32(1), numpy.int64(1), numpy.bool_(True), numpy.ones(2)):
        assert "send tensors" in cannot_travel(value)


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), bytearray(b"a"), range(3), torch.float32, len, [{"a": {1}}]]
)
def test_what_cannot_travel_says_what_to_send(value: Any) -> None:
    assert "send tensors, numbers, str, bytes, None, RRefs, or lists" in cannot_travel(value)


def test_a_dict_key_that_cannot_travel_says_so() -> None:
    assert "a dict key of type tuple" in cannot_travel({(1, 2): 3})
    assert "a dict key of type complex" in cannot_travel({1j: 3})


def nested(levels: int) -> Any:
    value: Any = None
    for level in range(levels):
        value = [[value], (value,), {"a": value}][level % 3]
    return value


def test_values_nest_to_the_limit_and_no_deeper() -> None:
    assert same(through(nested(MAX_NESTING)), nested(MAX_NESTING))
    assert f"deeper than {MAX_NESTING} levels" in cannot_travel(nested(MAX_NESTING + 1))


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: {"tuple": [v]}, lambda v: {"dict": [["a", v]]}]
)
def test_a_received_value_nests_no_deeper_than_a_sent_one(wrap: Any) -> None:
    packed = None
    for _ in range(MAX_NESTING):
        packed = wrap(packed)
    decode([msgpack.packb({"type": 0x49, "status": packed})])
    assert f"deeper than {MAX_NESTING} levels" in refused(wrap(packed))


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    around: dict[str, Any] = {}
    around["a"] = (around,)
    assert "nested deeper" in cannot_travel(endless)
    assert "nested deeper" in cannot_travel(around)


def test_keys_whose_hashes_a_peer_could_choose_are_bounded() -> None:
    mersenne = 2**61 - 1  # equal hashes for all multiples of it
    colliding = {mersenne * i: None for i in range(1, MAX_NUMBER_KEYS + 1)}
    assert through(colliding) == colliding
    colliding[0.5] = None  # type: ignore[index]
    assert "send a list of pairs" in cannot_travel(colliding)
    pairs = [[i, None] for i in range(MAX_NUMBER_KEYS + 1)]
    assert "numbers as keys" in refused({"dict": pairs})
    names = {str(i): i for i in range(4 * MAX_NUMBER_KEYS)}
    assert through(names) == names


@pytest.mark.parametrize(
    "packed",
    [
        {},
        {"a": 1},
        {"set": [1]},
        {"tuple": [], "dict": []},
        {"tuple": {}},
        {"tuple": None},
        {"dict": {}},
        {"dict": [["a"]]},
        {"dict": [["a", 1, 2]]},
        {"dict": [{"a": 1}]},
        {"dict": [["a", 1], ["a", 2]]},
        {"dict": [[1, 1], [True, 2]]},
        {"dict": [[1, 1], [1.0, 2]]},
        {"dict": [[[], 1]]},
        {"dict": [[{"tuple": []}, 1]]},
        {"dict": [[{"complex": [0.0, 1.0]}, 1]]},
        {"complex": [1.0]},
        {"complex": [1, 2]},
        {"complex": [1.0, True]},
        {"complex": 1.0},
        {"int": b"\0" * 8},
        {"int": 1},
        {"int": "\0" * 9},
        {"tensor": 0},
        {"tensor": -1},
        {"tensor": True},
        {"tensor": None},
        {"tensor": [0]},
        {"rref": ["bob", "life", 1, 2]},
        {"rref": ["bob", "life", 1, 2, [], 3]},
        {"rref": {"owner": "bob"}},
        {"rref": [b"bob", "life", 1, 2, []]},
        {"rref": ["bob", None, 1, 2, []]},
        {"rref": ["bob", "life", 0, 2, []]},
        {"rref": ["bob", "life", 1, 0, []]},
        {"rref": ["bob", "life", 1, True, []]},
        {"rref": ["bob", "life", -1, 2, []]},
        {"rref": ["bob", "life", 1, 2, "tcp://"]},
        {"rref": ["bob", "life", 1, 2, [3]]},
        {"coded": ["point"]},
        {"coded": ["point", 1, 2]},
        {"coded": [b"point", 1]},
        {"coded": ["point", {"set": []}]},
        {"coded": {"point": 1}},
        msgpack.Timestamp(0, 0),
        msgpack.ExtType(5, b"a"),
        [msgpack.ExtType(5, b"a")],
    ],
    ids=repr,
)
def test_what_stands_for_no_value_is_refused(packed: object) -> None:
    assert refused(packed)


def test_rrefs_are_counted_over_a_whole_message() -> None:
    reference = Reference("", "", 1, 2)  # short, or the header were too long
    most = [reference] * (MAX_CONTAINERS - 1)
    assert through(most) == most
    assert f"more than {MAX_CONTAINERS} lists, tuples" in cannot_travel([*most, reference])
    packed = {"rref": ["", "", 1, 2, []]}
    assert f"more than {MAX_CONTAINERS} lists" in refused([packed] * MAX_CONTAINERS)


def test_what_is_in_a_value_is_found_and_replaced_at_any_depth() -> None:
    reference = Reference("bob", "life", 1, 2)
    value = [1, ({"a": Coded("point", [reference])}, "b"), {"c": [3]}]
    assert contains(value, Reference)
    assert contains(value, Coded)
    assert not contains(value, torch.Tensor)
    assert replaced(value, Reference, lambda found: found.rref_id)[1][0]["a"].value == [1]
    opened = replaced(value, (Reference, Coded), lambda found: getattr(found, "value", None))
    assert opened == [1, ({"a": [reference]}, "b"), {"c": [3]}]  # what is found is not searched


@pytest.mark.parametrize("empty", [[], (), {}], ids=["list", "tuple", "dict"])
def test_containers_are_counted_over_a_whole_message(empty: object) -> None:
    most = [empty] * (MAX_CONTAINERS - 1)  # and the list around them
    assert through(most) == most
    assert f"more than {MAX_CONTAINERS} lists, tuples" in cannot_travel([*most, empty])
    packed = [] if isinstance(empty, list) else {type(empty).__name__: []}
    assert f"more than {MAX_CONTAINERS} lists" in refused([packed] * MAX_CONTAINERS)


def test_entries_of_dicts_are_counted_with_the_containers() -> None:
    most = {str(i): i for i in range(MAX_CONTAINERS - 1)}
    assert through(most) == most
    assert f"more than {MAX_CONTAINERS} lists" in cannot_travel(most | {"one": "more"})
    entries = [[str(i), i] for i in range(MAX_CONTAINERS)]
    assert f"more than {MAX_CONTAINERS} lists" in refused({"dict": entries})
