"""What becomes of a call: running the function, and its error on the way back.

A reply is a list: ``["value", skeleton, tensors, rrefs]``, ``["rref", rref]``, or ``["error", name
of the type, text]``.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from zmq_autograd.compat.rpc import state, tensor_ops
from zmq_autograd.compat.rpc.functions import is_async_execution
from zmq_autograd.compat.rpc.names import program_module
from zmq_autograd.compat.rpc.worker_info import WorkerInfo

logger = logging.getLogger("zmq_autograd")


class Later:
    """The future that a function marked by `async_execution` returned, not its result itself."""

    def __init__(self, future: Any) -> None:
        self.future = future


class Waits:
    """How long requests wait until a thread runs them: for the interpreter, mostly."""

    def __init__(self) -> None:
        """Measure nothing yet."""
        self.is_measuring = False
        self._seconds = 0.0
        self._count = 0

    def measured(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return `run`, so that how soon it begins is measured."""
        if not self.is_measuring:
            return run
        asked = time.perf_counter()

        def begun(*args: Any) -> Any:
            self._seconds += time.perf_counter() - asked
            self._count += 1
            return run(*args)

        return begun

    def info(self) -> dict[str, str]:
        """Return the mean, in microseconds, while it is measured."""
        if not self.is_measuring:
            return {}
        mean = self._seconds / max(1, self._count)
        return {"agent.gil_average_wait_time_us": f"{1e6 * mean:.1f}"}


def called(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a function and return its result, or the `Later` of it.

    Raises:
        RuntimeError: a tensor operator does not take these arguments, or a function that is marked
            by `async_execution` returned no future.
        Exception: whatever the function raises.
    """
    try:
        result = function(*args, **kwargs)
    except TypeError as error:
        if name not in tensor_ops.operators():
            raise
        raise RuntimeError(
            f"Overloaded torch operator invoked from Python failed to match any schema:\n{error}"
        ) from error
    if not is_async_execution(function):
        return result
    if not isinstance(result, torch._C.Future):
        raise RuntimeError(
            "Functions decorated with @rpc.async_function must return a torch.futures.Future "
            f"object, but got {type(result)}"
        )
    return Later(result)


def failure(me: WorkerInfo, error: Exception) -> list[Any]:
    """Return the reply for what a function raised on the worker `me`."""
    kind = type(error)
    trace = "".join(traceback.format_exception(error))
    text = f"On {me}:\n{kind.__name__}: {error}\n{trace}"
    logger.warning("a function that another worker called raised\n%s", text)
    return ["error", f"{program_module(kind.__module__)}:{kind.__qualname__}", text]


def remade(kind_name: str, text: str) -> Exception:
    """Return the exception that a function on another worker raised.

    Args:
        kind_name: its type, which is looked up as everything is that arrives; a RuntimeError stands
            for one that is not known here.
        text: its text, with where it was raised.
    """
    kind = state.names.find_exception(kind_name) or RuntimeError
    try:
        return kind(text)
    except Exception as error:  # noqa: BLE001  # a constructor of the program's own
        return RuntimeError(
            f"Failed to create original exception type. Error msg was {error} Original exception "
            f"on remote side was {text}"
        )
