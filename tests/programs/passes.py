"""Writes the passes of random programs: over graph that none has freed, and faults that are met."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from tests.programs.drafts import Budget, Draft, Symbol
from tests.programs.program import Backward, Pass, Root


def write_backward(draw: st.DrawFn, draft: Draft, budget: Budget) -> bool:
    """Append one or two passes to `draft`, or what comes of a fault; False where none can run."""
    if draft.no_grad or draft.is_repeated or budget.is_broken:
        return False
    if not draft.is_alone:
        return _write_pass_among_others(draw, draft, budget)
    first = _write_pass(draw, draft, budget)
    if first is None:
        return False
    passes = [first]
    if first.fault is None and draw(st.integers(0, 4)) == 4:
        second = _write_pass(draw, draft, budget, may_fail=False)
        passes += [] if second is None else [second]
    draft.steps.append(Backward(tuple(passes)))
    if first.fault is not None and first.retain_graph:
        # Repeated without the fault it is exact.
        draft.steps.append(Backward((Pass(first.roots, retain_graph=True),)))
    elif not budget.is_broken and draw(st.integers(0, 2)) == 2:
        _write_second_pass(draw, draft, budget)
    return True


def _write_pass(
    draw: st.DrawFn, draft: Draft, budget: Budget, *, may_fail: bool = True
) -> Pass | None:
    """Return a pass over what none has freed, None if there is nothing."""
    roots = _draw_roots(draw, draft, lambda symbol: not symbol.saving & budget.freed)
    if not roots:
        return None
    symbols = [draft.registers[root.register] for root in roots]
    retain_graph = draw(st.booleans())
    certain = frozenset[int]().union(*(symbol.certain for symbol in symbols))
    sites = sorted(certain & budget.sites)
    fault = None
    if may_fail and sites and draw(st.integers(0, 2)) == 2:
        fault = draw(st.sampled_from(sites))
    if not retain_graph:
        budget.freed.update(*(symbol.saving for symbol in symbols))
        budget.freed_for_certain |= certain
        budget.is_broken = fault is not None
    return Pass(roots, retain_graph, fault)


def _write_pass_among_others(draw: st.DrawFn, draft: Draft, budget: Budget) -> bool:
    """Append a pass of which it is open what runs before it and what after."""
    roots = _draw_roots(draw, draft, lambda symbol: not symbol.saving & budget.freed)
    if roots:
        draft.steps.append(Backward((Pass(roots, retain_graph=True),)))
    return bool(roots)


def _write_second_pass(draw: st.DrawFn, draft: Draft, budget: Budget) -> None:
    """Append a pass over what one has freed, which raises, if there is anything."""
    freed = budget.freed_for_certain
    roots = _draw_roots(draw, draft, lambda s: bool(s.certain & s.saving & freed))
    if roots:
        retain_graph = draw(st.integers(0, 3)) < 3
        budget.is_broken = not retain_graph
        draft.steps.append(Backward((Pass(roots, retain_graph, meets_freed=True),)))


def _draw_roots(
    draw: st.DrawFn, draft: Draft, may_be: Callable[[Symbol], bool]
) -> tuple[Root, ...]:
    """Return roots among those registers that require grad and may be; none if there are none."""
    registers = [
        register
        for register, symbol in enumerate(draft.registers)
        if symbol.requires_grad and may_be(symbol)
    ]
    if not registers:
        return ()
    # The latest first: what was made last has the most behind it.
    choice = st.sampled_from(registers[::-1])
    count = draw(st.sampled_from((1, 1, 2, 3)))
    return tuple(Root(draw(choice), draw(st.booleans())) for _ in range(count))
