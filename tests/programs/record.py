"""What is seen of one run of a program: hooks and Functions as they run, and the gradients.

Whatever happens in bodies that are repeated, or under two trainers at once, has a key of its own,
so that what two runs recorded under one key can be compared in order.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

Key = tuple[str, int]
"""The tag of the body, or what kind of hook of a leaf, and the site."""

LEAF_HOOK: Final = "leaf hook"
LEAF_ACCUMULATED: Final = "leaf accumulated"

Gradients = tuple[Tensor | None, ...]
"""The gradient of every leaf in one context."""


FAULT: Final = "a site is switched on"
"""What an injected fault says."""

FREED: Final = "Trying to backward through the graph a second time"
"""What torch says of graph that was freed."""


class InjectedFault(RuntimeError):
    """Raised in backward, where a program says so."""


class Node:
    """Lives as long as the autograd node of a custom Function that holds it."""


@dataclass
class Record:
    """One run.

    Attributes:
        seen: by key, the gradients that hooks and Functions were called with.
        collected: by the tag of the body, the gradients that it asked for, in order.
        nodes: custom Functions whose graph is still there.
    """

    seen: defaultdict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    collected: defaultdict[str, list[Gradients]] = field(default_factory=lambda: defaultdict(list))
    _faults: set[int] = field(default_factory=set)
    nodes: weakref.WeakSet[Node] = field(default_factory=weakref.WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def see(self, key: Key, grad: Tensor) -> None:
        """Record that what has `key` was called with `grad`, and raise if it is switched on.

        Raises:
            InjectedFault: it is switched on.
        """
        with self._lock:
            self.seen[key].append(grad.detach().clone())
        if key[1] in self._faults:
            raise InjectedFault(FAULT)

    @contextmanager
    def switched_on(self, site: int | None) -> Iterator[None]:
        """Have a site raise in this block, if there is one."""
        faults = set() if site is None else {site}
        self._faults |= faults
        try:
            yield
        finally:
            self._faults -= faults

    def new_node(self) -> Node:
        """Return what a custom Function is to hold."""
        node = Node()
        with self._lock:
            self.nodes.add(node)
        return node

    def counts(self) -> dict[Key, int]:
        """Return how often each key was seen."""
        with self._lock:
            return {key: len(grads) for key, grads in self.seen.items()}

    def cut(self, counts: dict[Key, int]) -> None:
        """Forget all but the first of what was seen, so many for each of these keys."""
        with self._lock:
            for key, count in counts.items():
                del self.seen[key][count:]
