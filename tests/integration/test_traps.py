"""What goes silently wrong, hangs or grows with torch.distributed.rpc, where no other test has it.

One test for each trap; its docstring says what torch does there.  ``docs/traps.md`` lists them all,
those that other files show included.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import pickle
import signal
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any, Final

import psutil
import pytest
import torch
from torch import Tensor, nn

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected, memory_endpoint
from tests.integration.fleets import until
from tests.integration.twins import far_leaf, near_leaf, offer, on_gradient, some
from zmq_autograd.wire.limits import MIB

pytestmark = pytest.mark.timeout(60)

SCALES: Final = torch.tensor([2.0, 1.0, 3.0])
"""The far leaf, and so the gradient of what it scales."""


@pytest.fixture
async def two() -> AsyncIterator[Pair]:
    """Two workers in memory; bob offers what multiplies by a leaf of its own."""
    async with connected() as pair:
        offer(pair.bob, far_leaf())
        yield pair


# --- what stays on the graph ---------------------------------------------------------------------


class Tagged(Tensor):
    """A tensor of a class of its user's own."""


def of_kind(kind: str) -> Any:
    """Return a leaf of another class than Tensor."""
    values = near_leaf().detach()
    if kind == "Parameter":
        return nn.Parameter(values)
    return values.as_subclass(Tagged).requires_grad_()


@pytest.mark.parametrize("kind", ["Parameter", "Tagged"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"a": [(x,)]}], ids=["bare", "nested"])
async def test_parameters_and_tensors_of_other_classes_are_not_detached(
    two: Pair, kind: str, wrap: Any
) -> None:
    """torch: of an `nn.Parameter` as the argument of a Python function there is no gradient."""

    def square(tree: Any) -> Tensor:
        x: Tensor = tree["a"][0][0] if isinstance(tree, dict) else tree
        return x**2

    two.bob.register(square)
    alone, apart = of_kind(kind), of_kind(kind)
    square(wrap(alone)).sum().backward()  # type: ignore[no-untyped-call]
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("square", wrap(apart))).sum())
        (found,) = ctx.gradients().values()
    assert torch.equal(found, alone.grad)


async def test_a_complex_loss_needs_its_gradient_as_in_one_process(two: Pair) -> None:
    """torch: a complex root is taken with an implicit 1, which torch itself refuses locally."""
    alone, apart = (near_leaf(torch.cfloat) for _ in range(2))
    loss, start = (alone**2).sum(), torch.tensor(2 - 1j)
    with pytest.raises(RuntimeError, match="real scalar outputs"):
        torch.autograd.backward(loss)
    torch.autograd.backward(loss, start)
    two.bob.register(lambda x: (x**2).sum(), "loss")
    async with two.alice.context() as ctx:
        loss = await two.remote_bob.call("loss", apart)
        with pytest.raises(za.ConfigurationError, match="real scalar outputs"):
            await ctx.backward(loss)
        await ctx.backward(loss, start)
        assert torch.equal(ctx.gradients()[apart], some(alone.grad))


# --- gradients -----------------------------------------------------------------------------------


