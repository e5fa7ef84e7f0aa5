"""Ids: their range, that none is 0, and that nobody else's is met."""

from __future__ import annotations

import itertools
import string
from typing import Any

import pytest

from zmq_autograd import ids


def test_random_ids_are_unsigned_64_bit_and_never_0() -> None:
    drawn = [ids.random_id() for _ in range(10_000)]
    assert all(1 <= one <= ids.MAX_ID for one in drawn)
    assert len(set(drawn)) == len(drawn)
    assert max(drawn) > 2**63 > min(drawn)  # all 64 bits are used


@pytest.mark.parametrize("drawn", [0, 2**64 - 2])
def test_the_ends_of_the_range_are_reached(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(below: int) -> int:
        assert below == 2**64 - 1
        return drawn

    monkeypatch.setattr("secrets.randbelow", draw)
    assert ids.random_id() == drawn + 1


def test_many_generators_never_give_the_same_id() -> None:
    given: list[int] = []
    for _ in range(200):
        given += itertools.islice(ids.consecutive_ids(), 500)
    assert len(set(given)) == len(given) == 100_000
    assert all(1 <= one <= ids.MAX_ID for one in given)


def test_consecutive_ids_follow_each_other_from_a_random_start() -> None:
    first, second = ids.consecutive_ids(), ids.consecutive_ids()
    start = next(first)
    assert list(itertools.islice(first, 3)) == [start + 1, start + 2, start + 3]
    assert abs(next(second) - start) > 10


def test_after_the_largest_id_comes_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "random_id", lambda: ids.MAX_ID - 1)
    made = list(itertools.islice(ids.consecutive_ids(), 4))
    assert made == [ids.MAX_ID - 1, ids.MAX_ID, 1, 2]


def test_incarnations_are_32_hexadecimal_digits_and_differ() -> None:
    made: set[Any] = {ids.new_incarnation() for _ in range(100)}
    assert len(made) == 100
    assert all(len(one) == 32 and set(one) <= set(string.hexdigits.lower()) for one in made)
