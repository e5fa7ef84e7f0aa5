"""A call under torch's profilers brings back what ran on the other side, on one time line."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from tests.integration.fleets import Fleet
from tests.integration.profiles import (
    PROFILES,
    events_of,
    is_within,
    named,
    only,
    product,
    x,
)
from zmq_autograd.node import defaults
from zmq_autograd.node.recorder import CallRecorder

pytestmark = pytest.mark.timeout(60)

HOURS = 5 * 3600 * 10**9


# --- one time line -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROFILES)
async def test_what_runs_there_lies_within_its_call(pair: Pair, kind: Any) -> None:
    with kind() as profile:
        with torch.profiler.record_function("before"):
            pass
        result = await pair.remote_bob.call("product", x)
        with torch.profiler.record_function("after"):
            pass
    assert torch.equal(result, product(x))
    before, after = only(profile, "before"), only(profile, "after")
    call = only(profile, "call#product(alice -> bob)")
    served = only(profile, "call#product(alice -> bob)#remote_op: product")
    mm = only(profile, "call#product(alice -> bob)#remote_op: aten::mm")
    assert before.time_range.end <= call.time_range.start
    assert call.time_range.end <= after.time_range.start
    assert is_within(mm, served)
    assert is_within(served, call)
    assert 0 < mm.time_range.elapsed_us() < served.time_range.elapsed_us()
    assert (call.is_remote, served.is_remote, mm.is_remote) == (False, True, True)
    assert (call.is_async, served.is_async, mm.is_async) == (True, True, False)


@pytest.mark.parametrize("off", [-HOURS, HOURS])
async def test_the_other_clock_may_be_hours_off(
    pair: Pair, off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = functools.partial(CallRecorder, clock=lambda: time.time_ns() + off)
    monkeypatch.setattr(defaults, "CallRecorder", recorder)
    with torch.profiler.profile() as profile:
        await pair.remote_bob.call("product", x)
    call = only(profile, "call#product(alice -> bob)")
    served = only(profile, "call#product(alice -> bob)#remote_op: product")
    mm = only(profile, "call#product(alice -> bob)#remote_op: aten::mm")
    assert is_within(served, call)
    assert is_within(mm, served)
    # Within, and not at an edge, where what lies outside is put.
    assert call.time_range.start < served.time_range.start
    assert served.time_range.end < call.time_range.end
    assert mm.time_range.elapsed_us() > 0


ELSEWHERE = f"""
import asyncio, sys, time
real = time.time_ns
time.time_ns = lambda: real() + {HOURS}
import torch, zmq_autograd as za

async def main():
    async with za.Worker("bob", listen="tcp://127.0.0.1:0") as bob:
        bob.register(torch.mm, "mm")
        print(bob.endpoints[0], flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


async def test_it_works_between_processes() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ELSEWHERE),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(2 * DEADLINE), za.Worker("alice") as alice:
            bob = await alice.connect((await process.stdout.readline()).decode().strip())
            with torch.profiler.profile(record_shapes=True) as profile:
                await bob.call("mm", x, x.T)
    finally:
        process.kill()
        await process.wait()
    call = only(profile, "call#mm(alice -> bob)")
    served = only(profile, "call#mm(alice -> bob)#remote_op: mm")
    mm = only(profile, "call#mm(alice -> bob)#remote_op: aten::mm")
    assert is_within(served, call)
    assert is_within(mm, served)
    assert mm.input_shapes == [[2, 3], [3, 2]]


async def test_a_chain_of_workers_tells_all(chain: Fleet) -> None:
    bob = await chain.way("alice", "bob")
    with torch.profiler.profile() as profile:
        await bob.call("middle", x)
    outer = "call#middle(alice -> bob)"
    inner = f"{outer}#remote_op: call#product(bob -> carol)"
    names = [
        outer,
        f"{outer}#remote_op: middle",
        inner,
        f"{inner}#remote_op: product",
        f"{inner}#remote_op: aten::mm",
    ]
    spans = [only(profile, name) for name in names]
    assert all(is_within(b, a) for a, b in itertools.pairwise(spans))
    relu = only(profile, f"{outer}#remote_op: aten::relu")
    assert is_within(relu, spans[1])
    assert relu.time_range.end <= spans[2].time_range.start


