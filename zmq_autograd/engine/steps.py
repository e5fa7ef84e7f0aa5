"""One step of an optimizer on the worker that has the parameters, with a context's gradients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeVar

from torch import Tensor

from zmq_autograd.autograd.owned_optimizer import Gradients, Group, Outcome, OwnedOptimizer
from zmq_autograd.engine.contexts import Contexts
from zmq_autograd.engine.local_context import LocalContext

T = TypeVar("T")


async def step(
    optimizer: OwnedOptimizer,
    contexts: Contexts,
    context: LocalContext | None,
    groups: Sequence[Group],
    seconds: float | None,
) -> Outcome:
    """Step when other contexts are done with the parameters that this changes.

    Args:
        optimizer: of this worker.
        contexts: of this worker.
        context: one of them; None if it has not reached this worker, so that there are no
            gradients.
        groups: the hyperparameters of each group.
        seconds: to wait for its turn, None for ever.

    Returns:
        What became of it, an error before it began included.

    Cancelled before its turn, it is not applied; then it waits until it is.
    """
    try:
        gradients: Gradients = {}
        async with AsyncExitStack() as stack:
            if context is not None:
                contexts.gate.finished_reading(context)
                gradients = gradients_of(context)
                changing = frozenset(p for p in optimizer.parameters if p in gradients)
                if changing:
                    await stack.enter_async_context(contexts.gate.step(context, changing, seconds))
                if context.is_ended:
                    raise context.ended_error()
            return await _finished(contexts, partial(optimizer.step, gradients, groups))
    except Exception as error:  # noqa: BLE001  # whatever it is, nothing has begun
        return Outcome("not applied", error)


def gradients_of(context: LocalContext | None) -> dict[Tensor, Tensor]:
    """Return the gradients that a step takes; none where the context has not been.

    Raises:
        ContextError: the context has ended, or a hook failed to take a pass's gradients over.
    """
    return {} if context is None else context.gradients()


async def clip(
    optimizer: OwnedOptimizer, contexts: Contexts, context: LocalContext | None, coefficient: Tensor
) -> None:
    """Multiply the context's gradients of the optimizer's parameters, out of place.

    Raises:
        ContextError: the context has ended, or a pass has added to these gradients meanwhile.
    """
    if context is None:
        return
    before = context.gradients()
    scaled = await contexts.host.compute(partial(optimizer.scaled, before, coefficient))
    now = context.gradients()
    if any(now[parameter] is not before[parameter] for parameter in scaled):
        raise context.error("a backward pass was completed while its gradients were clipped")
    context.record.gradients = now | scaled


async def _finished(contexts: Contexts, compute: Callable[[], T]) -> T:
    """Return what `compute` returns in a thread, and not before that has ended, come what may."""
    running = contexts.host.spawn(contexts.host.compute(compute))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
