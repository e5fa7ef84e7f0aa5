"""The gate of one worker: optimizers step between contexts that read parameters, not under them.

A parameter that changes while a context's graph leads to it spoils that context's backward.  So a
step waits for its turn; docs/objects.md, "Between contexts", says for what, and why trainers cannot
wait for each other in a ring.  Owns which calls run in which context, and which steps wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor

from zmq_autograd.autograd.walk import leaves_of
from zmq_autograd.errors import DeadlineExceeded

if TYPE_CHECKING:
    from zmq_autograd.engine.local_context import LocalContext

HELD_SECONDS: Final = 1.0
"""Seconds for which a call of a context that reads nothing yet is held back while a step waits."""


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A call that runs: it may read any parameter."""

    context: LocalContext


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step that waits for its turn.

    Attributes:
        context: whose gradients it applies.
        leaves: what it changes.
        turn: done when it may.
    """

    context: LocalContext
    leaves: frozenset[Tensor]
    turn: asyncio.Future[None]


class Gate:
    """See the module."""

    def __init__(self, worker: str, contexts: Iterable[LocalContext]) -> None:
        """Make the gate of the worker of that name, which has `contexts`, at any time."""
        self._worker = worker
        self._contexts = contexts
        self._running: set[Running] = set()
        self._waiting: list[Step] = []
        self._stepping: Step | None = None
        self._pauses = 0  # blocks of `without_steps` that run
        self._is_due = False
        # Set, and replaced, whenever a step has ended.
        self._opened = asyncio.Event()

    # --- calls -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def call(self, context: LocalContext) -> AsyncIterator[None]:
        """Let a call in `context` run, once no step does.

        While a step waits, a call of a context that reads nothing here yet is held back, too: for
        at most a second, since what the step waits for may wait for just that call.
        """
        if self._stepping is not None or self._waiting:
            await self._held_back(lambda: bool(self._waiting) and not self._reads(context))
        running = Running(context)
        self._running.add(running)
        try:
            yield
        finally:
            self._running.discard(running)
            self.changed()

    @asynccontextmanager
    async def without_steps(self) -> AsyncIterator[None]:
        """Have no step run during the block, which takes or sets the state of parameters at once.

        It does not wait for contexts, and nothing in it may wait for a step.  Steps that wait for
        other such blocks alone come first, for at most a second.
        """
        await self._held_back(self._is_one_due)
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self.changed()

    @asynccontextmanager
    async def call_outside(self) -> AsyncIterator[None]:
        """Let a call run that is in no context, once no step does.

        A step does not wait for it: it may be what asked for the step.
        """
        while self._stepping is not None:
            await self._opened.wait()
        yield

    def _is_one_due(self) -> bool:
        """Tell whether a step waits that no context holds up."""
        return any(next(self._readers(step), None) is None for step in self._waiting)

    async def _held_back(self, is_held: Callable[[], bool]) -> None:
        """Wait while `is_held`, but not for long; then for the step that runs."""
        loop = asyncio.get_running_loop()
        until = loop.time() + HELD_SECONDS
        while is_held() and loop.time() < until:
            try:
                async with asyncio.timeout_at(until):
                    await self._opened.wait()
            except TimeoutError:
                break
        while self._stepping is not None:
            await self._opened.wait()

    def _reads(self, context: LocalContext) -> bool:
        """Tell whether `context` has a call that runs, or may have a graph, since its last step."""
        if any(running.context is context for running in self._running):
            return True
        record = context.record
        return bool(record.kept_results()) or any(
            send.leaves != frozenset() for send in record.roots()
        )

    # --- steps -----------------------------------------------------------------------------------

    def finished_reading(self, context: LocalContext) -> None:
        """Take in that `context` asks for a step: whatever it has read by now, it is done with."""
        self._running = {running for running in self._running if running.context is not context}
        for send in context.record.sends.values():
            send.leaves = frozenset()
        context.record.kept.clear()
        self.changed()

    @asynccontextmanager
    async def step(
        self, context: LocalContext, leaves: frozenset[Tensor], seconds: float | None
    ) -> AsyncIterator[None]:
        """Wait for the turn of a step; while the block runs, calls in contexts wait.

        Args:
            context: whose gradients it applies.
            leaves: what it changes.
            seconds: to wait for its turn, None for ever.

        Raises:
            DeadlineExceeded: its turn did not come; names the workers whose contexts it waited for.
        """
        step = Step(context, leaves, asyncio.get_running_loop().create_future())
        self._waiting.append(step)
        self.changed()
        try:
            try:
                async with asyncio.timeout(seconds):
                    await step.turn
            except TimeoutError:
                if self._stepping is not step:  # its turn came in that very moment
                    raise self._late(step, seconds) from None
            yield
        finally:
            if self._stepping is step:
                self._stepping = None
            else:
                self._waiting.remove(step)
            # Calls that have been held back for long enough come before the next step.
            self._opened.set()
            self._opened = asyncio.Event()
            self.changed()

    def changed(self) -> None:
        """Take in that something has ended that a step may wait for."""
        if self._waiting and not self._is_due:
            self._is_due = True
            # Not at once: who ends may send in the same breath what it has computed.
            asyncio.get_running_loop().call_soon(self._advance)

    def _advance(self) -> None:
        """Give the first step that waits for nobody its turn."""
        self._is_due = False
        if self._stepping is not None or self._pauses:
            return
        for step in self._waiting:
            if not step.turn.done() and next(self._readers(step), None) is None:
                self._waiting.remove(step)
                self._stepping = step
                step.turn.set_result(None)
                return

    def _readers(self, step: Step) -> Iterator[tuple[LocalContext, str]]:
        """Yield the contexts that `step` waits for, and what each of them does here."""
        running = {running.context for running in self._running}
        for context in self._contexts:
            if context is step.context:
                continue
            if context in running:
                yield context, "runs a call"
            elif any(not step.leaves.isdisjoint(leaves) for leaves in _read_by(context)):
                yield context, "may need a parameter in a backward pass"

    def _late(self, step: Step, seconds: float | None) -> DeadlineExceeded:
        readers = [
            (
                context.parent.name if context.parent else self._worker,
                f"{context.context_id} {does}",
            )
            for context, does in self._readers(step)
        ]
        named = ", ".join(f"context {does} (worker {name!r})" for name, does in readers)
        return DeadlineExceeded(
            f"the step on worker {self._worker!r} was not applied: its turn did not come within "
            f"{seconds:g} s: {named or 'a step or what takes a state was running'}",
            workers=[self._worker, *dict(readers)],
        )


def _read_by(context: LocalContext) -> Iterator[frozenset[Tensor]]:
    """Yield the leaves that the parts of its graph lead to."""
    for kept in context.record.kept_results():
        yield kept.leaves()
    for send in context.record.roots():
        if send.leaves is None:
            send.leaves = leaves_of(edge.node for edge in send.edges if edge is not None)
        yield send.leaves
    for losses in context.passes.losses:
        yield leaves_of(edge.node for edge in losses.edges)
