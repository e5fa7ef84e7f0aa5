"""The surface without ``async``, used from scripts and threads as its users do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading
import time

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint
from tests.integration.blocking.checks import same
from tests.integration.fleets import until
from zmq_autograd import blocking
from zmq_autograd.node import signals


def here() -> blocking.Context:
    """Return the current context, which there is."""
    context = blocking.current_context()
    assert context is not None
    return context


def peer_name() -> str:
    peer = blocking.current_peer()
    assert peer is not None
    return str(peer.name)


# --- differentiating -----------------------------------------------------------------------------


def test_gradients_are_those_of_one_process(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    bob.register(lambda x: torch.tanh(x @ w), "stage")
    bob.register(lambda: here().gradients()[w], "gradient")
    with remote.context() as ctx:
        y = remote.call("stage", x)
        ctx.backward((y**2).sum())
        found = ctx.gradients()[x], remote.call("gradient")
    torch.autograd.backward((torch.tanh(x @ w) ** 2).sum())
    assert same(found[0], x.grad)
    assert same(found[1], w.grad)


def test_the_context_is_that_of_the_calling_thread(alice: blocking.Worker) -> None:
    assert blocking.current_context() is None
    with alice.context() as ctx:
        assert blocking.current_context() == ctx
        assert za.current_context() is not None
        with pytest.raises(za.ContextError, match="do not nest"), alice.context():
            pass
    assert blocking.current_context() is None
    with pytest.raises(za.ContextError, match="ended"):
        ctx.gradients()


def test_threads_have_a_context_each(bob: blocking.Worker, remote: blocking.RemoteWorker) -> None:
    w = torch.tensor(2.0, requires_grad=True)
    bob.register(lambda x: x * w, "stage")
    bob.register(lambda: here().gradients()[w], "gradient")
    together = threading.Barrier(4)

    def work(number: int) -> tuple[int, float, float]:
        x = torch.tensor(float(number), requires_grad=True)
        with remote.context() as ctx:
            together.wait(DEADLINE)
            y = remote.call("stage", x)
            together.wait(DEADLINE)
            ctx.backward(y * number)
            together.wait(DEADLINE)
            return ctx.context_id, ctx.gradients()[x].item(), remote.call("gradient").item()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(1, 5)))
    assert len({context_id for context_id, _, _ in found}) == 4
    # d(number * x * w): number * w with respect to x, number * x to w
    assert [rest for _, *rest in found] == [[2.0 * n, 1.0 * n * n] for n in range(1, 5)]


def test_functions_call_on_in_their_context(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    w = torch.tensor(3.0, requires_grad=True)
    with blocking.Worker("carol", listen=memory_endpoint()) as carol:
        to_carol = bob.connect(carol.endpoints[0])

        @carol.register
        def stage(x: Tensor) -> Tensor:
            assert blocking.current_worker() == carol
            assert peer_name() == "bob"
            return torch.sin(x * w)

        @bob.register
        def middle(x: Tensor) -> Tensor:
            assert blocking.current_worker() == bob
            inner: Tensor = to_carol.call("stage", 2 * x)
            return inner * inner

        @carol.register
        def gradient() -> Tensor:
            found: Tensor = here().gradients()[w]
            return found

        bob.register(lambda: to_carol.call("gradient"), "gradient")
        x = torch.tensor(0.7, requires_grad=True)
        with remote.context() as ctx:
            ctx.backward(remote.call("middle", x))
            found = ctx.gradients()[x], remote.call("gradient")
        torch.autograd.backward(torch.sin(2 * x * w) ** 2)
        assert same(found[0], x.grad)
        assert same(found[1], w.grad)


def test_hooks_may_call(bob: blocking.Worker, remote: blocking.RemoteWorker) -> None:
    bob.register(lambda x: 2 * x, "double")
    bob.register(lambda g: 10 * g, "scaled")
    x = torch.tensor(1.0, requires_grad=True)
    with remote.context() as ctx:
        h = 3 * x

        def scaled(gradient: Tensor) -> Tensor:
            assert here() == ctx
            found: Tensor = remote.call("scaled", gradient)
            return found

        h.register_hook(scaled)  # type: ignore[no-untyped-call]
        ctx.backward(remote.call("double", h))
        assert ctx.gradients()[x] == 60


def test_functions_of_an_async_worker_block_on_its_loop() -> None:
    """In a compute thread the objects made there live on the loop of the worker."""

    async def main() -> tuple[float, str]:
        async with (
            za.Worker("carol", listen=memory_endpoint()) as carol,
            za.Worker("bob", listen=memory_endpoint()) as bob,
            za.connect(bob.endpoints[0]) as to_bob,
        ):
            carol.register(lambda x: 3 * x, "triple")

            @bob.register
            def middle(x: Tensor) -> Tensor:
                me = blocking.current_worker()
                assert me is not None
                to_carol = me.connect(carol.endpoints[0])
                tripled: Tensor = to_carol.call("triple", x)
                return tripled + tripled

            x = torch.tensor(1.0, requires_grad=True)
            async with to_bob.context() as ctx:
                await ctx.backward(await to_bob.call("middle", x))
                gradient = ctx.gradients()[x].item()
            return gradient, ",".join(thread.name for thread in threading.enumerate())

    gradient, threads = asyncio.run(main())
    assert gradient == 6.0
    assert "za-blocking" not in threads


# --- what goes along -----------------------------------------------------------------------------


def test_modes_go_along(bob: blocking.Worker, remote: blocking.RemoteWorker) -> None:
    @bob.register
    def modes() -> list[bool]:
        return [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        ]

    with torch.no_grad():
        assert remote.call("modes") == [False, False, False]
    with torch.inference_mode():
        assert remote.call("modes") == [False, True, False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert remote.call("modes") == [True, False, True]
    assert remote.call("modes") == [True, False, False]


def test_a_nested_call_has_as_long_as_its_caller(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    seen: concurrent.futures.Future[BaseException] = concurrent.futures.Future()
    with blocking.Worker("carol", listen=memory_endpoint()) as carol:
        carol.register(asyncio.Event().wait, "wait")
        to_carol = bob.connect(carol.endpoints[0])

        @bob.register
        def middle() -> None:
            try:
                to_carol.call("wait", timeout=600)
            except za.DeadlineExceeded as error:
                seen.set_result(error)

        started = time.monotonic()
        with pytest.raises(za.DeadlineExceeded):
            remote.call("middle", timeout=0.3)
        assert "carol" in str(seen.result(DEADLINE))
        assert time.monotonic() - started < DEADLINE


def test_tensors_have_been_read_once_a_call_has_started(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    go = asyncio.Event()

    @bob.register
    async def keep(x: Tensor) -> Tensor:
        await go.wait()
        return x

    portal = blocking.current_portal()
    x = torch.zeros(1000)
    started = portal.start(remote._object.call, "keep", x)
    x += 1
    portal.call(go.set)
    assert started.result(DEADLINE).sum() == 0


# --- where it may be used ------------------------------------------------------------------------


def test_on_the_event_loop_it_says_to_use_the_async_api(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    @bob.register
    async def wrong() -> None:
        bob.connect("memory://nobody")

    with pytest.raises(za.RemoteError, match="use the async API here"):
        remote.call("wrong")


async def test_beside_a_running_loop_as_in_a_notebook() -> None:
    # In a cell of a notebook a loop is running in this very thread.
    with blocking.Worker("bob", listen=memory_endpoint()) as bob:
        bob.register(lambda x: 2 * x, "double")
        with blocking.connect(bob.endpoints[0]) as remote, remote.context() as ctx:
            x = torch.ones(2, requires_grad=True)
            ctx.backward(remote.call("double", x).sum())
            assert same(ctx.gradients()[x], torch.full((2,), 2.0))


def test_no_thread_is_left_after_closing() -> None:
    before = set(threading.enumerate())
    with blocking.Worker("bob", listen="tcp://127.0.0.1:0") as bob:
        bob.register(lambda x: 2 * x, "double")
        with blocking.connect(bob.endpoints[0]) as remote:
            assert remote.call("double", 1) == 2
    blocking.current_portal().close()
    assert set(threading.enumerate()) <= before


def test_async_objects_are_made_blocking_ones() -> None:
    async def main() -> None:
        async with za.Worker("bob", listen=memory_endpoint()) as bob:
            bob.register(lambda x: 2 * x, "double")
            async with za.connect(bob.endpoints[0]) as remote:
                loop = asyncio.get_running_loop()
                [plain] = blocking.of([remote], loop)
                assert isinstance(plain, blocking.RemoteWorker)
                assert await asyncio.to_thread(plain.call, "double", 4) == 8

    asyncio.run(main())


# --- interruptions -------------------------------------------------------------------------------


def test_an_interrupt_ends_the_call_and_cancels_the_function(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    cancelled = threading.Event()

    @bob.register
    async def wait() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        remote.call("wait")
    assert cancelled.wait(DEADLINE)
    bob.register(lambda: 5, "five")
    assert remote.call("five") == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_comes(bob: blocking.Worker, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    @bob.register
    async def stop() -> None:
        await until(lambda: signals._stops)
        os.kill(os.getpid(), number)

    with blocking.connect(bob.endpoints[0]) as remote:
        portal = blocking.current_portal()
        calling = portal.start(remote._object.call, "stop")
        bob.serve_forever()
        calling.result(DEADLINE)
        assert signal.getsignal(number) == before
        assert bob.status()["peers"]  # leaving is the block's part


def test_it_serves_until_it_is_closed(bob: blocking.Worker) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        serving = pool.submit(bob.serve_forever)
        blocking.current_portal().run(until, lambda: signals._stops)
        bob.close()
        serving.result(DEADLINE)
