"""Coroutines are run from other threads as `await` would run them, and nothing is left behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE
from zmq_autograd.blocking import Portal, current_portal
from zmq_autograd.blocking.portal import _portals, _Running
from zmq_autograd.node.current import Call, current_call
from zmq_autograd.wire.messages import Modes

number: ContextVar[int] = ContextVar("number", default=0)


@pytest.fixture
def portal() -> Iterator[Portal]:
    """A portal with a loop of its own."""
    portal = Portal()
    yield portal
    portal.close()


class Stuck:
    """A coroutine function that ends when it is cancelled, and tells of it."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.cancelled = threading.Event()

    async def __call__(self, then: Callable[[], object] = lambda: None) -> None:
        try:
            self.started.set()
            then()
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


# --- results and errors --------------------------------------------------------------------------


async def add(x: int, *, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


def test_it_returns_the_result(portal: Portal) -> None:
    assert portal.run(add, 1, y=2) == 3
    assert portal.start(add, 1, y=2).result(DEADLINE) == 3
    assert portal.call(max, 1, 2) == 2


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), SystemExit(3), KeyboardInterrupt(), StopAsyncIteration(), BaseException()],
)
def test_it_raises_what_the_coroutine_raises(portal: Portal, error: BaseException) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(type(error)) as caught:
        portal.run(fail)
    assert caught.value is error
    assert portal.start(fail).exception(DEADLINE) is error
    assert portal.run(add, 1, y=2) == 3


def test_a_coroutine_that_was_cancelled_says_so(portal: Portal) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(concurrent.futures.CancelledError):
        portal.run(cancelled)


def test_nothing_is_kept_alive(portal: Portal) -> None:
    class Thing(Exception):
        pass

    async def give(thing: Thing) -> Thing:
        await asyncio.sleep(0)
        return thing

    async def throw() -> None:
        await asyncio.sleep(0)
        raise Thing

    gc.collect()
    gc.disable()
    try:
        thing = Thing()
        portal.run(give, thing)
        references = [weakref.ref(thing)]
        del thing
        try:
            portal.run(throw)
        except Thing as error:
            references.append(weakref.ref(error))
        portal.run(asyncio.sleep, 0)  # the loop has forgotten what it ran before
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


# --- what goes along -----------------------------------------------------------------------------


def test_context_variables_go_along_and_come_back(portal: Portal) -> None:
    async def count() -> int:
        number.set(number.get() + 1)
        await asyncio.sleep(0)
        return number.get()

    number.set(5)
    assert portal.run(count) == 6
    assert number.get() == 6  # as after `await count()`
    assert portal.start(count).result(DEADLINE) == 7
    assert number.get() == 6  # as after `asyncio.create_task(count())`


def test_what_a_failed_coroutine_set_comes_back(portal: Portal) -> None:
    async def fail() -> None:
        number.set(8)
        raise ValueError

    with pytest.raises(ValueError):
        portal.run(fail)
    assert number.get() == 8


def test_modes_go_along(portal: Portal) -> None:
    async def modes() -> list[tuple[bool, bool, bool]]:
        found = []
        for _ in range(3):
            found.append(
                (
                    torch.is_grad_enabled(),
                    torch.is_inference_mode_enabled(),
                    torch.is_autocast_enabled("cpu"),
                )
            )
            await asyncio.sleep(0)
        return found

    with torch.no_grad():
        without = portal.start(modes)
        assert portal.run(modes) == [(False, False, False)] * 3
    with torch.inference_mode():
        assert portal.run(modes) == [(False, True, False)] * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert portal.run(modes) == [(True, False, True)] * 3
    assert without.result(DEADLINE) == [(False, False, False)] * 3
    assert portal.run(modes) == [(True, False, False)] * 3


def test_modes_do_not_leak_between_coroutines(portal: Portal) -> None:
    inside, finish = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        with torch.no_grad():
            inside.set()
            await finish.wait()

    async def look() -> bool:
        await inside.wait()
        enabled = torch.is_grad_enabled()
        finish.set()
        return enabled

    holding = portal.start(hold)
    assert portal.run(look)
    holding.result(DEADLINE)


