"""Fixtures of all tests, and the check that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import zmq

from tests.faults import warm
from tests.helpers import SCHEMES, Pair, connected, endpoint_of

SETTLE_SECONDS: Final = 5.0
"""How long what a test used may take to go."""

TESTS: Final = Path(__file__).parent
CHECKED: Final = (TESTS / "integration", TESTS / "faults", TESTS / "unit" / "node")
"""Where tests start workers, and so may leave something behind."""

# `za.compute` outside a worker has threads of its own, which end by themselves after a while.
SHARED_POOL: Final = "za-compute-"

_frozen_modules = 0


def pytest_configure() -> None:
    """Set up what the processes that tests start inherit."""
    # Each computes in one thread: there are many of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell has its background jobs ignore SIGINT, and they their children, who have to hear it.
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have `nothing_left` wrap every other fixture of the tests that start workers."""
    if isinstance(item, pytest.Function) and any(item.path.is_relative_to(p) for p in CHECKED):
        item.fixturenames.insert(0, "nothing_left")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make what is made once per process, so that no test seems to leave it behind."""
    _start_pyzmq_thread()
    if "tests.faults.victims" in sys.modules:
        warm.start("tests.faults.victim", "tests.faults.learner")
    _freeze_what_was_imported()


def _freeze_what_was_imported() -> None:
    """Have the collector pass over all that there is, if modules were imported since the last time.

    Much is imported on first use.  To look through all of torch takes a fifth of a second, after
    each test that is checked, and stalls event loops whose stalls are measured.
    """
    global _frozen_modules
    if len(sys.modules) != _frozen_modules:
        _frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


def _start_pyzmq_thread() -> None:
    """Send one frame without a copy: pyzmq has a thread and two sockets for those, for good."""
    with (
        zmq.Context() as context,
        context.socket(zmq.PAIR) as near,
        context.socket(zmq.PAIR) as far,
    ):
        near.bind("inproc://far")
        far.connect("inproc://far")
        near.send(bytes(zmq.COPY_THRESHOLD), copy=False)
        far.recv()


@pytest.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Fail a test that leaves a task, thread, descriptor or process, or an error unheard."""
    _freeze_what_was_imported()  # at the start: nothing of the last test is alive any more
    loop = asyncio.get_running_loop()
    unheard: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    threads = set(threading.enumerate())
    descriptors = _descriptors()
    processes = _children()
    yield
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
        _, tasks = await asyncio.wait(tasks, timeout=SETTLE_SECONDS)
    assert not tasks, f"tasks left: {tasks}"
    await loop.shutdown_default_executor()
    _check_threads(threads)
    _, alive = psutil.wait_procs(_children() - processes, timeout=SETTLE_SECONDS)
    assert not alive, f"processes left: {alive}"
    gc.collect()  # futures tell of errors that nobody took when they are collected
    assert not unheard, f"errors left unheard: {unheard}"
    left = [name for fd, name in _descriptors().items() if fd not in descriptors]
    assert not left, f"descriptors left: {left}"


def _check_threads(before: set[threading.Thread]) -> None:
    left = []
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(SHARED_POOL):
            thread.join(SETTLE_SECONDS)
            left += [thread] if thread.is_alive() else []
    assert not left, f"threads left: {left}"


def _descriptors() -> dict[str, str]:
    """Return the open descriptors of this process and what they are."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture(params=SCHEMES)
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an endpoint of each kind, to listen on."""
    return endpoint_of(request.param, tmp_path)


@pytest.fixture
async def pair(endpoint: str) -> AsyncIterator[Pair]:
    """Two workers over each transport."""
    async with connected(endpoint) as pair:
        yield pair
