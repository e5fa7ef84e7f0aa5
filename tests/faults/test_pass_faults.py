"""Workers that die or freeze before and during a pass: it ends in time, by their name, or exactly.

What a pass gives after a worker was lost is what one process gives, if it needs nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.faults.learners import Learner, contexts_of, learners, until_none_left
from tests.faults.vitals import say

pytestmark = pytest.mark.timeout(90)

DEAD_SECONDS: Final = 3.0
"""Within which a killed worker is noticed, at defaults."""

TIMEOUT: Final = 1.0
"""What a pass that cannot end is given."""

TELLING_SECONDS: Final = 1.5
"""Within which it ends after that: others have a second to tell what they waited for."""

CLEANUP_SECONDS: Final = 2.5
"""Within which a context is left, whatever the others do."""

W: Final = torch.tensor([1.0, 2.0, 3.0])
"""What each learner scales by."""


@dataclass(frozen=True)
class Chain:
    """Alice, here, and learners: each calls the one after it.

    Attributes:
        alice: the worker here.
        processes: the learners.
        remotes: what alice has of each of them; a context goes by way of the first alone.
    """

    alice: za.Worker
    processes: list[Learner]
    remotes: list[za.RemoteWorker]

    async def dead(self, index: int) -> None:
        """Kill a learner and wait until all the others know it."""
        self.processes[index].kill()
        async with asyncio.timeout(DEAD_SECONDS):
            while self.remotes[index].is_connected:
                await asyncio.sleep(0.001)
            for remote in (each for each in self.remotes if each.is_connected):
                while await self._knows(remote, self.processes[index].name):
                    await asyncio.sleep(0.001)

    async def _knows(self, remote: za.RemoteWorker, name: str) -> bool:
        reply = await remote.request(za.messages.Status())
        assert isinstance(reply, za.messages.StatusResponse)
        return name in reply.status["peers"]

    async def check_no_passes(self) -> None:
        """Raise AssertionError if a pass is left anywhere."""
        everywhere = [self.alice.status()["contexts"]]
        everywhere += [await contexts_of(each) for each in self.remotes if each.is_connected]
        assert all(context["passes"] == [] for contexts in everywhere for context in contexts)


@asynccontextmanager
async def chain(processes: list[Learner]) -> AsyncIterator[Chain]:
    async with za.Worker("alice", drain=1.0) as alice:
        yield Chain(alice, processes, [await alice.connect(each.endpoint) for each in processes])


@asynccontextmanager
async def mortal_chain(folder: Path, *names: str) -> AsyncIterator[Chain]:
    """Give a chain of learners of one's own, to be killed."""
    with learners(folder, *names) as processes:
        async with chain(processes) as each:
            yield each


def ones() -> Tensor:
    return torch.ones(3, requires_grad=True)


# --- lost before a pass --------------------------------------------------------------------------


async def test_a_worker_that_is_lost_before_a_pass_that_needs_it(tmp_path: Path) -> None:
    """Killed with its result in use, directly and behind another worker."""
    async with mortal_chain(tmp_path, "bob", "carol") as each:
        bob = each.remotes[0]
        x = ones()
        async with each.alice.context() as ctx:
            y = await bob.call("through", x, 0, "scale")
            await each.dead(1)
            with pytest.raises(za.WorkerLost) as caught:
                await ctx.backward(y.sum())
            assert caught.value.name == "carol"
            assert caught.value.incarnation == each.processes[1].incarnation
            assert caught.value.path == ("bob",)
            assert not ctx.gradients()
            assert await bob.call("gradient") is None
            await each.check_no_passes()
        async with each.alice.context() as ctx:
            y = await bob.call("scale", x)
            await each.dead(0)
            with pytest.raises(za.WorkerLost) as caught:
                await ctx.backward(y.sum())
            assert caught.value.name == "bob"
            assert caught.value.incarnation == each.processes[0].incarnation
            assert not ctx.gradients()
            await each.check_no_passes()


async def test_a_worker_that_is_lost_before_a_pass_that_does_not_need_it(tmp_path: Path) -> None:
    async with mortal_chain(tmp_path, "bob", "carol") as each:
        bob, carol = each.remotes
        x = ones()
        async with each.alice.context() as ctx:
            y = await bob.call("in_vain", x)
            await carol.call("scale", x)
            await each.dead(1)
            await ctx.backward(y.sum())
            assert torch.equal(ctx.gradients()[x], W)
            assert torch.equal(await bob.call("gradient"), torch.ones(3))
            await bob.call("scale", x)
            z = x * 2
            await each.dead(0)
            await ctx.backward(z.sum())
            assert torch.equal(ctx.gradients()[x], W + 2)


# --- lost during a pass --------------------------------------------------------------------------