async def test_what_gets_no_gradient_costs_none(two: Pair) -> None:
    """torch: dense zeros travel for each result that the loss does not use, and its hooks run."""
    sent: list[list[bool]] = []
    hooked = 0

    @two.bob.handler(za.messages.PropagateGradientsRequest)
    async def look(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        sent.append([grad is not None for grad in request.grads])
        return await two.bob.default_handler(request, peer)

    def count(_: Tensor) -> None:
        nonlocal hooked
        hooked += 1

    @two.bob.register
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        unused = x * 3
        on_gradient(unused, count)
        return x * 2, unused

    x = near_leaf()
    async with two.alice.context() as ctx:
        used, _ = await two.remote_bob.call("both", x)
        await ctx.backward(used.sum())
        assert torch.equal(ctx.gradients()[x], torch.full((2, 3), 2.0))
    assert sent == [[True, False]]
    assert hooked == 0


async def test_gradients_that_come_again_after_their_pass_change_nothing(two: Pair) -> None:
    """torch: they begin a pass of their own, and are added once more."""
    kept: list[tuple[Any, Any]] = []

    @two.bob.handler(za.messages.PropagateGradientsRequest)
    async def keep(
        request: za.messages.PropagateGradientsRequest, peer: za.RemoteWorker
    ) -> za.messages.Reply:
        kept.append((request, peer))
        return await two.bob.default_handler(request, peer)

    x = near_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", x)
        await ctx.backward(y.sum(), retain_graph=True)
        ((request, peer),) = kept
        for _ in range(2):
            reply = await two.bob.default_handler(request, peer)
            assert isinstance(reply, za.messages.PropagateGradientsResponse)
        (context,) = two.bob.status()["contexts"]
        assert not [each for each in context["passes"] if each["state"] == "running"]
        assert torch.equal(await two.remote_bob.call("gradient"), x.detach().sum(0))
        await ctx.backward(y.sum())
        assert torch.equal(await two.remote_bob.call("gradient"), 2 * x.detach().sum(0))
        assert torch.equal(ctx.gradients()[x], 2 * SCALES.expand(2, 3))


async def test_passes_that_retain_the_graph_or_do_not_are_kept_apart(two: Pair) -> None:
    """torch: which of two passes at once says `retain_graph` is a matter of who came first."""
    x = near_leaf()
    two.bob.register(lambda x: (x**2).sum(), "loss")
    async with two.alice.context() as ctx:
        loss = await two.remote_bob.call("loss", x)
        flags = [True, True, False]
        await asyncio.gather(*(ctx.backward(loss, retain_graph=retain) for retain in flags))
        assert torch.equal(ctx.gradients()[x], 3 * 2 * x)
        with pytest.raises(za.RemoteError, match="through the graph a second time"):
            await ctx.backward(loss)
        assert torch.equal(ctx.gradients()[x], 3 * 2 * x)


async def test_a_worker_that_comes_late_takes_part(two: Pair) -> None:
    """torch: who joins a running group is told by everybody, or is not known to all of it."""
    x, w = near_leaf(), far_leaf()
    async with two.alice.context() as ctx:
        y = await two.remote_bob.call("scale", x)
        async with za.Worker("carol", listen=memory_endpoint()) as carol:
            offer(carol, w)
            to_carol = await two.alice.connect(carol.endpoints[0], timeout=DEADLINE)
            await ctx.backward((await to_carol.call("scale", y)).sum())
            assert torch.equal(ctx.gradients()[x], (SCALES**2).expand(2, 3))
            assert torch.equal(await to_carol.call("gradient"), (x.detach() * SCALES).sum(0))
        # It has left, and the context goes on.
        await ctx.backward((await two.remote_bob.call("scale", x)).sum())
        assert torch.equal(ctx.gradients()[x], (SCALES**2 + SCALES).expand(2, 3))


# --- what cannot travel --------------------------------------------------------------------------

ABORTS: Final = {
    "mkldnn": lambda: torch.ones(2).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ABORTS)
async def test_tensors_of_strange_layouts_are_refused_and_harm_nobody(two: Pair, kind: str) -> None:
    """torch: to send an MKLDNN or a nested tensor aborts the process."""
    two.bob.register(ABORTS[kind], "strange")
    with pytest.raises(za.SerializationError, match="cannot travel"):
        await two.remote_bob.call("scale", ABORTS[kind]())
    with pytest.raises(za.RemoteError, match="cannot travel") as caught:
        await two.remote_bob.call("strange")
    assert caught.value.worker == "bob"
    x = near_leaf()
    async with two.alice.context() as ctx:
        await ctx.backward((await two.remote_bob.call("scale", x)).sum())
        assert torch.equal(ctx.gradients()[x], SCALES.expand(2, 3))


class Malicious:
    """Makes whoever unpickles it write to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return os.write, (self._descriptor, b"was run")


async def test_what_arrives_is_never_run(two: Pair) -> None:
    """torch: what arrives is unpickled, and any function may be named, `eval` too."""
    two.bob.register(lambda value: value, "echo")
    near, far = socket.socketpair()
    with near, far:
        far.setblocking(False)
        malicious = Malicious(near.fileno())
        pickled = pickle.dumps(malicious)
        with pytest.raises(za.SerializationError):
            await two.remote_bob.call("echo", malicious)
        assert await two.remote_bob.call("echo", pickled) == pickled
        for name in ("eval", "builtins.eval", "exec", "torch.load", "os.system", "__import__"):
            with pytest.raises(za.NotRegistered):
                await two.remote_bob.call(name, "open('/dev/null')")
        with pytest.raises(BlockingIOError):
            far.recv(1)
        pickle.loads(pickled)  # noqa: S301  # it would have done so
        assert far.recv(10) == b"was run"


# --- state that lives elsewhere ------------------------------------------------------------------


class OwnSGD(torch.optim.SGD):
    """An optimizer of its user's own."""


async def test_a_step_applies_no_gradient_of_an_earlier_one(two: Pair) -> None:
    """torch: of a class beyond eight of its own, `step` applies what was left in `.grad`."""

    def loss(leaves: list[Tensor], with_both: bool) -> Tensor:
        return sum((leaf.square().sum() for leaf in leaves[: 1 + with_both]), torch.zeros(()))

    alone, apart = ([torch.ones(2, requires_grad=True) for _ in range(2)] for _ in range(2))
    two.bob.register(OwnSGD)
    two.bob.register(lambda: [two.bob.rref(each) for each in apart], "parameters")
    two.bob.register(lambda with_both: loss(apart, with_both), "loss")
    reference = OwnSGD(alone, lr=0.1, momentum=0.9)
    parameters = await two.remote_bob.call("parameters")
    optimizer = await za.DistributedOptimizer.create(OwnSGD, parameters, lr=0.1, momentum=0.9)
    for with_both in (True, False, True, False):
        reference.zero_grad()
        loss(alone, with_both).backward()  # type: ignore[no-untyped-call]
        reference.step()
        async with two.alice.context() as ctx:
            await ctx.backward(await two.remote_bob.call("loss", with_both))
            await optimizer.step(ctx)
        for mine, other in zip(alone, apart, strict=True):
            assert torch.equal(mine, other)


async def test_a_result_to_be_kept_that_comes_after_its_context_is_dropped(two: Pair) -> None:
    """torch: a `remote` that ends after its context made that anew, or hung."""
    begun, release = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    @two.bob.register
    def make(x: Tensor) -> Tensor:
        loop.call_soon_threadsafe(begun.set)
        assert release.wait(DEADLINE)
        return x * 2

    try:
        async with two.alice.context():
            making = asyncio.create_task(two.remote_bob.remote("make", near_leaf()))
            await asyncio.wait_for(begun.wait(), DEADLINE)
    finally:
        release.set()
    with pytest.raises(za.ContextError):
        await asyncio.wait_for(making, DEADLINE)
    await until(lambda: not any(two.bob.status()["rrefs"].values()))
    assert not two.alice.status()["contexts"]
    assert not two.bob.status()["contexts"]


# --- errors and interruptions --------------------------------------------------------------------


async def test_errors_of_calls_that_nobody_awaits_are_heard(two: Pair) -> None:
    """torch: the error of an `rpc_async` whose future is never waited for is lost."""

    @two.bob.register
    def fail() -> None:
        raise ZeroDivisionError("nobody waits for it")

    heard: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: heard.append(context))
    try:
        task = asyncio.create_task(two.remote_bob.call("fail"))
        await until(task.done)
        del task
        gc.collect()
    finally:
        loop.set_exception_handler(handler)
    (context,) = heard
    assert context["message"] == "Task exception was never retrieved"
    assert "nobody waits for it" in str(context["exception"])
    with pytest.warns(RuntimeWarning, match="'RemoteWorker.call' was never awaited"):
        two.remote_bob.call("fail")  # type: ignore[unused-coroutine]


