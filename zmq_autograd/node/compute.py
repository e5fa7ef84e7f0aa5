"""Threads for what would block the event loop: as many as there is work at once, never fewer.

A pool of fixed size starves when calls nest and come back to it.  This one starts a thread whenever
none is idle; idle ones end after a while.  What passes `MAX_THREADS` is refused, not queued: a call
that is cancelled leaves its thread running, so the limit on requests under way bounds nothing here.
Threads are daemons: a computation that never ends cannot keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

from zmq_autograd.errors import ConfigurationError, ResourceExhausted
from zmq_autograd.node.current import applied, current_call, current_modes, reading
from zmq_autograd.node.torch_profiles import recorder_here
from zmq_autograd.wire.messages import Modes

logger = logging.getLogger("zmq_autograd")

T = TypeVar("T")

IDLE_SECONDS: Final = 10.0
"""Seconds after which an idle thread ends."""

MAX_THREADS: Final = 1024
"""Threads of one pool: as many as one peer's calls may take at default limits; some 100 MiB."""

Work = Callable[[], None]


class ComputePool:
    """Threads that run blocking functions for one worker."""

    def __init__(self, name: str) -> None:
        """Make a pool without threads; `name` begins their names."""
        self._name = name
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0  # threads that wait and are not yet promised work
        self._wanted = 0  # threads that are promised work and not yet started
        self._starting = False  # threads are being started, until none is wanted
        self._threads: set[threading.Thread] = set()
        self._numbers = itertools.count()
        self._closed = False

    async def run(self, function: Callable[[], T], modes: Modes | None = None) -> T:
        """Run `function` in a thread and return its result; see `start`.

        Cancelling it stops the waiting, not the thread.
        """
        return await self.start(function, modes)

    def start(self, function: Callable[[], T], modes: Modes | None = None) -> asyncio.Future[T]:
        """Start `function` in a thread and return the future of its result.

        It runs in a copy of the caller's context variables.

        Args:
            function: takes no arguments.
            modes: torch's modes for it; None for those that hold at the caller.

        Raises:
            ResourceExhausted: `MAX_THREADS` are busy.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()
        under = current_modes() if modes is None else modes
        recorder = recorder_here()
        if recorder is not None:
            function = recorder.recorded(function)

        work = partial(context.run, _run_under, under, function)
        self._submit(partial(_work, work, future, loop), loop)
        return future

    def close(self) -> list[threading.Thread]:
        """End the threads as they become idle, and return them all."""
        with self._lock:
            self._closed = True
            self._wanted = 0  # what is queued is left to the threads that there are
            threads = list(self._threads)
        for _ in threads:
            self._queue.put(None)
        return threads

    def _submit(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._closed:
                raise ConfigurationError(f"worker {self._name!r} is not running")
            if self._idle:
                self._idle -= 1
            elif len(self._threads) + self._wanted >= MAX_THREADS:
                raise ResourceExhausted(
                    f"worker {self._name!r}: {MAX_THREADS} compute threads are busy: "
                    "that is the limit",
                    worker=self._name,
                )
            else:
                self._wanted += 1
            is_first = not self._threads
            starts = self._wanted > 0 and (is_first or not self._starting)
            self._starting = self._starting or starts
        if starts and is_first:
            self._start_thread()
        elif starts:
            # To start a thread is to wait until it runs.  Once all that came with this one are
            # queued, too, the loop waits for one thread, and that one starts the others.
            loop.call_soon(self._start_threads)
        self._queue.put(work)

    def _start_threads(self) -> None:
        """Start a wanted thread, which starts the next one in its turn."""
        try:
            self._start_thread()
        except ResourceExhausted:  # what is queued waits for one of the threads that there are
            logger.warning("worker %r is short of compute threads", self._name, exc_info=True)

    def _start_thread(self) -> None:
        """Start a thread if one is wanted.

        Raises:
            ResourceExhausted: the system has no more threads.
        """
        with self._lock:
            self._starting = self._wanted > 0
            if not self._starting:
                return
            self._wanted -= 1
        name = f"{self._name}-compute-{next(self._numbers)}"
        try:
            threading.Thread(target=self._serve, name=name, daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._starting = False
            raise ResourceExhausted(
                f"worker {self._name!r} cannot start a compute thread: {error}", worker=self._name
            ) from error

    def _serve(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._threads.add(threading.current_thread())
        self._start_threads()
        while (work := self._next_work()) is not None:
            work()
            del work  # an idle thread must not keep tensors alive
            with self._lock:
                self._idle += 1
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _next_work(self) -> Work | None:
        while True:
            try:
                return self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._idle:  # else work is on its way to this thread
                        self._idle -= 1
                        return None


_shared_pool: Final = ComputePool("za")


async def compute(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Run ``function(*args, **kwargs)`` in a compute thread and return its result.

    For what takes long or holds the loop up: a module's forward, an optimizer's step.  The context,
    the call and torch's modes (grad, inference, autocast) at the caller hold in the thread too.  It
    waits for a step of a `DistributedOptimizer` that runs on this worker.

    Raises:
        ResourceExhausted: the worker has as many computations under way as it takes.
        Exception: whatever `function` raises.

    Cancelling it stops the waiting; the thread finishes and its result is dropped.
    """
    call = current_call.get()
    pool = _shared_pool if call is None else call.node.pool
    async with reading():
        return await pool.run(lambda: function(*args, **kwargs))


def _work(
    function: Callable[[], T], future: asyncio.Future[T], loop: asyncio.AbstractEventLoop
) -> None:
    """Run `function`, and have `loop` put what becomes of it into `future`."""
    result, error = None, None
    try:
        result = function()
    except BaseException as raised:  # noqa: BLE001  # the caller gets it, whatever it is
        error = raised
    try:
        loop.call_soon_threadsafe(_finish, future, result, error)
    except RuntimeError:
        return  # the loop is closed: nobody is left to be told
    finally:
        # An error holds this frame, which must not hold it.  A result may be one, or have one.
        del result, error, future


def _run_under(modes: Modes, function: Callable[[], T]) -> T:
    with applied(modes):
        return function()


def _finish(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, (StopIteration, GeneratorExit)):  # they would end who awaits
        future.set_exception(RuntimeError(f"the function raised {type(error).__name__}: {error}"))
    else:
        future.set_exception(error)
