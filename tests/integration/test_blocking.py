"""The surface without ``async``, used from scripts and threads as its users do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import inspect
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE, memory_endpoint
from tests.integration.fleets import until
from zmq_autograd import blocking
from zmq_autograd.blocking.surface import Surface
from zmq_autograd.node import signals

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close the background loop after each test, with all that a failed one has left open."""
    yield
    blocking.current_portal().close()


@pytest.fixture
def bob() -> Iterator[blocking.Worker]:
    """A worker."""
    with blocking.Worker("bob", listen=memory_endpoint()) as bob:
        yield bob


@pytest.fixture
def alice(bob: blocking.Worker) -> Iterator[blocking.Worker]:
    """A worker that leaves before `bob`."""
    with blocking.Worker("alice") as alice:
        yield alice


@pytest.fixture
def remote(alice: blocking.Worker, bob: blocking.Worker) -> blocking.RemoteWorker:
    """What `alice` has of `bob`."""
    found: blocking.RemoteWorker = alice.connect(bob.endpoints[0], timeout=DEADLINE)
    return found


def here() -> blocking.Context:
    """Return the current context, which there is."""
    context = blocking.current_context()
    assert context is not None
    return context


def peer_name() -> str:
    peer = blocking.current_peer()
    assert peer is not None
    return str(peer.name)


