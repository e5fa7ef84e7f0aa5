"""Futures of torch's, completed off the event loop: the callbacks of a program may block."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from torch.futures import Future

from zmq_autograd.node.compute import ComputePool

if TYPE_CHECKING:
    from zmq_autograd.blocking.portal import Portal

CALLBACK_SECONDS: Final = 5.0
"""Seconds that callbacks of futures have to end when a worker leaves."""

collecting: Final = threading.local()
"""Has a ``future_list`` in a thread that waits for all futures which are made in a block."""


class Futures:
    """The futures of one worker."""

    def __init__(self, portal: Portal, name: str) -> None:
        """Run coroutines on the event loop that `portal` leads to, for the worker `name`."""
        self._portal = portal
        self._callbacks = ComputePool(f"{name}-callbacks")
        self._settling: set[asyncio.Task[Any]] = set()

    def of(self, function: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a coroutine function on the event loop and return the future of its result."""
        future: Future[Any] = Future()
        self._portal.start(self._settle, future, functools.partial(function, *args, **kwargs))
        if hasattr(collecting, "future_list"):
            collecting.future_list.append(future)
        return future

    async def close(self) -> None:
        """Wait, for `CALLBACK_SECONDS` at most, until all futures are done."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=CALLBACK_SECONDS)
        self._callbacks.close()

    async def _settle(self, future: Future[Any], function: Callable[[], Awaitable[Any]]) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
        finish: Callable[[], None]
        try:
            finish = functools.partial(future.set_result, await function())
        except asyncio.CancelledError:  # the event loop ends: nobody would hear of it otherwise
            ended = RuntimeError("the call was given up: this process takes part no longer")
            self._callbacks.start(functools.partial(future.set_exception, ended))
            raise
        except Exception as error:  # noqa: BLE001  # who waits for the future gets it
            finish = functools.partial(future.set_exception, error)
        await self._callbacks.run(finish)
