"""What a caller learns when something goes wrong there, or further on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import re
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import Pair, connected, memory_endpoint
from tests.integration.fleets import until
from zmq_autograd.session.failures import MAX_TEXT, MAX_TRACEBACK

pytestmark = pytest.mark.timeout(30)


def fail(text: str = "it went wrong") -> None:
    raise ValueError(text)


@pytest.mark.parametrize(
    "function", ["plain", "coroutine", "kept.method", "slow", "missing", "cancelled"]
)
async def test_a_call_that_fails_leaves_nothing_to_the_garbage_collector(
    pair: Pair, function: str
) -> None:
    """What it took with it may be large, and a collection far away."""
    alive: list[weakref.ref[torch.Tensor]] = []
    started = asyncio.Event()

    def take(x: torch.Tensor) -> None:
        alive.append(weakref.ref(x))
        raise ValueError

    async def take_in_a_coroutine(x: torch.Tensor) -> None:
        take(x)

    async def take_slowly(x: torch.Tensor) -> None:
        alive.append(weakref.ref(x))
        started.set()
        await asyncio.Event().wait()

    pair.bob.register(take, "plain")
    pair.bob.register(take_in_a_coroutine, "coroutine")
    pair.bob.register(take_slowly, "slow")
    pair.bob.register(take, "kept.method", concurrency=1)

    async def call() -> None:
        x = torch.ones(3)
        alive.append(weakref.ref(x))
        if function == "cancelled":
            calling = asyncio.create_task(pair.remote_bob.call("slow", x))
            await started.wait()
            calling.cancel()
            await asyncio.wait({calling})
            return
        with contextlib.suppress(za.RemoteError, za.DeadlineExceeded):
            await pair.remote_bob.call(function, x, timeout=0.2 if function == "slow" else 10)

    await call()  # the first call of a process leaves caches behind
    gc.collect()
    alive.clear()
    gc.disable()
    try:
        await call()
        await until(lambda: not any(tensor() is not None for tensor in alive))
    finally:
        gc.enable()
    assert alive


async def test_what_is_raised_after_its_callers_timeout_is_no_news(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is there to hear it: asyncio need not complain of that."""
    may_raise = threading.Event()

    class Late:
        def fail(self) -> None:
            assert may_raise.wait(10)
            raise ValueError

        def answer(self) -> int:
            return 1

    pair.bob.register(Late(), "late", expose=("fail", "answer"))
    with pytest.raises(za.DeadlineExceeded):
        await pair.remote_bob.call("late.fail", timeout=0.05)
    may_raise.set()
    assert await pair.remote_bob.call("late.answer") == 1  # in its turn, after the other
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_what_is_not_registered_is_named(pair: Pair) -> None:
    with pytest.raises(za.NotRegistered) as raised:
        await pair.remote_bob.call("missing", 1)
    error = raised.value
    assert isinstance(error, za.RemoteError)
    assert isinstance(error, LookupError)
    assert (error.worker, error.path, error.traceback) == ("bob", ("bob",), None)
    assert str(error) == (
        "NotRegistered on worker 'bob': nothing is registered as 'missing' for worker 'alice'"
    )


async def test_what_a_peer_may_not_call_looks_like_what_is_not_there(pair: Pair) -> None:
    pair.bob.register(fail, allow={"carol"})
    with pytest.raises(
        za.NotRegistered, match="nothing is registered as 'fail' for worker 'alice'"
    ):
        await pair.remote_bob.call("fail")


async def test_names_from_the_wire_never_reach_attributes(pair: Pair) -> None:
    net = torch.nn.Linear(1, 1)
    pair.bob.register(net, "net", expose="module")
    pair.bob.register(fail)
    for name in ("net.__class__", "net.weight", "net.register_buffer", "fail.__globals__", "fail."):
        with pytest.raises(za.NotRegistered):
            await pair.remote_bob.call(name)


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_exception_comes_with_type_text_and_traceback(pair: Pair, is_async: bool) -> None:
    async def fail_async() -> None:
        fail()

    pair.bob.register(fail_async if is_async else fail, "f")
    with pytest.raises(za.RemoteError) as raised:
        await pair.remote_bob.call("f")
    error = raised.value
    assert type(error) is za.RemoteError
    assert (error.type_name, error.message) == ("ValueError", "it went wrong")
    assert (error.worker, error.path) == ("bob", ("bob",))
    assert error.traceback is not None
    assert "in fail\n    raise ValueError(text)" in error.traceback
    assert error.traceback.rstrip().endswith("ValueError: it went wrong")
    head = (
        "ValueError on worker 'bob': it went wrong\n\nRemote traceback, worker 'bob':\nTraceback "
    )
    assert str(error).startswith(head)


async def test_the_traceback_begins_with_the_users_code(pair: Pair) -> None:
    pair.bob.register(fail)
    with pytest.raises(za.RemoteError) as raised:
        await pair.remote_bob.call("fail")
    assert raised.value.traceback is not None
    files = re.findall(r'File "(.*?)"', raised.value.traceback)
    assert files == [__file__]


