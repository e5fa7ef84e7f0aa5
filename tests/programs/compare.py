"""Tells what two runs of one program have seen apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tests.programs.program import Program, all_passes, has_passes_in_any_order
from tests.programs.record import LEAF_ACCUMULATED, LEAF_HOOK, Key, Record

# Sums are taken in another order than in one process.
RELATIVE: Final = 1e-9
ABSOLUTE: Final = 1e-11


def check_equal(program: Program, expected: Record, actual: Record) -> None:
    """Check that `actual` is what one process sees, to within rounding."""
    _check_counts(program, expected, actual)
    for tag, rounds in expected.collected.items():
        assert len(rounds) == len(actual.collected[tag])
        for n, (one, other) in enumerate(zip(rounds, actual.collected[tag], strict=True)):
            for leaf, (a, b) in enumerate(zip(one, other, strict=True)):
                what = f"gradient of leaf {leaf}, as {tag} collects it the {n + 1}. time"
                assert (a is None) == (b is None), f"{what}: expected {a}, got {b}"
                _check_close(what, a, b)
    for key, grads in expected.seen.items():
        if not _is_unsure(program, key):
            want, got = (_in_order(program, key, seen) for seen in (grads, actual.seen[key]))
            for a, b in zip(want, got, strict=True):
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
            one_seen, other_seen = (
                _bits(_in_order(program, key, record.seen[key])) for record in (first, second)
            )
            assert one_seen == other_seen, f"gradients that {key} was called with"


def _in_order(program: Program, key: Key, grads: list[Tensor]) -> list[Tensor]:
    """Return `grads` in an order that does not depend on which pass came first, if it may."""
    if _is_shared(program, key) or has_passes_in_any_order(program):
        return sorted(grads, key=Tensor.tolist)
    return grads


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
