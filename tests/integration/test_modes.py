"""The caller's modes of torch hold for what it calls, and for nothing else."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE, SCHEMES, Pair, connected, endpoint_of

pytestmark = pytest.mark.timeout(30)

Modes = tuple[bool, bool, str | None]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def modes() -> Modes:
    """Return the modes of torch that hold in this thread."""
    is_on = torch.is_autocast_enabled("cpu")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        str(torch.get_autocast_dtype("cpu")) if is_on else None,
    )


def all_modes() -> list[Any]:
    return [
        torch.enable_grad(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autocast("cpu", dtype=torch.float16),
    ]


async def test_a_plain_function_runs_under_its_callers_modes(pair: Pair) -> None:
    pair.bob.register(modes)
    plain = modes()
    for mode in all_modes():
        with mode:
            assert await pair.remote_bob.call("modes") == modes()
        assert await pair.remote_bob.call("modes") == plain
        assert modes() == plain


async def test_what_a_coroutine_computes_runs_under_its_callers_modes(pair: Pair) -> None:
    @pair.bob.register
    async def compute() -> list[Modes]:
        first = await za.compute(modes)
        await asyncio.sleep(0)
        return [first, await za.compute(modes)]

    for mode in all_modes():
        with mode:
            assert await pair.remote_bob.call("compute") == [modes(), modes()]


async def test_modes_go_on_with_nested_calls() -> None:
    async with connected() as pair, za.Worker("carol", listen="memory://modes-carol") as carol:
        carol.register(modes)
        remote_carol = await pair.bob.connect("memory://modes-carol")
        pair.bob.register(remote_carol.function("modes"), "pass_on")

        @pair.bob.register
        async def further() -> Modes:
            with torch.no_grad():
                found: Modes = await remote_carol.call("modes")
                return found

        for mode in all_modes():
            with mode:
                assert await pair.remote_bob.call("pass_on") == modes()
                with torch.no_grad():
                    expected = modes()
                assert await pair.remote_bob.call("further") == expected


async def test_calls_at_once_keep_their_modes_apart(pair: Pair) -> None:
    barrier = threading.Barrier(15)

    @pair.bob.register
    def meet() -> Modes:
        barrier.wait(DEADLINE)
        found = modes()
        barrier.wait(DEADLINE)
        return found

    calls = []
    expected = []
    for _ in range(3):
        for mode in all_modes():
            with mode:
                expected.append(modes())
                calls.append(asyncio.create_task(pair.remote_bob.call("meet")))
                await asyncio.sleep(0)  # the call is made in its first step
    assert await asyncio.gather(*calls) == expected


async def test_coroutines_at_once_keep_their_modes_apart(pair: Pair) -> None:
    everybody = asyncio.Barrier(15)

    @pair.bob.register
    async def meet() -> list[Modes]:
        await everybody.wait()
        first = await za.compute(modes)
        await everybody.wait()
        return [first, await za.compute(modes)]

    calls = []
    expected = []
    for _ in range(3):
        for mode in all_modes():
            with mode:
                expected.append([modes()] * 2)
                calls.append(asyncio.create_task(pair.remote_bob.call("meet")))
                await asyncio.sleep(0)
    assert await asyncio.gather(*calls) == expected
    assert modes() == (True, False, None)


async def test_modes_that_a_function_leaves_on_reach_nobody_else(pair: Pair) -> None:
    pair.bob.register(lambda: torch.set_grad_enabled(False) and None, "careless")
    pair.bob.register(modes)
    plain = modes()
    for _ in range(5):
        await pair.remote_bob.call("careless")
        assert await pair.remote_bob.call("modes") == plain


async def test_a_module_computes_as_it_does_here_under_autocast(pair: Pair) -> None:
    net = torch.nn.Linear(4, 4)
    pair.bob.register(net, "net")
    x = torch.ones(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        there, here = await pair.remote_bob.call("net", x), net(x)
    assert there.dtype == torch.bfloat16
    assert torch.equal(there, here)


async def test_inference_tensors_travel_and_arrive_as_plain_ones(pair: Pair) -> None:
    seen: list[torch.Tensor] = []

    @pair.bob.register
    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x * 2

    with torch.inference_mode():
        result = await pair.remote_bob.call("double", torch.ones(2))
    assert result.tolist() == [2, 2]
    assert not result.is_inference()
    assert not seen[0].is_inference()
    assert torch.autograd.grad(result.requires_grad_().sum(), result)[0].tolist() == [1, 1]


async def test_context_variables_of_a_caller_stay_with_it(pair: Pair) -> None:
    """Between workers, in one process or not, nothing goes along but what is on the wire."""
    pair.bob.register(variable.get, "get")

    @pair.bob.register
    async def set_and_get(value: str) -> list[str]:
        before = variable.get()
        variable.set(value)
        await asyncio.sleep(0)
        return [before, await za.compute(variable.get)]

    calls = (pair.remote_bob.call("set_and_get", str(n)) for n in range(10))
    assert await asyncio.gather(*calls) == [["unset", str(n)] for n in range(10)]
    variable.set("callers")
    assert await pair.remote_bob.call("get") == "unset"


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_context_variables_of_a_handler_that_connects_stay_with_it(
    scheme: str, tmp_path: Path
) -> None:
    async with (
        connected() as pair,
        za.Worker("carol", listen=endpoint_of(scheme, tmp_path)) as carol,
    ):
        carol_sees: list[za.RemoteWorker] = []
        pair.bob.register(variable.get, "get")

        @carol.register
        async def hello() -> None:
            peer = za.current_peer()
            assert peer is not None
            carol_sees.append(peer)

        @pair.bob.register
        async def connect() -> None:
            variable.set("of one call")
            remote_carol = await pair.bob.connect(carol.endpoints[0])
            await remote_carol.call("hello")

        await pair.remote_bob.call("connect")
        assert await carol_sees[0].call("get") == "unset"
        assert await pair.remote_bob.call("get") == "unset"


# --- whatever suspends where ---------------------------------------------------------------------


async def test_a_coroutine_runs_under_its_callers_modes_from_its_first_step(pair: Pair) -> None:
    @pair.bob.register
    async def look() -> list[Modes]:
        first = modes()
        await asyncio.sleep(0)
        return [first, modes()]

    for mode in all_modes():
        with mode:
            assert await pair.remote_bob.call("look") == [modes(), modes()]


async def test_a_coroutine_may_change_its_own_modes(pair: Pair) -> None:
    pair.bob.register(modes)

    @pair.bob.register
    async def change() -> bool:
        peer = za.current_peer()
        assert peer is not None
        before = modes()
        for mode in all_modes():
            with mode:
                expected = modes()
                await asyncio.sleep(0)
                assert modes() == expected
                assert await za.compute(modes) == expected
                assert await peer.call("modes") == expected
            await asyncio.sleep(0)
            assert modes() == before
        return True

    pair.alice.register(modes)
    for mode in all_modes():
        with mode:
            assert await pair.remote_bob.call("change")


async def test_modes_of_suspended_coroutines_reach_nobody_else(pair: Pair) -> None:
    """Each of them, and whoever started them, is suspended in a mode of its own."""
    everybody = asyncio.Barrier(2 * len(all_modes()))
    plain = modes()
    pair.bob.register(modes)

    @pair.bob.register
    async def suspend(index: int) -> list[Modes]:
        with all_modes()[index]:
            expected = modes()
            await everybody.wait()
            found = [modes(), await za.compute(modes)]
            await everybody.wait()
            return [expected, *found, modes()]

    @pair.bob.register
    async def keep() -> list[Modes]:
        expected = modes()
        await everybody.wait()
        found = [modes(), await za.compute(modes)]
        await everybody.wait()
        return [expected, *found, modes()]

    calls = []
    for index, mode in enumerate(all_modes()):
        calls.append(asyncio.create_task(pair.remote_bob.call("suspend", index)))
        with mode:
            calls.append(asyncio.create_task(pair.remote_bob.call("keep")))
            await asyncio.sleep(0)
    for found in await asyncio.gather(*calls):
        assert found == [found[0]] * 4
    assert modes() == plain
    assert await pair.remote_bob.call("modes") == plain


async def test_what_a_user_suspends_in_reaches_no_handler(pair: Pair) -> None:
    begin, seen = asyncio.Event(), asyncio.Event()
    plain = modes()

    @pair.bob.register
    async def look() -> list[Modes]:
        seen.set()
        await begin.wait()
        return [modes(), await za.compute(modes), modes()]

    calling = asyncio.create_task(pair.remote_bob.call("look"))
    await seen.wait()
    for mode in all_modes():
        with mode:
            before = modes()
            begin.set()
            assert await calling == [plain] * 3
            assert modes() == before
            begin.clear()
        seen.clear()
        calling = asyncio.create_task(pair.remote_bob.call("look"))
        await seen.wait()
    begin.set()
    await calling


async def test_a_casts_cache_is_not_another_coroutines(pair: Pair) -> None:
    """Autocast keeps what it has cast of a parameter while any region is open in the thread."""
    net = torch.nn.Linear(2, 2, bias=False)
    changed = asyncio.Event()
    computed = asyncio.Event()

    @pair.bob.register
    async def compute(x: torch.Tensor) -> torch.Tensor:
        net(x)
        computed.set()
        await changed.wait()
        after: torch.Tensor = net(x)
        return after

    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calling = asyncio.create_task(pair.remote_bob.call("compute", x))
        await asyncio.sleep(0)
    await computed.wait()
    with torch.no_grad():
        net.weight.fill_(3)
    changed.set()
    assert (await calling).tolist() == [[6, 6]]


async def test_modes_that_there_are_not_are_the_senders_error(pair: Pair) -> None:
    @pair.bob.register
    def never() -> None:
        raise AssertionError("ran under modes that there are not")

    for dtype in ("float3", "load", ""):
        asked = za.messages.Modes(autocast=(("cpu", dtype),))
        with pytest.raises(za.RemoteError, match="unknown dtype"):
            await pair.remote_bob.request(za.messages.ForwardRequest("never", modes=asked))