async def test_a_worker_that_is_lost_during_a_pass(tmp_path: Path) -> None:
    """Killed three hops away while it computes; then the first hop, while the second computes."""
    async with mortal_chain(tmp_path, "bob", "carol", "dave") as each:
        bob, carol, dave = each.processes
        x = ones()
        async with each.alice.context() as ctx:
            y = await each.remotes[0].call("through", x, 1, "hold_up_backward")
            backward = asyncio.create_task(ctx.backward(y.sum()))
            await dave.in_backward()
            struck = time.monotonic()
            dave.kill()
            with pytest.raises(za.WorkerLost) as caught:
                await backward
            seconds = time.monotonic() - struck
            say(f"the pass ended {seconds:.3f} s after the worker was killed")
            assert seconds < DEAD_SECONDS
            assert (caught.value.name, caught.value.incarnation) == ("dave", dave.incarnation)
            assert caught.value.path == ("bob", "carol")
            assert not ctx.gradients()
            assert await each.remotes[0].call("gradient") is None
            assert await each.remotes[0].call("gradient_behind", 0) is None
            await each.check_no_passes()
        await until_none_left(each.remotes[:2])
        async with each.alice.context() as ctx:
            y = await each.remotes[0].call("through", x, 0, "hold_up_backward")
            backward = asyncio.create_task(ctx.backward(y.sum()))
            await carol.in_backward()
            bob.kill()
            with pytest.raises(za.WorkerLost) as caught:
                await backward
            assert caught.value.name == "bob"
            # Nobody is left who could tell it of the context's end.
            await until_none_left([each.remotes[1]])
            await each.check_no_passes()


async def test_a_worker_that_freezes(tmp_path: Path) -> None:
    async with mortal_chain(tmp_path, "bob", "carol") as each:
        await check_freezing_in_a_pass(each)
        await check_freezing_with_a_call(each)


async def check_freezing_in_a_pass(each: Chain) -> None:
    """Two hops away: alice learns its name, and what was awaited from it by its numbers."""
    bob = each.remotes[0]
    carol = each.processes[1]
    x = ones()
    async with each.alice.context() as ctx:
        # What torch loads in the first pass takes longer than this one may.
        await ctx.backward((await bob.call("through", x, 0, "scale")).sum())
        before = ctx.gradients()[x]
        y = await bob.call("through", x, 0, "hold_up_backward")
        started = time.monotonic()
        backward = asyncio.create_task(ctx.backward(y.sum(), timeout=TIMEOUT))
        await carol.in_backward()
        carol.freeze()
        assert not backward.done()
        with pytest.raises(za.DeadlineExceeded) as caught:
            await backward
        seconds = time.monotonic() - started
        say(f"a pass that was given {TIMEOUT} s ended after {seconds:.3f} s")
        assert TIMEOUT < seconds < TIMEOUT + TELLING_SECONDS
        assert {"bob", "carol"} <= set(caught.value.workers)
        assert caught.value.message_ids
        assert torch.equal(ctx.gradients()[x], before)
        assert torch.equal(await bob.call("gradient"), 2 * W**2)
        started = time.monotonic()
    assert time.monotonic() - started < CLEANUP_SECONDS
    carol.thaw()
    await each.remotes[1].call("go_on")
    await until_none_left(each.remotes)


async def check_freezing_with_a_call(each: Chain) -> None:
    """What it was told meanwhile comes all at once: the call, that it is over, the cleanup."""
    bob = each.remotes[0]
    async with each.alice.context():
        await bob.call("scale", ones())
        each.processes[0].freeze()
        with pytest.raises(za.DeadlineExceeded):
            await bob.call("scale", ones(), timeout=0.05)
        started = time.monotonic()
    assert time.monotonic() - started < CLEANUP_SECONDS
    each.processes[0].thaw()
    await until_none_left([bob])


# --- errors, and the death of an initiator -------------------------------------------------------


async def test_an_error_far_away_and_the_death_of_an_initiator(tmp_path: Path) -> None:
    async with mortal_chain(tmp_path, "bob", "carol", "dave") as each:
        await check_an_error_is_told_everywhere(each)
        await check_an_initiator_dies(each)


async def check_an_error_is_told_everywhere(each: Chain) -> None:
    bob = each.remotes[0]
    x = ones()
    async with each.alice.context() as ctx:
        y = await bob.call("through", x, 1, "fail_in_backward")
        with pytest.raises(za.RemoteError) as caught:
            await ctx.backward(y.sum())
        error = caught.value
        assert (error.worker, error.type_name) == ("dave", "ZeroDivisionError")
        assert error.message == "in backward"
        assert error.path == ("bob", "carol", "dave")
        assert not ctx.gradients()
        assert await bob.call("gradient") is None
        assert await bob.call("gradient_behind", 0) is None
        assert await bob.call("gradient_behind", 1) is None
        await each.check_no_passes()
    for remote in each.remotes:
        assert not await contexts_of(remote)
    async with each.alice.context() as ctx:
        await ctx.backward((await bob.call("through", x, 1, "scale")).sum())
        assert torch.equal(ctx.gradients()[x], W**5)
        assert torch.equal(await bob.call("gradient_behind", 1), W**4)


async def check_an_initiator_dies(each: Chain) -> None:
    """The others, the last of whom never heard of it, drop what they have of its context."""
    bob, _, dave = each.processes
    training = asyncio.create_task(each.remotes[0].call("train", "hold_up_backward", 0))
    await dave.in_backward()
    assert [len(await contexts_of(remote)) for remote in each.remotes] == [1, 1, 1]
    struck = time.monotonic()
    bob.kill()
    with pytest.raises(za.WorkerLost):
        await training
    await until_none_left(each.remotes[1:])
    seconds = time.monotonic() - struck
    say(f"the others had dropped the context {seconds:.3f} s after its owner was killed")
    assert seconds < DEAD_SECONDS
    await each.remotes[2].call("go_on")
    x = ones()
    async with each.alice.context() as ctx:
        await ctx.backward((await each.remotes[1].call("through", x, 0, "scale")).sum())
        assert torch.equal(ctx.gradients()[x], W**3)
