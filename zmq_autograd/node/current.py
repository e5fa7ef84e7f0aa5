"""What the running code serves: the call it belongs to, and that call's torch modes and deadline.

Kept in one context variable, so that it follows `await`, tasks and, through `compute`, threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from zmq_autograd.autograd.anomaly import check_nan, recording
from zmq_autograd.engine import current_scope
from zmq_autograd.errors import ProtocolError
from zmq_autograd.wire.messages import Modes
from zmq_autograd.wire.tensors import DTYPES

T = TypeVar("T")

_AUTOCAST_DEVICES: Final = ("cpu", "cuda")

Autocast = tuple[tuple[str, bool, torch.dtype], ...]
"""State of autocast in a thread: device type, whether it is on, and its dtype, each time."""


@dataclass(slots=True)
class Call:
    """A request that is being handled, or a call by this worker of what RRefs refer to here.

    Attributes:
        worker: the worker that handles it, as its user holds it.
        peer: the worker that sent it, likewise; None where it is this worker's own.
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


def served_call() -> Call:
    """Return the call that the running code serves.

    Raises:
        RuntimeError: there is none: it was called on this worker itself.
    """
    call = current_call.get()
    if call is None or call.peer is None:
        raise RuntimeError("expected to be called by another worker")
    return call


def served_value(rref: Any, kind: type[T], what: str) -> T:
    """Return the value, of `kind` and this worker's, of an RRef that the served call came with.

    Raises:
        ProtocolError: it is something else than `what`, as its text says.
    """
    value = getattr(rref, "local_value", lambda: None)()
    if not isinstance(value, kind):
        raise ProtocolError(f"expected an RRef to {what}")
    return value


def reading() -> AbstractAsyncContextManager[None]:
    """Return what is entered around what may read parameters: see `engine.gate`."""
    scope, call = current_scope.get(), current_call.get()
    if scope is not None:
        return scope.context.table.gate.call(scope.context)
    return nullcontext() if call is None else call.node.contexts.gate.call_outside()


class _Thread(threading.local):
    """What a thread knows of itself.

    Attributes:
        has_own_modes: what it runs was put under modes of its own, those of its call among them.
    """

    has_own_modes = False


this_thread: Final = _Thread()


def shortened(timeout: float | None) -> float | None:
    """Return `timeout` in seconds, or what the current call has left if that is less."""
    call = current_call.get()
    if call is None or call.is_over or call.deadline is None:
        return timeout
    left = call.deadline - asyncio.get_running_loop().time()
    return left if timeout is None else min(timeout, left)


def current_modes() -> Modes:
    """Return the modes that hold here: this thread's, within those of the call it serves."""
    autocast = tuple(
        (device, str(dtype).removeprefix("torch."))
        for device, is_on, dtype in autocast_here()
        if is_on
    )
    nan = check_nan()
    here = Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, nan)
    call = current_call.get()
    if call is None or this_thread.has_own_modes:
        return here
    # A task of the handler's own: what its call came with is not the thread's.
    return Modes(
        here.grad_enabled and call.modes.grad_enabled,
        here.inference_mode or call.modes.inference_mode,
        tuple({**dict(call.modes.autocast), **dict(autocast)}.items()),
        nan,
    )


def autocast_here() -> Autocast:
    """Return the state of autocast in this thread."""
    some = torch._C._is_any_autocast_enabled()
    return tuple(
        (device, some and torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
    )


def autocast_of(modes: Modes) -> Autocast:
    """Return the state of autocast that `modes` ask for.

    Raises:
        ValueError: they name a dtype that there is not.
    """
    dtypes = dict(modes.autocast)
    return tuple(
        (device, device in dtypes, _dtype(dtypes[device]) if device in dtypes else default)
        for device, _, default in autocast_here()
    )


def set_autocast(state: Autocast) -> None:
    """Put autocast in this thread into `state`."""
    for device, is_on, dtype in state:
        torch.set_autocast_enabled(device, is_on)
        torch.set_autocast_dtype(device, dtype)
    # What one coroutine's region has cast is not for another, which may have changed it since.
    torch.clear_autocast_cache()


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"autocast: unknown dtype {name!r}")
    return DTYPES[name]


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
            stack.enter_context(torch.autocast(device, dtype=_dtype(dtype)))
        if modes.check_nan is not None:
            stack.enter_context(recording())
        before, this_thread.has_own_modes = this_thread.has_own_modes, True
        try:
            yield
        finally:
            this_thread.has_own_modes = before
