"""Codecs: what is packed by which, and made again."""

from __future__ import annotations

from abc import ABC
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pytest
import torch

from zmq_autograd.errors import ConfigurationError, SerializationError
from zmq_autograd.node.codecs import Codecs
from zmq_autograd.wire.objects import Coded


@dataclass
class Point:
    x: Any
    y: Any


class Named(Point):
    """A subclass without a codec of its own."""


class Special(Point):
    """A subclass with one."""


class Described(ABC):  # noqa: B024  # of which others are made instances
    """An abstract class."""


Pair = namedtuple("Pair", "left right")


@pytest.fixture
def codecs() -> Codecs:
    table = Codecs("bob")
    table.add(Point, None, lambda point: [point.x, point.y], lambda value: Point(*value))
    table.add(Pair, "pair", tuple, lambda value: Pair(*value))
    return table


def test_objects_are_packed_at_any_depth_and_in_each_other(codecs: Codecs) -> None:
    value = [1, {"a": (Point(2, Point(3, Pair(4, Point(5, 6)))), "b")}]
    packed = codecs.pack(value)
    assert isinstance(packed[1]["a"][0], Coded)
    assert codecs.unpack(packed) == value


def test_what_has_nothing_to_pack_stays_the_same_object(codecs: Codecs) -> None:
    value = [1, {"a": (torch.ones(2), "b")}]
    assert codecs.pack(value) is value
    assert codecs.unpack(value) is value


def test_an_abstract_class_has_instances_that_do_not_inherit_from_it(codecs: Codecs) -> None:
    codecs.add(Described, "described", lambda path: str(path), Path)
    Described.register(PurePath)
    packed = codecs.pack([Path("a/b")])
    assert (packed[0].codec, packed[0].value) == ("described", "a/b")
    assert codecs.unpack(packed) == [Path("a/b")]


def test_a_subclass_goes_by_its_nearest_codec(codecs: Codecs) -> None:
    codecs.add(Special, "special", lambda point: point.x, lambda value: Special(value, None))
    assert codecs.unpack(codecs.pack(Named(1, 2))) == Point(1, 2)
    assert type(codecs.unpack(codecs.pack(Special(1, 2)))) is Special


def test_a_codec_may_let_an_object_travel_as_it_is(codecs: Codecs) -> None:
    codecs.add(
        torch.Tensor,
        "short",
        lambda tensor: tensor if tensor.numel() > 1 else tensor.item(),
        torch.tensor,
    )
    long, short = torch.ones(2), torch.ones(1)
    packed = codecs.pack([long, short])
    assert packed[0] is long
    assert codecs.unpack(packed)[1] == torch.tensor(1.0)


def test_a_name_that_is_not_known_is_refused_in_words(codecs: Codecs) -> None:
    with pytest.raises(SerializationError, match="worker 'bob' has no codec 'circle'"):
        codecs.unpack([Coded("circle", 1)])


@pytest.mark.parametrize(
    ("kind", "name", "problem"),
    [
        (Point, "other", "there is a codec for 'other'"),
        (Special, "Point", "there is a codec for 'Point'"),
        (Special, "", "expected up to 200 printable characters"),
        (Special, "x" * 201, "expected up to 200 printable characters"),
        ("Point", None, "expected a type"),
        (dict, None, "expected a type of your own"),
        (Mapping, None, "expected a type of your own"),
        (Sequence, None, "expected a type of your own"),
        (object, None, "expected a type of your own"),
    ],
)
def test_what_cannot_work_is_refused(
    codecs: Codecs, kind: Any, name: str | None, problem: str
) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        codecs.add(kind, name, repr, repr)


def test_both_ways_have_to_be_functions(codecs: Codecs) -> None:
    for pack, unpack in ((None, repr), (repr, 5)):
        with pytest.raises(ConfigurationError, match="codec: expected a function"):
            codecs.add(Special, None, pack, unpack)  # type: ignore[arg-type]