async def test_calls_at_once_have_their_own_events(pair: Pair) -> None:
    sizes = range(1, 9)
    with torch.profiler.profile(record_shapes=True) as profile:
        async with asyncio.TaskGroup() as group:
            for size in sizes:
                group.create_task(pair.remote_bob.call("product", torch.ones(size, 2)))
    found = named(profile, "call#product(alice -> bob)#remote_op: aten::mm")
    assert sorted(event.input_shapes for event in found) == [[[n, 2], [2, n]] for n in sizes]
    assert len(named(profile, "call#product(alice -> bob)")) == len(sizes)
    # None is taken for a part of another.
    assert all("aten::mm" not in event.cpu_parent.name for event in found if event.cpu_parent)


async def test_only_who_asks_is_told(pair: Pair) -> None:
    """A call that is not profiled, and runs at the same time as one that is, has no events."""
    request = functools.partial(za.messages.ForwardRequest, "product", [x])
    plain, profiled = await asyncio.gather(
        pair.remote_bob.request(request()),
        pair.remote_bob.request(request(profiler={"record_shapes": True})),
    )
    assert isinstance(plain, za.messages.ForwardResponse)
    assert isinstance(profiled, za.messages.ForwardResponse)
    assert plain.profiler_events is None
    assert "aten::mm" in profiled.profiler_events["texts"]


# --- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROFILES)
async def test_the_profile_s_options_hold_there(pair: Pair, kind: Any) -> None:
    options = {"record_shapes": True, "profile_memory": True, "with_flops": True}
    with kind(**options) as there:
        await pair.remote_bob.call("product", x)
    with kind(**options) as here:
        product(x)
    remote = only(there, "call#product(alice -> bob)#remote_op: aten::mm")
    local = only(here, "aten::mm")
    assert remote.input_shapes == local.input_shapes == [[2, 3], [3, 2]]
    assert remote.cpu_memory_usage == local.cpu_memory_usage == 16
    assert remote.flops == local.flops > 0
    with kind() as bare:
        await pair.remote_bob.call("product", x)
    remote = only(bare, "call#product(alice -> bob)#remote_op: aten::mm")
    assert (remote.input_shapes, remote.cpu_memory_usage, remote.flops) == ([], 0, 0)


@pytest.mark.parametrize("tracebacks", [True, False])
async def test_lines_of_code_are_told_as_tracebacks_are(tracebacks: bool) -> None:
    async with connected(tracebacks=tracebacks) as pair:
        pair.bob.register(product)
        with torch.profiler.profile(with_stack=True) as profile:
            await pair.remote_bob.call("product", x)
    stack = only(profile, "call#product(alice -> bob)#remote_op: aten::mm").stack
    assert any("profiles.py" in line for line in stack) == tracebacks


async def test_methods_of_what_lives_there_are_profiled(pair: Pair) -> None:
    pair.bob.register(torch.nn.Linear, "Linear", expose=("forward",))
    with torch.profiler.profile() as profile:
        rref = await pair.remote_bob.remote("Linear", 3, 2)
        await rref.call("forward", x)
    assert named(profile, "call#Linear(alice -> bob)#remote_op: aten::empty")
    assert named(profile, "call#forward(alice -> bob)#remote_op: aten::linear")


async def test_what_computes_here_is_in_it_too(pair: Pair) -> None:
    """Threads of this worker's own, which torch's profile would not see."""
    a = x.clone().requires_grad_()
    with torch.profiler.profile() as profile:
        await za.compute(torch.sigmoid, x)
        async with pair.alice.context() as context:
            loss = (await pair.remote_bob.call("product", a)).sum()
            await context.backward(loss)
            gradient = context.gradients()[a]
    b = x.clone().requires_grad_()
    torch.autograd.backward(product(b).sum())
    assert b.grad is not None
    assert torch.equal(gradient, b.grad)
    assert not only(profile, "aten::sigmoid").is_remote
    assert any("RecvRpcBackward" in event.name for event in events_of(profile))


def test_threads_without_async_are_profiled(pair_of_threads: Callable[..., Any]) -> None:
    remote = pair_of_threads()
    for kind in PROFILES:
        with kind() as profile:
            remote.call("product", x)
        call = only(profile, "call#product(alice -> bob)")
        mm = only(profile, "call#product(alice -> bob)#remote_op: aten::mm")
        assert is_within(mm, call)


@pytest.fixture
def pair_of_threads() -> Any:
    """Start two workers on the background thread's loop; return what alice holds of bob."""
    with za.blocking.Worker("bob", listen="tcp://127.0.0.1:0") as bob:
        bob.register(product)
        with za.blocking.Worker("alice") as alice:
            yield lambda: alice.connect(bob.endpoints[0], timeout=DEADLINE)
    za.blocking.current_portal().close()