async def test_a_worker_may_keep_its_tracebacks_to_itself() -> None:
    async with connected(tracebacks=False) as pair:
        pair.bob.register(fail)
        with pytest.raises(za.RemoteError) as raised:
            await pair.remote_bob.call("fail")
        assert raised.value.traceback is None
        assert str(raised.value) == "ValueError on worker 'bob': it went wrong"


# --- over several workers ------------------------------------------------------------------------


@pytest.fixture
async def chain() -> AsyncIterator[list[za.Worker]]:
    """Workers w0 to w3; ``pass_on`` on each calls it on the next one, or ``last`` on w3."""
    workers = [za.Worker(f"w{index}", listen=memory_endpoint()) for index in range(4)]
    async with workers[0], workers[1], workers[2], workers[3]:
        for worker, following in itertools.pairwise(workers):
            remote = await worker.connect(following.endpoints[0])
            following_name = "last" if following is workers[-1] else "pass_on"
            worker.register(remote.function(following_name), "pass_on")
        yield workers


async def start_of(chain: list[za.Worker]) -> za.RemoteWorker:
    """Return w1 as w0 sees it."""
    return await chain[0].connect(chain[1].endpoints[0])


async def test_an_error_tells_the_workers_that_it_crossed(chain: list[za.Worker]) -> None:
    chain[3].register(fail, "last")
    with pytest.raises(za.RemoteError) as raised:
        await (await start_of(chain)).call("pass_on", "far away")
    error = raised.value
    assert (error.type_name, error.message, error.worker) == ("ValueError", "far away", "w3")
    assert error.path == ("w1", "w2", "w3")
    lines = str(error).splitlines()
    assert lines[0] == "ValueError on worker 'w3': far away (by way of w1 -> w2 -> w3)"
    assert lines[1:4] == [
        "",
        "Remote traceback, worker 'w3':",
        "Traceback (most recent call last):",
    ]
    assert lines[-1] == "ValueError: far away"


async def test_a_missing_name_far_away_is_told_from_one_nearby(chain: list[za.Worker]) -> None:
    with pytest.raises(za.NotRegistered) as raised:
        await (await start_of(chain)).call("pass_on")
    assert raised.value.worker == "w3"
    assert raised.value.path == ("w1", "w2", "w3")


async def test_a_worker_lost_far_away_is_named(chain: list[za.Worker]) -> None:
    started = asyncio.Event()

    @chain[3].register
    async def last() -> None:
        started.set()
        await asyncio.Event().wait()

    calling = asyncio.create_task((await start_of(chain)).call("pass_on"))
    await started.wait()
    incarnation = chain[3].incarnation
    node = chain[3]._node
    assert node is not None
    for channel in node.channels:
        channel.close("the network was cut")
    with pytest.raises(za.WorkerLost) as raised:
        await calling
    assert (raised.value.name, raised.value.incarnation) == ("w3", incarnation)
    assert raised.value.path == ("w1", "w2")
    assert "w3" in str(raised.value)