def same(result: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and torch.equal(result, expected)


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


# --- what is wrapped -----------------------------------------------------------------------------


def test_rrefs_travel_as_blocking_ones(
    bob: blocking.Worker, alice: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    class Counter:
        def __init__(self, start: int) -> None:
            self.total = start

        def add(self, other: blocking.RRef) -> int:
            assert isinstance(other, blocking.RRef)
            self.total += other.to_here()
            return self.total

    bob.register(Counter, expose=("add",))

    @bob.register
    def look(rrefs: dict[str, list[blocking.RRef]]) -> list[Any]:
        [first] = rrefs["some"]
        assert isinstance(first, blocking.RRef)
        assert first.owner == blocking.current_peer()
        return [first.to_here(), first]

    mine = alice.rref(5)
    assert mine.owner == alice
    value, again = remote.call("look", {"some": [mine]})
    assert (value, again.local_value()) == (5, 5)
    counter = remote.remote("Counter", 3)
    assert isinstance(counter, blocking.RRef)
    assert counter.owner == remote
    assert counter.call("add", mine) == 8
    assert counter.remote("add", mine).to_here() == 13


def test_codecs_pack_and_unpack_blocking_objects(
    bob: blocking.Worker, alice: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    @dataclass
    class Named:
        name: str
        rref: blocking.RRef

    for each in (alice, bob):
        each.codec(
            Named, "named", pack=lambda it: [it.name, it.rref], unpack=lambda packed: Named(*packed)
        )

    @bob.register
    def renamed(named: Named) -> Named:
        assert isinstance(named.rref, blocking.RRef)
        return Named(named.name.upper(), named.rref)

    mine = alice.rref(5)
    found = remote.call("renamed", Named("five", mine))
    assert found.name == "FIVE"
    assert found.rref.local_value() == 5


def test_gradients_flow_through_rrefs(bob: blocking.Worker, remote: blocking.RemoteWorker) -> None:
    w = torch.tensor(3.0, requires_grad=True)
    bob.register(lambda x: w * x * x, "stage")
    x = torch.tensor(2.0, requires_grad=True)
    with remote.context() as ctx:
        rref = remote.remote("stage", x)
        ctx.backward(rref)
        found = ctx.gradients()[x]
    torch.autograd.backward(w * x * x)
    assert same(found, x.grad)


def test_plain_handlers_run_in_compute_threads(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    seen: list[Any] = []

    @bob.handler(za.messages.PropagateGradientsRequest)
    def on_gradients(
        request: za.messages.PropagateGradientsRequest, peer: blocking.RemoteWorker
    ) -> za.messages.Reply:
        seen.append((peer.name, threading.current_thread().name, request.grads))
        reply: za.messages.Reply = bob.default_handler(request, peer)
        return reply

    bob.register(lambda x: 2 * x, "double")
    x = torch.tensor(1.0, requires_grad=True)
    with remote.context() as ctx:
        ctx.backward(3 * remote.call("double", x))
        assert ctx.gradients()[x] == 6
    [(peer, thread, grads)] = seen
    assert (peer, grads) == ("alice", [torch.tensor(3.0)])
    assert thread.startswith("bob-compute-")
    with pytest.raises(za.ConfigurationError, match="has a handler"):
        bob.handler(za.messages.PropagateGradientsRequest)(on_gradients)


def test_a_remote_function_is_a_plain_one(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    bob.register(lambda x, timeout: x * timeout, "scaled")
    scaled = remote.function("scaled", timeout=DEADLINE)
    assert not inspect.iscoroutinefunction(scaled)
    assert scaled.__name__ == "scaled"
    assert scaled(2, timeout=3) == 6


def test_modules_and_objects_can_be_registered(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    net = nn.Linear(2, 1)
    bob.register(net, "net", expose=("zero_grad",))
    x = torch.ones(1, 2)
    assert torch.equal(remote.call("net", x), net(x))
    remote.call("net.zero_grad")


def test_remote_modules_are_trained_by_a_scheduled_optimizer(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    torch.manual_seed(0)
    far, near = nn.Linear(3, 4), nn.Linear(4, 1)
    alone = copy.deepcopy(nn.Sequential(far, near))
    batches = [torch.randn(5, 3) for _ in range(4)]
    bob.register(far, "far", expose="module")

    net = remote.module("far")
    assert isinstance(net, blocking.RemoteModule)
    assert net.owner == remote
    [weight, bias] = net.parameters()
    assert isinstance(weight, blocking.RemoteParameter)
    assert isinstance(weight.rref, blocking.RRef)
    assert (weight.numel(), bias.shape) == (12, torch.Size([4]))
    optimizer = blocking.DistributedOptimizer.create(
        torch.optim.SGD, itertools.chain(net.parameters(), near.parameters()), lr=0.5, momentum=0.9
    )
    assert isinstance(optimizer, blocking.DistributedOptimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    assert net.train() is net
    for x in batches:
        with remote.context() as ctx:
            ctx.backward(near(net(x)).square().mean())
            assert set(net.gradients(ctx)) == {"weight", "bias"}
            optimizer.clip_grad_norm(ctx, 1.0)
            optimizer.step(ctx)
        scheduler.step()

    expected = torch.optim.SGD(alone.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(expected, step_size=2, gamma=0.1)
    for x in batches:
        expected.zero_grad()
        torch.autograd.backward(alone(x).square().mean())
        nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        expected.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
    state, expected_state = net.state_dict(), alone[0].state_dict()
    assert state.keys() == expected_state.keys()
    assert all(same(state[key], expected_state[key]) for key in state)
    assert all(map(same, near.parameters(), alone[1].parameters()))
    momenta = zip(
        optimizer.state_dict()["state"].values(),
        expected.state_dict()["state"].values(),
        strict=True,
    )
    assert all(same(a["momentum_buffer"], b["momentum_buffer"]) for a, b in momenta)


# --- the surface is all there --------------------------------------------------------------------


def async_classes() -> list[type]:
    """Return the classes of the package's surface that have something to await."""
    found = [value for name in za.__all__ if inspect.isclass(value := getattr(za, name))]
    return [c for c in found if any(map(inspect.iscoroutinefunction, vars(c).values()))]


def public(of: type) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


@pytest.mark.parametrize("of", async_classes(), ids=lambda of: of.__name__)
def test_every_class_has_a_blocking_one(of: type) -> None:
    made = getattr(blocking, of.__name__)
    assert Surface._classes[of] is made
    assert made.__name__ in blocking.__all__
    assert public(made) == public(of)
    for name in public(of):
        ours, theirs = getattr(made, name), getattr(of, name)
        assert not inspect.iscoroutinefunction(ours)
        if inspect.isfunction(theirs):
            assert inspect.signature(ours) == inspect.signature(theirs)
            assert (ours.__doc__ is None) == (theirs.__doc__ is None)
    texts = [made.__doc__, *(getattr(made, name).__doc__ for name in public(made))]
    assert not [text for text in texts if text and ("await " in text or "async with" in text)]


def test_every_function_has_a_blocking_one() -> None:
    functions = {name for name in za.__all__ if inspect.isfunction(getattr(za, name))}
    assert functions - {"compute"} <= set(blocking.__all__)


def test_constructors_tell_their_arguments() -> None:
    of = inspect.signature(za.Worker)
    assert inspect.signature(blocking.Worker).parameters.keys() == of.parameters.keys()
    assert "Make a worker" in (blocking.Worker.__init__.__doc__ or "")


def test_attributes_are_those_of_the_object(remote: blocking.RemoteWorker) -> None:
    assert (remote.name, remote.is_connected) == ("bob", True)
    assert {"name", "endpoint", "call"} <= set(dir(remote))
    assert "bob" in repr(remote)
    assert {remote: 1}[blocking.of(remote._object)] == 1
    with pytest.raises(AttributeError, match="nothing"):
        _ = remote.nothing


def test_attributes_are_set_on_the_object(
    bob: blocking.Worker, remote: blocking.RemoteWorker
) -> None:
    bob.register(nn.Linear(3, 4), "net", expose="module")
    net = remote.module("net")
    optimizer = blocking.DistributedOptimizer.create(torch.optim.SGD, net.parameters(), lr=0.5)
    before = net.state_dict()
    stopped = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    optimizer.param_groups = stopped
    assert optimizer.param_groups is stopped
    with remote.context() as ctx:
        ctx.backward(net(torch.ones(1, 3)).sum())
        optimizer.step(ctx)
    assert all(map(same, net.state_dict().values(), before.values()))
    [weight, _] = net.parameters()
    weight.rref = weight.rref
    assert isinstance(weight._object.rref, za.RRef)
    with pytest.raises(AttributeError, match="no setter"):
        remote.is_connected = False  # type: ignore[misc]


def test_what_a_subclass_sets_is_its_own(remote: blocking.RemoteWorker) -> None:
    class Party(blocking.Worker):
        def __init__(self) -> None:
            self.peers: list[Any] = []
            super().__init__("party")
            self.peers = [remote]

    assert Party().peers == [remote]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_they_cannot_be_copied_or_pickled(
    alice: blocking.Worker, remote: blocking.RemoteWorker, copied: Callable[[object], object]
) -> None:
    with remote.context() as ctx:
        for each in (remote, alice, ctx, alice.rref(5)):
            with pytest.raises(TypeError, match=f"{type(each).__name__} cannot be copied"):
                copied(each)


# --- whole programs ------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "blocking.md").read_text()


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_snippet_prints_what_its_comments_say(snippet: str) -> None:
    expected = re.findall(r"print\(.*\)  # (.*)", snippet)
    done = run_program(snippet)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == expected


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


def test_a_program_may_end_with_everything_open() -> None:
    done = run_program(
        """
import zmq_autograd as za, sys
bob = za.blocking.Worker("bob", listen="tcp://127.0.0.1:0")
bob.start()
alice = za.blocking.Worker("alice").__enter__()
remote = za.blocking.connect(bob.endpoints[0]).__enter__()
ctx = remote.context().__enter__()
bob.register(lambda x: 2 * x, "double")
print(remote.call("double", 4), flush=True)
sys.exit(2)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "8\n", "")


def test_a_forked_child_may_use_it_anew() -> None:
    done = run_program(
        """
import os, sys
import zmq_autograd as za
with za.blocking.Worker("bob", listen="tcp://127.0.0.1:0") as bob:
    bob.register(lambda x: 2 * x, "double")
    late = za.blocking.Worker("late")
    child = os.fork()
    if not child:
        with za.blocking.connect(bob.endpoints[0]) as remote:
            assert remote.call("double", 4) == 8
        with late:
            assert late.connect(bob.endpoints[0]).call("double", 5) == 10
        sys.exit(7)  # leaves bob's block: it is the parent's to close
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with za.blocking.connect(bob.endpoints[0]) as remote:
        assert remote.call("double", 6) == 12
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
