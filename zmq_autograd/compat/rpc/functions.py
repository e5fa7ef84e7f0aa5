"""Functions that answer later, by a `torch.futures.Future`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch.futures import Future

P = ParamSpec("P")
T = TypeVar("T")


def async_execution(fn: Callable[P, Future[Any]]) -> Callable[P, Future[Any]]:
    """Mark a function that returns a `torch.futures.Future`, whose value is the call's result.

    The thread that ran the function is free meanwhile.  With ``@staticmethod`` or ``@classmethod``
    this is the inner decorator.
    """

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Future[Any]:
        return fn(*args, **kwargs)

    wrapper._wrapped_async_rpc_function = fn  # type: ignore[attr-defined]  # the name that torch gives it
    return wrapper


def is_async_execution(fn: Any) -> bool:
    """Say whether `fn` is marked by `async_execution`."""
    return hasattr(fn, "_wrapped_async_rpc_function")


async def value_of(future: Future[T]) -> T:
    """Wait for a future of torch's without blocking the event loop; return its value.

    Raises:
        Exception: what it was given instead.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def tell(_: object) -> None:
        loop.call_soon_threadsafe(done.set)

    future.add_done_callback(tell)
    await done.wait()
    return future.wait()
