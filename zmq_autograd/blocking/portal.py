"""Runs coroutines on an event loop from other threads, as `await` would run them there.

What the calling thread is in goes along: its context variables (the autograd context, and the call
that it serves, with its deadline) and torch's modes; and what a coroutine sets of its context
variables is set in the calling thread afterwards.  Knows nothing of workers but the loop that the
call of a compute thread is served in.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextvars
import functools
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, ParamSpec, TypeVar

from zmq_autograd.errors import ConfigurationError
from zmq_autograd.node import current_call, current_modes
from zmq_autograd.node.stepping import Stepped
from zmq_autograd.node.torch_profiles import carry

logger = logging.getLogger("zmq_autograd")

P = ParamSpec("P")
T = TypeVar("T")

CANCEL_SECONDS: Final = 5.0
"""Seconds that a thread whose waiting was interrupted waits for the coroutine to be cancelled."""

CLOSE_SECONDS: Final = 15.0
"""Seconds that closing waits for what is open: as long as a worker takes to leave."""


class Portal:
    """The way to one event loop from other threads.

    The portal of a loop of its own starts that in a background thread when it is first used; after
    `close`, or in a forked child, the next use starts another.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Lead to `loop`, which somebody else runs; None for one of its own."""
        self._borrowed = loop
        self._background: _Background | None = None
        self._lock = threading.Lock()
        if loop is None:
            _portals.add(self)

    def run(self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a coroutine function on the loop, wait for its end and return its result.

        Raises:
            ConfigurationError: this is the loop's own thread, or the loop has ended.
            concurrent.futures.CancelledError: the coroutine was cancelled.
            BaseException: whatever it raises.

        An exception in the waiting thread, KeyboardInterrupt say, cancels the coroutine and waits
        for its end, for `CANCEL_SECONDS` at most.
        """
        running = _Running(function, args, kwargs)
        try:
            self._begin(running)
            return running.result()
        except BaseException:
            running.stop()
            raise
        finally:
            if running.ended.is_set():
                _adopt(running.context)
            del running  # or an error of its would hold what holds it

    def start(
        self, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """Call a coroutine function on the loop; return once it has suspended or ended.

        So what an async function reads before it first suspends (the tensors that it sends) has
        been read.

        Returns:
            The future of its result.  Cancelling that cancels the coroutine.

        Raises:
            ConfigurationError: this is the loop's own thread, or the loop has ended.

        An exception in this thread cancels the coroutine, as for `run`.
        """
        running = _Running(function, args, kwargs)
        try:
            self._begin(running)
            running.begun.wait()
        except BaseException:
            running.stop()
            raise
        return running

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a plain function while nothing else runs on the loop; return its result.

        In the loop's thread, or in this one if there is none yet.

        Raises:
            ConfigurationError: the loop has ended.
            BaseException: whatever it raises.
        """
        has_begun = self._borrowed is not None or self._background is not None
        if self._is_here() or not has_begun:
            return function(*args, **kwargs)

        async def call() -> T:
            return function(*args, **kwargs)

        return self.run(call)

    def keep(self, key: object, close: Callable[[], Awaitable[Any]]) -> None:
        """Have `close` awaited when this portal closes, unless `let_go` comes first.

        Where the loop is somebody else's, closing is, too.
        """
        if self._background is not None:
            self._background.open[id(key)] = close

    def let_go(self, key: object) -> None:
        """Take back what `keep` was told with this key."""
        if self._background is not None:
            self._background.open.pop(id(key), None)

    def close(self) -> None:
        """Close what is open, cancel what runs, and end the background thread; idempotent.

        Takes `CLOSE_SECONDS` at most.  A loop that somebody else runs is left alone.

        Raises:
            ConfigurationError: this is the loop's own thread.
        """
        if self._is_here():
            raise ConfigurationError("a portal cannot be closed from its own event loop")
        with self._lock:
            background, self._background = self._background, None
        if background is not None:
            background.close()

    def leads_to(self, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Say whether it leads to `loop` at the moment."""
        background = self._background
        here = self._borrowed if background is None else background.loop
        return here is not None and here is loop

    def forked(self) -> None:
        """Forget the thread, which a forked child does not have, and who held the lock."""
        self._background = None
        self._lock = threading.Lock()

    def _begin(self, running: _Running[Any]) -> None:
        if self._is_here():
            raise ConfigurationError(
                "this is the event loop's own thread, which must not wait: use the async API here"
            )
        if self._borrowed is not None:
            running.begin_on(self._borrowed)
            return
        with self._lock:
            if self._background is None:
                self._background = _Background()
            background = self._background
        background.begin(running)

    def _is_here(self) -> bool:
        return self.leads_to(asyncio._get_running_loop())


class _Running(concurrent.futures.Future[T]):
    """One coroutine on the loop, and the future of its result.

    Attributes:
        begun: it has suspended or ended.
        ended: it has ended; of a cancelled one the future is done before.
        context: the context variables that it runs in.
    """

    def __init__(
        self, function: Callable[..., Awaitable[T]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.context = contextvars.copy_context()
        carry(self.context)
        self._call: Callable[[], Awaitable[T]] = functools.partial(function, *args, **kwargs)
        self._modes = current_modes()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def begin_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on `loop`, soon.

        Raises:
            ConfigurationError: the loop has ended.
        """
        self._loop = loop
        try:
            loop.call_soon_threadsafe(self._begin)
        except RuntimeError as error:
            self._loop = None
            raise ConfigurationError(f"the event loop has ended: {error}") from error

    def cancel(self) -> bool:
        """Cancel the coroutine, unless it has ended; say whether that was done."""
        if not super().cancel():
            return False
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and everything on it
                self._loop.call_soon_threadsafe(self._cancel_task)
        return True

    def stop(self) -> None:
        """Cancel it and wait for its end, for a while; it may have ended, or never begun."""
        if self._loop is not None and self.cancel():
            self.ended.wait(CANCEL_SECONDS)

    def abandon(self) -> None:
        """Take in that the loop has ended before it began."""
        self._end(None, asyncio.CancelledError())

    def _begin(self) -> None:
        if self.cancelled():
            self.abandon()
            return
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._main(), name="za-blocking", context=self.context)
        # The loop calls in order: this comes right after the task's first step.
        loop.call_soon(self.begun.set)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _main(self) -> None:
        try:
            result = await Stepped(_awaited(self._call), self._modes)
        except BaseException as error:  # noqa: BLE001  # whatever it is, whoever waits gets it
            self._end(None, error)
            del self  # or the error would hold what holds it
        else:
            self._end(result, None)

    def _end(self, result: Any, error: BaseException | None) -> None:
        self._task = None
        self.begun.set()
        self.ended.set()
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            super().cancel()
        if self.set_running_or_notify_cancel():
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)


class _Background:
    """An event loop in a thread of its own.

    Attributes:
        loop: the loop.
        open: what to await at its end, by whose it is, in order.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self.loop = asyncio.new_event_loop()
        self.open: dict[int, Callable[[], Awaitable[Any]]] = {}
        self._running: set[_Running[Any]] = set()
        self._closing = asyncio.Event()
        # A daemon: a script that ends with something open must get as far as `atexit`.
        self._thread = threading.Thread(target=self._serve, name="za-blocking", daemon=True)
        self._thread.start()

    def begin(self, running: _Running[Any]) -> None:
        """Begin `running` on the loop.

        Raises:
            ConfigurationError: the loop has ended.
        """
        self._running.add(running)  # before, so that it is abandoned if it comes too late
        running.add_done_callback(self._running.discard)
        running.begin_on(self.loop)

    def close(self) -> None:
        """Close what is open, cancel what runs, and end the thread."""
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(CLOSE_SECONDS + CANCEL_SECONDS)

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.run(self._live())
        finally:
            for running in list(self._running):
                running.abandon()

    async def _live(self) -> None:
        await self._closing.wait()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                for close in reversed(list(self.open.values())):
                    await _closed(close)
        except TimeoutError:
            logger.warning("what was open did not close within %g s", CLOSE_SECONDS)


async def _awaited(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


async def _closed(close: Callable[[], Awaitable[Any]]) -> None:
    try:
        await close()
    except Exception:
        logger.warning("closing failed", exc_info=True)


def _adopt(context: contextvars.Context) -> None:
    """Set the context variables here as they are in `context`, as after an `await`."""
    for variable, value in context.items():
        if variable.get(None) is not value:
            variable.set(value)


def current_portal() -> Portal:
    """Return the portal for this thread.

    In a compute thread it leads to the event loop of the worker that it computes for, elsewhere to
    the one that all threads share, in the background.
    """
    call = current_call.get()
    if call is None or _default.leads_to(call.node.loop):
        return _default
    return Portal(call.node.loop)


@atexit.register
def _at_exit() -> None:
    for portal in list(_portals):
        portal.close()


def _in_forked_child() -> None:
    for portal in list(_portals):
        portal.forked()


_portals: Final[weakref.WeakSet[Portal]] = weakref.WeakSet()  # with loops of their own
_default: Final = Portal()

os.register_at_fork(after_in_child=_in_forked_child)