def test_ctrl_c_ends_a_pass() -> None:
    """torch: neither Ctrl-C nor any timeout interrupts a `backward` that hangs."""
    released = threading.Event()

    async def program() -> None:
        loop = asyncio.get_running_loop()

        def interrupt(_: Tensor) -> None:
            loop.call_soon_threadsafe(signal.raise_signal, signal.SIGINT)
            assert released.wait(DEADLINE)

        async with connected() as pair:
            w = far_leaf()
            on_gradient(w, interrupt)
            offer(pair.bob, w)
            async with pair.alice.context() as ctx:
                y = await pair.remote_bob.call("scale", near_leaf())
                try:
                    await ctx.backward(y.sum(), timeout=None)
                finally:
                    assert not [each for each in ctx.gradients()]
                    released.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(program())
    finally:
        signal.signal(signal.SIGINT, before)


# --- what is left --------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Return what this process takes, without what its allocator keeps for the next tensors."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


async def test_passes_that_fail_hold_no_memory(two: Pair) -> None:
    """torch: six that failed half-way with tensors of 20 MB left some 440 MB behind."""
    x = torch.ones(20 * MIB // 4, requires_grad=True)

    @two.bob.register
    def fail(x: Tensor) -> Tensor:
        y = x.exp()
        on_gradient(y, raise_on_purpose)
        return y * 2

    async def failed_pass() -> None:
        async with two.alice.context() as ctx:
            y = await two.remote_bob.call("fail", x)
            with pytest.raises(za.RemoteError, match="on purpose"):
                await ctx.backward(y.sum())

    for _ in range(2):
        await failed_pass()
    before = resident_bytes()
    for _ in range(12):
        await failed_pass()
    # Torch's engine holds the last that failed in each thread: a few of them, not all.
    assert resident_bytes() - before < 6 * 20 * MIB


def raise_on_purpose(_: Tensor) -> None:
    raise ArithmeticError("on purpose")


async def test_contexts_one_after_another_hold_no_memory(two: Pair) -> None:
    """torch: workers of long trainings grow, and contexts stay whose cleanup was missed."""
    two.bob.register(lambda x: x.exp(), "exp")

    async def step() -> None:
        async with two.alice.context() as ctx:
            x = torch.zeros(MIB // 4, requires_grad=True)
            await ctx.backward((await two.remote_bob.call("exp", x)).sum())
            assert ctx.gradients()[x][0] == 1

    for _ in range(10):
        await step()
    before = resident_bytes()
    for _ in range(100):
        await step()
    assert resident_bytes() - before < 20 * MIB
    assert not two.alice.status()["contexts"]
    assert not two.bob.status()["contexts"]


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections(kind="inet")
    return {each.laddr for each in connections if each.status == psutil.CONN_LISTEN}


def threads() -> set[int]:
    return {thread.id for thread in psutil.Process().threads()}


async def test_an_idle_worker_has_its_port_and_few_threads() -> None:
    """torch: one has 17 listening ports and 36 threads, and does not say which."""
    others, threads_before = listening(), threads()
    async with za.Worker("bob", listen="tcp://127.0.0.1:0") as bob, za.Worker("alice") as alice:
        await alice.connect(bob.endpoints[0], timeout=DEADLINE)
        ((host, port),) = listening() - others
        assert bob.endpoints == [f"tcp://{host}:{port}"]
        assert len(threads() - threads_before) <= 6, "two of ZeroMQ's for each worker"