ERRORS = [
    za.ProtocolError("broken", worker="dave"),
    za.WorkerLost("dave", "0" * 32, "it burnt down"),
    za.DeadlineExceeded("too late", workers=("dave", "erin"), message_ids=(1, 2**64 - 1)),
    za.ContextError("no such context", context_id=7, worker="dave"),
    za.AuthenticationError("wrong key", worker="dave"),
    za.ResourceExhausted("too much", worker="dave"),
    za.NotRegistered("nothing", type_name="NotRegistered", worker="dave"),
    za.RemoteError("bad", type_name="KeyError", worker="dave", traceback="Traceback\n"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_this_package_keeps_its_type_and_facts(
    chain: list[za.Worker], error: za.ZmqAutogradError
) -> None:
    @chain[3].register
    async def last() -> None:
        raise error

    with pytest.raises(za.ZmqAutogradError) as raised:
        await (await start_of(chain)).call("pass_on")
    arrived = raised.value
    assert type(arrived) is type(error)
    assert arrived.path == ("w1", "w2", "w3")
    assert "dave" in str(arrived)
    assert vars(arrived) == vars(error) | {"path": arrived.path}


@pytest.mark.parametrize("error", [za.SerializationError("no"), za.ConfigurationError("no")])
async def test_an_error_that_is_about_one_side_is_a_remote_one_on_the_other(
    error: za.ZmqAutogradError,
) -> None:
    async with connected() as pair:

        @pair.bob.register
        def f() -> None:
            raise error

        with pytest.raises(za.RemoteError) as raised:
            await pair.remote_bob.call("f")
        assert type(raised.value) is za.RemoteError
        assert (raised.value.type_name, raised.value.message) == (type(error).__name__, "no")


# --- strange exceptions --------------------------------------------------------------------------


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no description")


class Own(BaseException):
    pass


class Late(za.DeadlineExceeded):
    pass


STRANGE = [
    (Broken(), "Broken"),
    (Own("x"), "Own"),
    (SystemExit(3), "SystemExit"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (asyncio.CancelledError("x"), "CancelledError"),
    (TimeoutError(), "TimeoutError"),
    (StopAsyncIteration(1), "StopAsyncIteration"),
    (ValueError(object()), "ValueError"),
    (ValueError("\ud800 \0 \n two lines"), "ValueError"),
    (ValueError("x" * 10_000_000), "ValueError"),
    (ExceptionGroup("both", [ValueError("a"), KeyError("b")]), "ExceptionGroup"),
    (Late("late"), "Late"),
    (OSError(2, "no such file"), "OSError"),
]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("error", "name"), STRANGE, ids=lambda value: repr(value)[:30])
async def test_whatever_is_raised_the_caller_gets_an_answer_and_the_worker_goes_on(
    error: BaseException, name: str, is_async: bool
) -> None:
    def plain() -> None:
        raise error

    async def coroutine() -> None:
        raise error

    async with connected() as pair:
        pair.bob.register(coroutine if is_async else plain, "f")
        pair.bob.register(lambda: "fine", "g")
        with pytest.raises(za.RemoteError) as raised:
            await pair.remote_bob.call("f", timeout=5)
        expected = "FileNotFoundError" if isinstance(error, FileNotFoundError) else name
        assert raised.value.type_name == expected
        assert len(raised.value.message) <= MAX_TEXT
        assert raised.value.traceback is not None
        assert len(raised.value.traceback) <= MAX_TRACEBACK
        assert await pair.remote_bob.call("g") == "fine"


async def test_generator_exit_in_a_thread_is_an_error_like_others(pair: Pair) -> None:
    @pair.bob.register
    def f() -> None:
        raise GeneratorExit

    with pytest.raises(za.RemoteError, match="GeneratorExit"):
        await pair.remote_bob.call("f", timeout=5)


@pytest.mark.parametrize("is_async", [False, True])
async def test_stop_iteration_is_an_error_like_others(is_async: bool) -> None:
    async def coroutine() -> None:
        next(iter(()))

    async with connected() as pair:
        pair.bob.register(coroutine if is_async else lambda: next(iter(())), "f")
        with pytest.raises(za.RemoteError, match="StopIteration"):
            await pair.remote_bob.call("f")


async def test_a_handlers_own_cancelled_task_is_not_taken_for_its_end(pair: Pair) -> None:
    @pair.bob.register
    async def f() -> None:
        inner = asyncio.create_task(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    with pytest.raises(za.RemoteError) as raised:
        await pair.remote_bob.call("f")
    assert raised.value.type_name == "CancelledError"


# --- what cannot travel --------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


CANNOT_TRAVEL = [
    object(),
    {1, 2},
    range(3),
    torch.nn.Linear(1, 1),
    fail,
    torch.ones(2, device="meta"),
    {(1, 2): 3},
    {object(): 3},
    deep(100),
    "\ud800",
    [1, [2, {"a": object()}]],
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("value", CANNOT_TRAVEL, ids=lambda value: type(value).__name__)
async def test_an_argument_that_cannot_travel_is_refused_here(value: Any) -> None:
    async with connected() as pair:
        calls = []
        pair.bob.register(lambda *args, **kwargs: calls.append(args), "f")
        for args, kwargs in (((value,), {}), ((1, [value]), {}), ((), {"key": value})):
            with pytest.raises(za.SerializationError):
                await pair.remote_bob.call("f", *args, **kwargs)
        assert not calls
        await pair.remote_bob.call("f")
        assert not pair.remote_bob._session._session._sent  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", CANNOT_TRAVEL, ids=lambda value: type(value).__name__)
async def test_a_result_that_cannot_travel_is_an_error_at_the_caller(value: Any) -> None:
    async with connected() as pair:
        pair.bob.register(lambda: value, "f")
        pair.bob.register(lambda: [1, {"a": value}], "g")
        for name in ("f", "g"):
            with pytest.raises(za.RemoteError) as raised:
                await pair.remote_bob.call(name, timeout=5)
            assert raised.value.type_name == "SerializationError"
            assert raised.value.worker == "bob"


async def test_a_result_that_cannot_even_be_read_is_an_error_at_the_caller(pair: Pair) -> None:
    class Treacherous(list[Any]):
        def __iter__(self) -> Any:
            raise RuntimeError("changed while it was read")

    pair.bob.register(lambda: Treacherous([1]), "f")
    with pytest.raises(za.RemoteError) as raised:
        await pair.remote_bob.call("f", timeout=5)
    assert raised.value.type_name == "RuntimeError"
    with pytest.raises(RuntimeError, match="changed while it was read"):
        await pair.remote_bob.call("f", Treacherous([1]))


async def test_wrong_arguments_are_the_callees_error(pair: Pair) -> None:
    pair.bob.register(fail)
    with pytest.raises(za.RemoteError) as raised:
        await pair.remote_bob.call("fail", 1, 2, three=3)
    assert raised.value.type_name == "TypeError"
