"""Anomaly mode across processes: what goes wrong in a remote backward names the forward line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import set_detect_anomaly

import zmq_autograd as za
from tests.helpers import DEADLINE, Pair, connected
from tests.integration import anomalous

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
NAN = r"Function 'SqrtBackward0' returned nan values in its 0th output"
NAN_LINE = "return x.sqrt()  # where NaN come from"
RAISING_LINE = "return Raising.apply(x * 2)"


@contextmanager
def process(mode: str) -> Iterator[str]:
    """Run a worker in a process of its own; give its endpoint."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.anomalous", *([mode] if mode else [])],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as running:
        assert running.stdout is not None
        try:
            yield running.stdout.readline().strip()
        finally:
            running.kill()


@pytest.fixture
async def alice() -> AsyncIterator[za.Worker]:
    async with za.Worker("alice") as worker:
        for stage in anomalous.STAGES:
            worker.register(stage)
        yield worker


@pytest.fixture
async def bob(alice: za.Worker) -> AsyncIterator[za.RemoteWorker]:
    """A worker in another process, in which anomaly mode is off."""
    with process("") as endpoint:
        yield await alice.connect(endpoint, timeout=DEADLINE)


@pytest.fixture
async def near() -> AsyncIterator[Pair]:
    """Two workers in this process, and so under the same anomaly mode."""
    async with connected() as pair:
        for stage in anomalous.STAGES:
            pair.bob.register(stage)
        yield pair


def negative() -> Tensor:
    return torch.tensor([-1.0, 4.0], requires_grad=True)


async def backward(alice: za.Worker, bob: za.RemoteWorker, *call: Any) -> Tensor:
    """Call, run a pass, and return the gradient of the last argument."""
    x = call[-1]
    async with alice.context() as ctx:
        y = await bob.call(*call)
        await ctx.backward(y.sum())
        return ctx.gradients()[x]


# --- the caller's anomaly mode goes along --------------------------------------------------------


async def test_nan_in_a_remote_backward_name_the_forward_line(
    alice: za.Worker, bob: za.RemoteWorker
) -> None:
    for stage in ("root", "root_in_steps"):
        with set_detect_anomaly(True), pytest.raises(za.RemoteError, match=NAN) as caught:
            await backward(alice, bob, stage, negative())
        assert caught.value.worker == "bob"
        assert caught.value.type_name == "RuntimeError"
        text = str(caught.value)
        assert "Error detected in SqrtBackward0. Traceback of forward call that caused" in text
        assert NAN_LINE in text
        assert "anomalous.py" in text
        assert "zmq_autograd/node" not in text.split("Traceback of forward call")[1]


async def test_what_raises_in_a_remote_backward_names_the_forward_line(
    alice: za.Worker, bob: za.RemoteWorker
) -> None:
    for check_nan in (True, False):
        with (
            set_detect_anomaly(True, check_nan=check_nan),
            pytest.raises(za.RemoteError, match="no gradient of that") as caught,
        ):
            await backward(alice, bob, "raising", negative())
        assert caught.value.type_name == "ValueError"
        assert "Error detected in RaisingBackward" in str(caught.value)
        assert RAISING_LINE in str(caught.value)
    with set_detect_anomaly(True, check_nan=False):
        grad = await backward(alice, bob, "root", negative())
    assert grad.isnan().tolist() == [True, False]


async def test_a_pass_that_a_remote_function_runs_looks_for_nan_too(
    alice: za.Worker, bob: za.RemoteWorker
) -> None:
    with set_detect_anomaly(True):
        async with alice.context():
            with pytest.raises(za.RemoteError, match=NAN) as caught:
                await bob.call("own_pass", negative())
    assert NAN_LINE in str(caught.value)


async def test_a_pass_from_an_rref_looks_for_nan_too(
    alice: za.Worker, bob: za.RemoteWorker
) -> None:
    async with alice.context() as ctx:
        with set_detect_anomaly(True):
            rref = await bob.remote("rooted", negative())
            with pytest.raises(za.RemoteError, match=NAN) as caught:
                await ctx.backward(rref)
    assert NAN_LINE in str(caught.value)
    async with alice.context() as ctx:
        await ctx.backward(await bob.remote("rooted", negative()))


