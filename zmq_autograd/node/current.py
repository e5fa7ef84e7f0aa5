"""What the running code serves: the call it belongs to, and that call's torch modes and deadline.

Kept in one context variable, so that it follows `await`, tasks and, through `compute`, threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import torch

from zmq_autograd.wire.messages import Modes
from zmq_autograd.wire.tensors import DTYPES

_AUTOCAST_DEVICES: Final = ("cpu", "cuda")


@dataclass(slots=True)
class Call:
    """A request that is being handled.

    Attributes:
        worker: the worker that handles it, as its user holds it.
        peer: the worker that sent it, likewise.
        node: the inside of that worker.
        deadline: on the event loop's clock, when nobody waits for it any more; None for never.
        modes: torch's modes at the caller.
        is_over: its handler has returned; what runs on, in tasks of its own, has no deadline.
    """

    worker: Any
    peer: Any
    node: Any
    deadline: float | None
    modes: Modes
    is_over: bool = False


current_call: Final[ContextVar[Call | None]] = ContextVar("zmq_autograd_call", default=None)


def shortened(timeout: float | None) -> float | None:
    """Return `timeout` in seconds, or what the current call has left if that is less."""
    call = current_call.get()
    if call is None or call.is_over or call.deadline is None:
        return timeout
    left = call.deadline - asyncio.get_running_loop().time()
    return left if timeout is None else min(timeout, left)


def current_modes() -> Modes:
    """Return the modes that hold here: this thread's, within those of the call it serves."""
    autocast = {
        device: str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        for device in _AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    }
    here = Modes(
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tuple(autocast.items())
    )
    call = current_call.get()
    if call is None:
        return here
    return Modes(
        here.grad_enabled and call.modes.grad_enabled,
        here.inference_mode or call.modes.inference_mode,
        tuple({**dict(call.modes.autocast), **autocast}.items()),
    )


@contextmanager
def applied(modes: Modes) -> Iterator[None]:
    """Run a block of one thread, without awaiting anything in it, under `modes`.

    Raises:
        ValueError: `modes` name a dtype that there is not.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(modes.inference_mode))
        stack.enter_context(torch.set_grad_enabled(modes.grad_enabled))
        for device, dtype in modes.autocast:
            if dtype not in DTYPES:
                raise ValueError(f"autocast: unknown dtype {dtype!r}")
            stack.enter_context(torch.autocast(device, dtype=DTYPES[dtype]))
        yield