def test_what_a_call_came_with_gives_way_to_the_threads_own_modes(portal: Portal) -> None:
    """A function in a compute thread that turns gradients on again has them on in its calls."""
    from zmq_autograd.node.current import applied, current_modes

    async def modes() -> Modes:
        await asyncio.sleep(0)
        return current_modes()

    without = Modes(grad_enabled=False)
    token = current_call.set(Call(None, None, None, deadline=None, modes=without))
    try:
        with applied(without):
            assert not portal.run(modes).grad_enabled
            with torch.enable_grad():
                assert portal.run(modes).grad_enabled
    finally:
        current_call.reset(token)


# --- starting ------------------------------------------------------------------------------------


def test_start_returns_when_the_coroutine_has_suspended(portal: Portal) -> None:
    release = asyncio.Event()

    async def read(values: list[int]) -> int:
        total = sum(values)
        await release.wait()
        return total

    values = [1, 2]
    started = portal.start(read, values)
    values.append(100)
    portal.call(release.set)
    assert started.result(DEADLINE) == 3


def test_cancelling_a_started_one_cancels_the_coroutine(portal: Portal) -> None:
    stuck = Stuck()
    started = portal.start(stuck)
    assert stuck.started.is_set()
    assert started.cancel()
    assert stuck.cancelled.wait(DEADLINE)
    with pytest.raises(concurrent.futures.CancelledError):
        started.result(DEADLINE)


# --- the loop's own thread -----------------------------------------------------------------------


def test_waiting_in_the_loops_own_thread_is_refused(portal: Portal) -> None:
    async def inside() -> None:
        for wait in (portal.run, portal.start):
            with pytest.raises(za.ConfigurationError, match="use the async API here"):
                wait(add, 1, y=2)
        with pytest.raises(za.ConfigurationError, match="closed from its own"):
            portal.close()
        assert portal.call(threading.current_thread) is threading.current_thread()

    portal.run(inside)


async def test_in_the_thread_of_another_loop_it_may_be_waited_for(portal: Portal) -> None:
    assert portal.run(add, 1, y=2) == 3


def test_plain_functions_run_in_the_loops_thread_once_there_is_one(portal: Portal) -> None:
    assert portal.call(threading.current_thread) is threading.current_thread()
    portal.run(asyncio.sleep, 0)
    assert portal.call(threading.current_thread).name == "za-blocking"


# --- whose loop ----------------------------------------------------------------------------------


def test_all_threads_share_one_loop() -> None:
    async def here() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loops = list(pool.map(lambda _: current_portal().run(here), range(20)))
    assert len(set(loops)) == 1
    current_portal().close()


async def test_it_leads_to_a_loop_of_somebody_elses() -> None:
    loop = asyncio.get_running_loop()
    portal = Portal(loop)

    async def here() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert await asyncio.to_thread(portal.run, here) is loop
    assert await asyncio.to_thread(portal.call, asyncio.get_running_loop) is loop
    await asyncio.to_thread(portal.close)
    assert await asyncio.to_thread(portal.run, here) is loop
    # A compute thread makes one for each thing that it does: none is there to be closed at the end.
    assert portal not in _portals


def test_a_loop_that_has_ended_is_told_of() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(za.ConfigurationError, match="has ended"):
        Portal(loop).run(add, 1, y=2)


# --- interruptions -------------------------------------------------------------------------------


def test_an_interrupt_cancels_the_coroutine(portal: Portal) -> None:
    stuck = Stuck()
    with pytest.raises(KeyboardInterrupt):
        portal.run(stuck, interrupt)
    assert stuck.cancelled.is_set()
    assert portal.run(add, 1, y=2) == 3


def test_one_that_is_cancelled_before_it_begins_never_does(portal: Portal) -> None:
    busy, release = threading.Event(), threading.Event()

    async def hold() -> None:
        busy.set()
        release.wait(DEADLINE)

    stuck = Stuck()
    running = _Running(stuck, (), {})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        holding = pool.submit(portal.run, hold)
        assert busy.wait(DEADLINE)
        background = portal._background
        assert background is not None
        background.begin(running)
        running.cancel()
        release.set()
        assert running.ended.wait(DEADLINE)
        holding.result(DEADLINE)
    portal.run(asyncio.sleep, 0)
    assert not stuck.started.is_set()