async def test_anomaly_mode_does_not_outlast_the_call_and_is_nobody_elses(
    alice: za.Worker, bob: za.RemoteWorker
) -> None:
    with set_detect_anomaly(True):
        during = await bob.call("switch")
        with pytest.raises(za.RemoteError, match=NAN):
            await backward(alice, bob, "root", negative())
    # Nodes take down where they are made; what others run there is not checked for NaN.
    assert during == [True, False]
    assert (await bob.call("switch"))[0] is False
    assert (await backward(alice, bob, "root", negative())).isnan().any()


async def test_what_goes_wrong_two_hops_away_names_the_forward_line(near: Pair) -> None:
    """Back on the caller's own worker, by way of the other one."""
    near.alice.register(anomalous.root)
    with set_detect_anomaly(True), pytest.raises(RuntimeError, match=NAN) as caught:
        await backward(near.alice, near.remote_bob, "pass_on", "root", negative())
    assert any(NAN_LINE in note for note in caught.value.__notes__)


async def test_without_anomaly_mode_in_the_forward_the_line_is_not_known(near: Pair) -> None:
    async with near.alice.context() as ctx:
        y = await near.remote_bob.call("root", negative())
        with set_detect_anomaly(True), pytest.raises(za.RemoteError, match=NAN) as caught:
            await ctx.backward(y.sum())
    text = str(caught.value)
    assert "not known where it was made: have anomaly mode on in the forward, too" in text
    assert NAN_LINE not in text


async def test_without_anomaly_mode_in_the_backward_nothing_is_looked_for(near: Pair) -> None:
    async with near.alice.context() as ctx:
        x = negative()
        with set_detect_anomaly(True):
            y = await near.remote_bob.call("root", x)
        await ctx.backward(y.sum())
        assert ctx.gradients()[x].isnan().tolist() == [True, False]


async def test_a_pass_without_nan_goes_through(near: Pair) -> None:
    x = torch.tensor([1.0, 4.0], requires_grad=True)
    with set_detect_anomaly(True):
        found = await backward(near.alice, near.remote_bob, "root", x)
    assert torch.equal(found, torch.tensor([0.5, 0.25]))


# --- the worker's own anomaly mode ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nan", "anomaly"])
async def test_a_worker_that_has_turned_it_on_says_where(alice: za.Worker, mode: str) -> None:
    with process(mode) as endpoint:
        bob = await alice.connect(endpoint, timeout=DEADLINE)
        if mode == "nan":
            with pytest.raises(za.RemoteError, match=NAN) as caught:
                await backward(alice, bob, "root", negative())
            assert NAN_LINE in str(caught.value)
        else:
            assert (await backward(alice, bob, "root", negative())).isnan().any()
        with pytest.raises(za.RemoteError, match="no gradient of that") as caught:
            await backward(alice, bob, "raising", negative())
        assert RAISING_LINE in str(caught.value)
        assert await bob.call("switch") == [True, mode == "nan"]


async def test_a_worker_that_keeps_its_tracebacks_keeps_this_too() -> None:
    async with connected(tracebacks=False) as pair:
        pair.bob.register(anomalous.root)
        with set_detect_anomaly(True), pytest.raises(za.RemoteError, match=NAN) as caught:
            await backward(pair.alice, pair.remote_bob, "root", negative())
    assert NAN_LINE not in str(caught.value)


async def test_what_goes_wrong_here_names_the_line_as_well() -> None:
    async with connected() as pair:
        pair.bob.register(lambda x: x * 2, "double")
        with set_detect_anomaly(True), pytest.raises(RuntimeError, match=NAN) as caught:
            await backward(pair.alice, pair.remote_bob, "double", anomalous.root(negative()))
    assert any(NAN_LINE in note for note in caught.value.__notes__)
