"""Tells what two runs of one program have seen apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tests.programs.program import Program, all_passes
from tests.programs.record import LEAF_ACCUMULATED, LEAF_HOOK, Key, Record

# Sums are taken in another order than in one process.
RELATIVE: Final = 1e-9
ABSOLUTE: Final = 1e-11


def check_equal(program: Program, expected: Record, actual: Record) -> None:
    """Check that `actual` is what one process sees, to within rounding."""
    _check_counts(program, expected, actual)
    for tag, rounds in expected.collected.items():
        assert len(rounds) == len(actual.collected[tag])
        for n, (want, got) in enumerate(zip(rounds, actual.collected[tag], strict=True)):
            for leaf, (a, b) in enumerate(zip(want, got, strict=True)):
                what = f"gradient of leaf {leaf}, as {tag} collects it the {n + 1}. time"
                assert (a is None) == (b is None), f"{what}: expected {a}, got {b}"
                _check_close(what, a, b)
    for key, grads in expected.seen.items():
        if not _is_shared(program, key):
            for a, b in zip(grads, actual.seen[key], strict=True):
                _check_close(f"gradient that {key} was called with", a, b)


def _check_close(what: str, expected: Tensor | None, actual: Tensor | None) -> None:
    if expected is not None and actual is not None:
        torch.testing.assert_close(
            actual, expected, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda text: f"{what}: {text}"
        )


def _check_counts(program: Program, expected: Record, actual: Record) -> None:
    want, got = expected.counts(), actual.counts()
    wrong = {
        key: (want.get(key, 0), got.get(key, 0))
        for key in want.keys() | got.keys()
        if want.get(key, 0) != got.get(key, 0) and not _is_unsure(program, key)
    }
    assert not wrong, f"called (expected, actual) times: {wrong}"


def check_same(program: Program, first: Record, second: Record) -> None:
    """Check that two runs on the same workers have seen the same, bit by bit."""
    assert first.collected.keys() == second.collected.keys()
    for tag, rounds in first.collected.items():
        for one, other in zip(rounds, second.collected[tag], strict=True):
            assert _bits(one) == _bits(other), f"gradients that {tag} collects"
    for key in first.seen.keys() | second.seen.keys():
        if not _is_unsure(program, key):
            both = _bits(first.seen[key]), _bits(second.seen[key])
            if _is_shared(program, key):  # whose pass comes first is open
                same = Counter(both[0]) == Counter(both[1])
            else:
                same = both[0] == both[1]
            assert same, f"gradients that {key} was called with"


def _is_shared(program: Program, key: Key) -> bool:
    """Tell whether passes of several trainers, in any order, are seen under `key`."""
    return len(program.trainers) > 1 and key[0] in (LEAF_HOOK, LEAF_ACCUMULATED)


def _is_unsure(program: Program, key: Key) -> bool:
    """Tell whether an aborted pass may have been seen under `key`, among those of others."""
    if not _is_shared(program, key) or key[0] == LEAF_ACCUMULATED:
        return False
    return any(one.fails for one in all_passes(program))


def _bits(grads: Sequence[Tensor | None]) -> list[bytes | None]:
    return [None if grad is None else grad.numpy().tobytes() for grad in grads]