def test_a_coroutine_that_ignores_its_cancellation_is_left_behind(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmq_autograd.blocking.portal.CANCEL_SECONDS", 0.1)
    release, over = asyncio.Event(), threading.Event()

    async def stubborn() -> None:
        interrupt()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        over.set()

    with pytest.raises(KeyboardInterrupt):
        portal.run(stubborn)
    assert not over.is_set()
    portal.call(release.set)
    assert over.wait(DEADLINE)


def interrupt() -> None:
    """Do what Ctrl-C does."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


# --- its end -------------------------------------------------------------------------------------


def test_closing_cancels_what_runs_and_ends_the_thread(portal: Portal) -> None:
    stuck = Stuck()
    running = portal.start(stuck)
    thread = portal.call(threading.current_thread)
    portal.close()
    assert stuck.cancelled.is_set()
    assert not thread.is_alive()
    with pytest.raises(concurrent.futures.CancelledError):
        running.result(DEADLINE)
    portal.close()
    assert portal.run(add, 1, y=2) == 3  # by a new thread


def test_closing_wakes_who_waits(portal: Portal) -> None:
    stuck = Stuck()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(portal.run, stuck)
        assert stuck.started.wait(DEADLINE)
        portal.close()
        with pytest.raises(concurrent.futures.CancelledError):
            waiting.result(DEADLINE)


def test_what_comes_while_it_closes_is_not_left_waiting(portal: Portal) -> None:
    go = threading.Event()

    def use() -> None:
        go.wait()
        for _ in range(50):
            try:
                assert portal.run(add, 1, y=2) == 3
            except (concurrent.futures.CancelledError, za.ConfigurationError):
                continue

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        using = [pool.submit(use) for _ in range(4)]
        go.set()
        while not all(each.done() for each in using):
            portal.close()
        for each in using:
            each.result(DEADLINE)


def test_what_the_loop_never_came_to_is_cancelled(portal: Portal) -> None:
    portal.run(asyncio.sleep, 0)
    background = portal._background
    assert background is not None
    close = background.loop.close
    late = _Running(add, (1,), {"y": 2})

    def close_after_one_more() -> None:
        background.begin(late)
        close()

    background.loop.close = close_after_one_more  # type: ignore[method-assign]
    portal.close()
    with pytest.raises(concurrent.futures.CancelledError):
        late.result(DEADLINE)
    with pytest.raises(za.ConfigurationError, match="has ended"):
        background.begin(_Running(add, (1,), {"y": 2}))


def test_what_is_kept_is_closed_in_turn(portal: Portal, caplog: pytest.LogCaptureFixture) -> None:
    closed: list[int] = []

    def closer(key: int) -> Callable[[], Awaitable[None]]:
        async def close() -> None:
            closed.append(key)
            if key == 2:
                raise ValueError("it does not close")

        return close

    portal.run(asyncio.sleep, 0)
    keys = [object() for _ in range(4)]
    for position, key in enumerate(keys):
        portal.keep(key, closer(position))
    portal.let_go(keys[1])
    portal.close()
    assert closed == [3, 2, 0]
    assert "it does not close" in caplog.text


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the default portal, `portal`, and a coroutine function, `stuck`."""
    head = """
import asyncio, os, sys, threading
from zmq_autograd.blocking import current_portal
portal = current_portal()
async def stuck():
    try:
        await asyncio.Event().wait()
    finally:
        print("cancelled", flush=True)
"""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", head + text],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_end_of_the_program_closes_it() -> None:
    done = run_script("portal.start(stuck)\nasync def leave(): sys.exit(3)\nportal.run(leave)")
    assert (done.returncode, done.stdout, done.stderr) == (3, "cancelled\n", "")


def test_a_forked_child_has_a_thread_of_its_own() -> None:
    done = run_script(
        """
portal.start(stuck)
parents = portal.call(threading.get_native_id)
with portal._lock:  # another thread may hold it just then
    child = os.fork()
if not child:
    assert portal.call(os.getpid) == os.getpid()
    portal.run(asyncio.sleep, 0)
    assert portal.call(threading.get_native_id) != parents
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert portal.call(threading.get_native_id) == parents
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cancelled\n", "")
