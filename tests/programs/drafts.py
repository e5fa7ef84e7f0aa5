"""What is known of a program while it is being written: enough to write only what can run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from tests.programs.program import Step

Places = frozenset[int]
"""Numbers of steps that put something on the graph."""


@dataclass(eq=False)
class Symbol:
    """What is known of a tensor.

    Attributes:
        saving: where what leads to it has saved tensors, which a pass may free.
        certain: sites and saving places that a gradient for it reaches for certain.
        requires_grad: as in torch.
        is_fresh: it was received and nothing has saved it: it may be changed in place.
        is_leaf: it is a parameter.
    """

    saving: Places = frozenset()
    certain: Places = frozenset()
    requires_grad: bool = False
    is_fresh: bool = False
    is_leaf: bool = False


@dataclass
class Draft:
    """A body that is being written.

    Attributes:
        worker: who runs it.
        caller: who called it; None for a trainer's own.
        depth: calls that lead to it.
        no_grad: it runs under `torch.no_grad`.
        is_alone: nothing else of this trainer runs while it does.
        is_repeated: it may be run several times.
        slots: what bodies before it kept: worker and tensor, by slot.
        steps: written so far.
        registers: what its steps made.
        started: calls that were started and are not finished: what they return, by number.
    """

    worker: int
    caller: int | None
    depth: int
    no_grad: bool
    is_alone: bool
    is_repeated: bool
    slots: dict[int, tuple[int, Symbol]]
    steps: list[Step] = field(default_factory=list)
    registers: list[Symbol] = field(default_factory=list)
    started: dict[int, list[Symbol]] = field(default_factory=dict)


@dataclass
class Budget:
    """What all bodies of one program share.

    Attributes:
        calls: how many more may be made.
        numbers: gives each call, slot, site and saving place a number.
        sites: what may raise in backward.
        freed: saving places that a pass may have freed.
        freed_for_certain: and those that one has, among others.
        is_broken: a pass that did not retain the graph was aborted: no other may run.
        has_one_trainer: nobody else's passes reach the leaves.
    """

    calls: int
    has_one_trainer: bool
    numbers: itertools.count[int]
    sites: set[int] = field(default_factory=set)
    freed: set[int] = field(default_factory=set)
    freed_for_certain: set[int] = field(default_factory=set)
    is_broken: bool = False

    def add_saving(self, symbol: Symbol) -> None:
        """Take in that what makes `symbol` saves tensors."""
        place = next(self.numbers)
        symbol.saving |= {place}
        symbol.certain |= {place}

    def add_site(self, symbol: Symbol, site: int) -> None:
        """Take in that gradients for `symbol` reach `site`."""
        self.sites.add(site)
        symbol.certain |= {site}
