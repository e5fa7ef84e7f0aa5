"""One step of an optimizer on the worker that has the parameters, with a context's gradients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor

from zmq_autograd import ids
from zmq_autograd.autograd.owned_optimizer import Gradients, Group, Outcome, OwnedOptimizer
from zmq_autograd.engine.contexts import Contexts
from zmq_autograd.engine.host import Peer, tell
from zmq_autograd.engine.local_context import LocalContext
from zmq_autograd.errors import ProtocolError
from zmq_autograd.wire.limits import short
from zmq_autograd.wire.messages import ForwardRequest

Norm = tuple[torch.dtype, float] | None
"""The dtype of a gradient, and its norm; None where there is none."""

DONE_FUNCTION: Final = "za.done_reading"
"""The name by which a worker tells another one that a context asks for a step."""

TELL_SECONDS: Final = 1.0
"""Seconds that a step waits for the others to have heard of it, once it is applied."""


@asynccontextmanager
async def done_reading(
    context: LocalContext, step_id: int, told: Collection[Peer] = ()
) -> AsyncIterator[None]:
    """Have no step wait any more for what `context` has read so far, on any of its workers.

    Or trainers that step different parts of a model could wait for each other in a ring.  The
    others hear of it while the block runs; it ends after that, so that what is computed from then
    on counts anew.  (One that has not heard of it a second later may forget what is computed there
    in between.  Nothing is silently wrong then: backward fails by torch's version check.)

    Args:
        context: this worker's view of it.
        step_id: the step that it asks for: it is told from worker to worker, and to each once.
        told: who knows it already.

    Raises:
        ProtocolError: `step_id` cannot be one.
    """
    if type(step_id) is not int or not 0 <= step_id <= ids.MAX_ID:
        raise ProtocolError(f"step_id: expected an id, got {short(step_id)}")
    peers: list[Peer] = []
    if step_id not in context.steps:
        context.steps.add(step_id)
        context.table.gate.finished_reading(context)
        peers = [peer for peer in context.peers if peer not in told and peer.is_connected]
    host = context.table.host
    message = ForwardRequest(DONE_FUNCTION, (context.context_id, step_id), {})
    telling = host.spawn(tell(host, peers, message, TELL_SECONDS)) if peers else None
    try:
        yield
    finally:
        if telling is not None:
            await asyncio.wait({telling})


async def step(
    optimizer: OwnedOptimizer,
    contexts: Contexts,
    context: LocalContext | None,
    step_id: int,
    groups: Sequence[Group],
    seconds: float | None,
    told: Collection[Peer] = (),
) -> Outcome:
    """Step when other contexts are done with the parameters that this changes.

    Args:
        optimizer: of this worker.
        contexts: of this worker.
        context: one of them; None if it has not reached this worker, so that there are no
            gradients.
        step_id: see `done_reading`.
        groups: the hyperparameters of each group.
        seconds: to wait for its turn, None for ever.
        told: see `done_reading`.

    Returns:
        What became of it, an error before it began included.

    Cancelled before its turn, it is not applied; then it waits until it is.
    """
    try:
        gradients: Gradients = {}
        async with AsyncExitStack() as stack:
            if context is not None:
                await stack.enter_async_context(done_reading(context, step_id, told))
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


async def norms(
    optimizer: OwnedOptimizer, contexts: Contexts, context: LocalContext | None, norm_type: float
) -> list[Norm]:
    """Return for each parameter the dtype and the norm of its gradient, None where it has none.

    Raises:
        ContextError: as for `gradients_of`.
    """
    gradients = gradients_of(context)
    found = await contexts.host.compute(partial(optimizer.norms, gradients, norm_type))
    return [
        None if norm is None else (gradients[parameter].dtype, norm.item())
        for parameter, norm in zip(optimizer.parameters, found, strict=True)
    ]


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


async def _finished(contexts: Contexts, compute: Callable[[], Outcome]) -> Outcome:
    """Return what `compute` returns in a thread, and not before that has ended, come what may."""
    running = contexts.host.spawn(contexts.host.compute(compute))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
