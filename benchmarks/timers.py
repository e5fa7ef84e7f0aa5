"""CPU time of chosen functions in all threads of a process, each without the others that it calls.

A profiler makes every call dearer; here only some dozens of calls a step are timed, and the rest
runs as it is.  CPU time, because others use the machine too.  Functions are replaced where they are
defined and wherever they were imported by name, so this has to be done before anything else holds
on to them.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Generator
from time import perf_counter, thread_time
from typing import Any

from zmq_autograd.node.compute import ComputePool

PACKAGE = "zmq_autograd"


class Timers:
    """Seconds by section, over all threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        # Of each thread: the section that it is in, and since when.
        self._threads = threading.local()

    def _enter(self, section: str) -> str | None:
        """Count the time from now on to `section`; return the section that this one is in."""
        here = self._threads.__dict__
        outer, now = here.get("section"), thread_time()
        if outer is not None:
            self.seconds[outer] += now - here["since"]
        here["section"], here["since"] = section, now
        return outer

    def _leave(self, outer: str | None) -> None:
        """Count the time from now on to `outer` again."""
        here, now = self._threads.__dict__, thread_time()
        self.seconds[here["section"]] += now - here["since"]
        here["section"], here["since"] = outer, now

    # --- what is timed ---------------------------------------------------------------------------

    def time(self, name: str, section: str) -> None:
        """Count the time of part of the package to `section`.

        Args:
            name: ``module``, ``module:function``, ``module:Class`` or ``module:Class.method``.
            section: what the tables call it.
        """
        module_name, _, path = name.partition(":")
        module = importlib.import_module(f"{PACKAGE}.{module_name}")
        class_name, _, method = path.partition(".")
        if method:
            self._time_method(getattr(module, class_name), method, section)
            return
        for found in [getattr(module, path)] if path else list(vars(module).values()):
            if getattr(found, "__module__", "") != module.__name__:
                continue  # imported there
            if inspect.isfunction(found):
                replace_everywhere(found, self.timed(found, section))
            elif inspect.isclass(found):
                for attribute, value in list(vars(found).items()):
                    if inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)):
                        self._time_method(found, attribute, section)

    def _time_method(self, owner: type, name: str, section: str) -> None:
        method = inspect.getattr_static(owner, name)
        if isinstance(method, (classmethod, staticmethod)):
            setattr(owner, name, type(method)(self.timed(method.__func__, section)))
        else:
            setattr(owner, name, self.timed(method, section))

    def timed(self, function: Callable[..., Any], section: str) -> Callable[..., Any]:
        """Return `function` with its time counted to `section`."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def timed_coroutine(*args: Any, **kwargs: Any) -> Any:
                return await self._steps(function(*args, **kwargs), section)

            return timed_coroutine

        @functools.wraps(function)
        def timed_function(*args: Any, **kwargs: Any) -> Any:
            outer = self._enter(section)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave(outer)

        return timed_function

    @types.coroutine
    def _steps(self, coroutine: Any, section: str) -> Generator[Any, Any, Any]:
        """Run a coroutine, of which only the steps count, not what it waits for."""
        go_on, sent = coroutine.send, None
        while True:
            outer = self._enter(section)
            try:
                awaited = go_on(sent)
            except StopIteration as done:
                return done.value
            finally:
                self._leave(outer)
            try:
                sent, go_on = (yield awaited), coroutine.send
            except BaseException as error:  # noqa: BLE001  # it is the coroutine's
                sent, go_on = error, coroutine.throw

    def time_loop(self, loop: asyncio.AbstractEventLoop, section: str) -> None:
        """Count what the running loop does beside what is timed to `section`."""
        loop._run_once = self.timed(loop._run_once, section)

    def time_thread_hops(self, section: str) -> None:
        """Count the time that functions are on their way to a thread, and results back.

        That is time of the clock.
        """
        start = ComputePool.start

        def timed_start(
            pool: ComputePool, function: Callable[[], Any], *arguments: Any
        ) -> asyncio.Future[Any]:
            asked, ended = perf_counter(), 0.0

            def in_thread() -> Any:
                nonlocal ended
                self.seconds[section] += perf_counter() - asked
                try:
                    return function()
                finally:
                    ended = perf_counter()

            def arrived(_: object) -> None:
                self.seconds[section] += perf_counter() - ended

            future = start(pool, in_thread, *arguments)
            future.add_done_callback(arrived)
            return future

        ComputePool.start = timed_start


def replace_everywhere(original: Any, replacement: Any) -> None:
    """Put `replacement` wherever a module of the package has `original`."""
    for name, module in list(sys.modules.items()):
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, replacement)