# --- nothing else changes ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PROFILES)
async def test_an_error_loses_nothing_of_this_side(pair: Pair, kind: Any) -> None:
    pair.bob.register(torch.mm, "mm")
    with kind() as profile:
        torch.relu(x)
        with pytest.raises(za.RemoteError):
            await pair.remote_bob.call("mm", x, x)
        await pair.remote_bob.call("product", x)
        torch.sigmoid(x)
    assert (
        only(profile, "aten::relu").time_range.end
        <= only(profile, "call#mm(alice -> bob)").time_range.start
    )
    assert named(profile, "aten::sigmoid")
    assert named(profile, "call#product(alice -> bob)#remote_op: aten::mm")


async def test_no_thread_is_left_with_a_profiler(pair: Pair) -> None:
    pair.bob.register(torch.mm, "mm")
    pair.bob.register(torch._C._autograd._profiler_enabled, "is_profiled")
    with torch.profiler.profile():
        with pytest.raises(za.RemoteError):
            await pair.remote_bob.call("mm", x, x)
        assert await pair.remote_bob.call("is_profiled")
    assert not await pair.remote_bob.call("is_profiled")


@pytest.mark.parametrize("kind", PROFILES)
async def test_a_profile_without_calls_is_left_alone(pair: Pair, kind: Any) -> None:
    with kind() as profile:
        torch.relu(x)
        await pair.remote_bob.request(za.messages.Status())
    inner = getattr(profile, "profiler", profile)
    assert type(inner) in PROFILES
    assert not {"_parse_kineto_results", "export_chrome_trace", "_recorders"} & vars(inner).keys()


async def test_profiles_in_turn_have_their_own_calls(pair: Pair) -> None:
    for kind in [*PROFILES, *PROFILES]:
        with kind() as profile:
            await pair.remote_bob.call("product", x)
        assert len(named(profile, "call#product(alice -> bob)")) == 1
        await pair.remote_bob.call("product", x)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize("accumulates", [False, True])
async def test_each_cycle_of_a_schedule_has_its_own_calls(pair: Pair, accumulates: bool) -> None:
    found: list[list[list[int]]] = []

    def ready(profile: Any) -> None:
        name = "call#product(alice -> bob)#remote_op: aten::mm"
        found.append([event.input_shapes[0] for event in named(profile, name)])

    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=2),
        on_trace_ready=ready,
        record_shapes=True,
        acc_events=accumulates,
    ) as profile:
        for step in range(8):
            await pair.remote_bob.call("product", torch.ones(1, step + 1))
            profile.step()
    first, second = [[1, 3], [1, 4]], [[1, 7], [1, 8]]
    assert found[0] == first
    assert sorted(found[1]) == (first + second if accumulates else second)


async def test_a_reply_after_the_profile_s_end_is_in_no_other(pair: Pair) -> None:
    may_go = asyncio.Event()

    async def slow() -> None:
        await may_go.wait()

    pair.bob.register(slow)
    with torch.profiler.profile() as first:
        call = asyncio.create_task(pair.remote_bob.call("slow"))
        await pair.remote_bob.call("product", x)
    with torch.profiler.profile() as second:
        may_go.set()
        await call
        await pair.remote_bob.call("product", x)
    assert not named(second, "call#slow(alice -> bob)")
    assert named(second, "call#product(alice -> bob)")
    assert named(first, "call#product(alice -> bob)")


@pytest.mark.parametrize("kind", PROFILES[1:])  # the first holds itself, with or without calls
async def test_a_profile_goes_with_its_last_holder(pair: Pair, kind: Any) -> None:
    with kind() as profile:
        await pair.remote_bob.call("product", x)
    events_of(profile)
    gone = weakref.ref(profile)
    gc.disable()
    try:
        del profile
        assert gone() is None
    finally:
        gc.enable()


async def test_without_a_profiler_nothing_is_asked(pair: Pair) -> None:
    asked: list[Any] = []

    @pair.bob.handler(za.messages.ForwardRequest)
    async def on_call(request: Any, peer: Any) -> Any:
        asked.append(request.profiler)
        return await pair.bob.default_handler(request, peer)

    await pair.remote_bob.call("product", x)
    with torch.profiler.profile(record_shapes=True) as profile:
        await pair.remote_bob.call("product", x)
    await pair.remote_bob.call("product", x)
    wanted = {"profile_memory": False, "with_stack": False, "with_flops": False}
    assert asked == [None, {"record_shapes": True, **wanted}, None]
    assert named(profile, "call#product(alice -> bob)#remote_op: aten::mm")
