"""Compute threads: as many as there is work at once, the caller's context in them, their end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import importlib
import threading
import time
import weakref
from collections.abc import AsyncIterator

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE
from zmq_autograd.errors import ConfigurationError
from zmq_autograd.node.compute import ComputePool

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
async def pool() -> AsyncIterator[ComputePool]:
    """A pool whose threads have ended when the test is over."""
    pool = ComputePool("bob")
    yield pool
    for thread in pool.close():
        await asyncio.to_thread(thread.join, DEADLINE)


async def test_as_many_run_at_once_as_there_are(pool: ComputePool) -> None:
    barrier = threading.Barrier(50)
    met = await asyncio.gather(*(pool.run(lambda: barrier.wait(DEADLINE)) for _ in range(50)))
    assert sorted(met) == list(range(50))


async def test_one_after_the_other_takes_few_threads(pool: ComputePool) -> None:
    idents = set()
    for _ in range(100):
        idents.add(await pool.run(threading.get_ident))
        await pool.run(lambda: None)
    # A thread counts as idle a moment after its result is out, so more than one may be needed.
    assert len(idents) < 10


async def test_threads_are_named_after_their_worker_and_keep_no_process_alive(
    pool: ComputePool,
) -> None:
    thread = await pool.run(threading.current_thread)
    assert thread.name.startswith("bob-compute-")
    assert thread.daemon


async def test_idle_threads_end_and_new_work_still_finds_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("zmq_autograd.node.compute")
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.001)
    pool = ComputePool("bob")
    for _ in range(30):
        thread = await pool.run(threading.current_thread)
        await asyncio.to_thread(thread.join, DEADLINE)
        assert not thread.is_alive()
    # Work that comes while threads are about to end is done all the same.
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        await asyncio.wait_for(asyncio.gather(*(pool.run(int) for _ in range(4))), DEADLINE)
        await asyncio.sleep(0.001)
    for thread in pool.close():
        await asyncio.to_thread(thread.join, DEADLINE)


async def test_an_idle_thread_keeps_nothing_alive(pool: ComputePool) -> None:
    class Thing:
        pass

    thing = Thing()
    seen = weakref.ref(thing)
    await pool.run(lambda thing=thing: None)  # type: ignore[misc]
    del thing
    await pool.run(lambda: None)
    for _ in range(100):
        if seen() is None:
            break
        await asyncio.sleep(0.001)
    assert seen() is None


async def test_closing_ends_idle_threads_at_once_and_names_busy_ones() -> None:
    pool = ComputePool("bob")
    gate = threading.Event()
    entered = threading.Event()

    def work() -> str:
        entered.set()
        assert gate.wait(DEADLINE)
        return "done"

    await pool.run(lambda: None)
    running = pool.start(work)
    await asyncio.to_thread(entered.wait, DEADLINE)
    threads = pool.close()
    assert threads
    gate.set()
    assert await running == "done"
    for thread in threads:
        await asyncio.to_thread(thread.join, DEADLINE)
        assert not thread.is_alive()
    with pytest.raises(ConfigurationError, match="not running"):
        await pool.run(lambda: None)


# --- results and errors --------------------------------------------------------------------------


async def test_what_the_function_raises_is_raised_here(pool: ComputePool) -> None:
    class Own(Exception):
        pass

    def fail() -> None:
        raise Own("text")

    for run in (pool.run, za.compute):
        with pytest.raises(Own, match="text") as raised:
            await run(fail)
        assert raised.traceback[-1].name == "fail"


async def test_stop_iteration_does_not_pass_for_a_result(pool: ComputePool) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await pool.run(lambda: next(iter(())))


async def test_a_cancelled_run_lets_its_thread_finish(pool: ComputePool) -> None:
    gate = threading.Event()
    entered = threading.Event()
    finished = threading.Event()

    def work() -> None:
        entered.set()
        assert gate.wait(DEADLINE)
        finished.set()

    task = asyncio.create_task(pool.run(work))
    await asyncio.to_thread(entered.wait, DEADLINE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not finished.is_set()
    gate.set()
    assert await asyncio.to_thread(finished.wait, DEADLINE)


async def test_an_error_of_a_cancelled_run_is_dropped(pool: ComputePool) -> None:
    gate = threading.Event()

    def work() -> None:
        assert gate.wait(DEADLINE)
        raise ValueError("nobody awaits this")

    task = asyncio.create_task(pool.run(work))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    gate.set()
    await pool.run(lambda: None)
    gc.collect()  # what is wrongly kept would be reported by now, and fail this test


def test_a_thread_may_outlive_its_loop() -> None:
    pool = ComputePool("bob")
    gate = threading.Event()
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        assert gate.wait(DEADLINE)

    async def main() -> None:
        task = asyncio.create_task(pool.run(work))
        await pool.run(lambda: None)
        task.cancel()

    asyncio.run(main())
    gate.set()
    for thread in pool.close():
        thread.join(DEADLINE)
    assert threads


# --- what goes along -----------------------------------------------------------------------------


async def test_compute_passes_arguments_and_runs_in_a_thread() -> None:
    def function(*args: object, **kwargs: object) -> tuple[object, object, bool]:
        return args, kwargs, threading.current_thread() is threading.main_thread()

    assert await za.compute(function, 1, 2, function=3) == ((1, 2), {"function": 3}, False)


async def test_context_variables_go_along_and_do_not_come_back() -> None:
    def change() -> str:
        before = variable.get()
        variable.set("changed")
        return before

    variable.set("set")
    assert await asyncio.gather(*(za.compute(change) for _ in range(5))) == ["set"] * 5
    assert variable.get() == "set"


def modes() -> tuple[bool, bool, bool, torch.dtype]:
    """Return the modes of torch that hold in this thread."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


async def test_the_modes_of_torch_go_along_and_leave_no_trace(pool: ComputePool) -> None:
    plain = modes()
    for run in (pool.run, za.compute):
        assert await run(modes) == plain
        with torch.no_grad():
            assert await run(modes) == modes()
        with torch.inference_mode():
            assert await run(modes) == modes()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert await run(modes) == modes()
        with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
            assert await run(modes) == modes()
        with torch.no_grad(), torch.enable_grad():
            assert await run(modes) == modes()
        assert await run(modes) == plain


async def test_modes_that_a_function_sets_stay_in_it(pool: ComputePool) -> None:
    plain = modes()

    for _ in range(5):
        await pool.run(lambda: torch.set_grad_enabled(False))
        assert await pool.run(modes) == plain
    assert modes() == plain


async def test_many_at_once_keep_their_modes_apart(pool: ComputePool) -> None:
    barrier = threading.Barrier(12)

    def meet() -> tuple[bool, bool, bool, torch.dtype]:
        barrier.wait(DEADLINE)
        found = modes()
        barrier.wait(DEADLINE)
        return found

    runs = []
    expected = []
    for _ in range(3):
        for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            with mode:
                expected.append(modes())
                runs.append(pool.start(meet))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected.append(modes())
            runs.append(pool.start(meet))
    assert await asyncio.gather(*runs) == expected


async def test_what_is_computed_under_autocast_equals_it_here() -> None:
    net = torch.nn.Linear(8, 8)
    x = torch.ones(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        there, here = await za.compute(net, x), net(x)
    assert there.dtype == torch.bfloat16
    assert torch.equal(there, here)
    with torch.no_grad():
        assert not (await za.compute(net, x)).requires_grad
    with torch.inference_mode():
        assert (await za.compute(net, x)).is_inference()
    assert (await za.compute(net, x)).requires_grad
