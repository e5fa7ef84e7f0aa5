"""Calls and RRefs of programs on torch's RPC, moved over."""

from __future__ import annotations

import pickle
import threading
import time
from typing import Any

import pytest
import torch

from tests.helpers import DEADLINE
from tests.integration import compat_functions as program
from zmq_autograd.compat import autograd, rpc
from zmq_autograd.compat.nn import RemoteModule
from zmq_autograd.compat.rpc import state
from zmq_autograd.node.codecs import Codecs

MODES = ["sync", "async", "remote"]


def call(mode: str, to: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call in one of the three ways."""
    if mode == "sync":
        return rpc.rpc_sync(to, func, args=args, kwargs=kwargs)
    if mode == "async":
        return rpc.rpc_async(to, func, args=args, kwargs=kwargs).wait()
    rref = rpc.remote(to, func, args=args, kwargs=kwargs)
    # On its owner an RRef gives the value itself: have another call ask for it.
    return rpc.rpc_sync(to, program.value_of, args=(rref,))


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_functions_classes_and_operators_are_called(me: str, mode: str) -> None:
    assert call(mode, me, program.add, 1, y=2) == 3
    assert torch.equal(call(mode, me, torch.add, torch.ones(2), 1), torch.full((2,), 2.0))
    assert call(mode, 0, program.Counter.half, 3) == 1.5
    assert call(mode, rpc.get_worker_info(), min, 4, 3) == 3
    assert call(mode, me, program.add, (1,), (2,)) == (1, 2)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_function_raises_is_raised_by_its_type(me: str, mode: str) -> None:
    with pytest.raises(ValueError, match="no luck") as raised:
        call(mode, me, program.fail, "no\nluck\\n, no luck")
    assert str(raised.value).startswith("On WorkerInfo(id=0, name=me):\nValueError: no\nluck")
    assert "compat_functions.py" in str(raised.value)
    with pytest.raises(RuntimeError, match=r"Original exception on remote side was.*\n.*bad luck"):
        call(mode, me, program.fail_unluckily)
    with pytest.raises(RuntimeError, match="size of tensor"):
        call(mode, me, torch.add, torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match="positional argument"):
        call(mode, me, program.fail)
    with pytest.raises(RuntimeError, match="failed to match any schema"):
        call(mode, me, torch.add)


@pytest.mark.parametrize("mode", MODES)
def test_a_function_that_nobody_allowed_does_not_run(
    me: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trap() -> None:
        program.ran.append("trap")

    monkeypatch.setattr(trap, "__qualname__", "call")  # the name of a function that is there
    with pytest.raises(RuntimeError, match="may be called here"):
        call(mode, me, trap)
    assert "trap" not in program.ran
    with pytest.raises(RuntimeError, match="built-in"):
        call(mode, me, torch._C._set_grad_enabled, False)
    with pytest.raises(RuntimeError, match="may be called here"):
        call(mode, me, torch.load, "/etc/passwd")


@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_travel_is_refused_before_anything_is_sent(me: str, mode: str) -> None:
    agent = rpc._get_current_rpc_agent()
    before = agent.portal.run(agent.idle, DEADLINE)
    refused: Any
    for refused in (lambda: 1, threading.Lock(), program.Counter(1), torch.futures.Future()):
        with pytest.raises(RuntimeError):
            call(mode, me, program.add, refused, 1)
    with pytest.raises(RuntimeError, match="top level of a module"):
        call(mode, me, lambda: 1)
    assert agent.portal.run(agent.idle, DEADLINE) == before
    with pytest.raises(RuntimeError, match=r"Can not pickle torch\.futures\.Future"):
        call(mode, me, program.value_of, torch.futures.Future())


def test_a_result_that_cannot_travel_is_an_error_of_the_call(me: str) -> None:
    with pytest.raises(RuntimeError, match=r"rpc\.codec"):
        rpc.rpc_sync(me, program.Counter, args=(1,))


def test_objects_go_by_a_codec(me: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.values, "_codecs", Codecs(me))
    rpc.codec(program.Counter, pack=lambda c: c.count, unpack=program.Counter)
    assert rpc.rpc_sync(me, program.Counter, args=(3,)).count == 3
    assert rpc.rpc_sync(me, program.Counter(3).add, args=(4,)) == 7
    # As a notebook's cell that is run again does, maybe with another class of that name.
    rpc.codec(program.Counter, pack=lambda c: c.count, unpack=lambda count: program.Counter(-count))
    assert rpc.rpc_sync(me, program.Counter, args=(3,)).count == -3


def test_workers_that_there_are_not(me: str) -> None:
    for unknown in ("nobody", 7, -1):
        with pytest.raises(RuntimeError, match="could not find destination"):
            rpc.rpc_sync(unknown, program.add, args=(1, 2))
    with pytest.raises(ValueError, match="Cannot get WorkerInfo"):
        rpc.rpc_sync(0.5, program.add, args=(1, 2))  # type: ignore[arg-type]


def test_nothing_is_pickled(me: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickled")

    for name in ("dumps", "loads", "dump", "load", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    rref = rpc.remote(me, program.Counter, args=(1,))
    assert rref.rpc_sync().add(2) == 3
    with pytest.raises(ValueError, match="text"):
        rpc.rpc_sync(me, program.fail, args=("text",))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="Can not pickle rref"):
        pickle.dumps(rref)


def test_a_call_that_takes_too_long_ends(me: str) -> None:
    with pytest.raises(RuntimeError, match="RPC ran for more than set timeout"):
        rpc.rpc_sync(me, program.wait, timeout=0.05)
    with pytest.raises(RuntimeError, match="RPC ran for more than set timeout"):
        rpc.rpc_async(me, program.wait, timeout=0.05).wait()
    rref = rpc.remote(me, program.wait, timeout=0.05)
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        rref._get_future().wait()
    with pytest.raises(RuntimeError, match="RRef creation"):
        rref.to_here()
    rpc._set_rpc_timeout(0.05)
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        rpc.rpc_sync(me, program.wait)
    program.released.set()
    assert rpc.rpc_sync(me, program.wait, timeout=0)


def test_what_is_left_of_the_time_is_left_for_the_fetch(
    me: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rref = rpc.remote(me, program.wait, args=(0.1,))
    given: list[float] = []
    agent = rpc._get_current_rpc_agent()
    monkeypatch.setattr(agent, "call", lambda asked: given.append(asked.seconds))
    monkeypatch.setattr(rref, "is_owner", lambda: False)
    rref.to_here(timeout=DEADLINE)
    assert 0 < given[0] < DEADLINE - 0.05
    slow = rpc.remote(me, program.wait)
    monkeypatch.setattr(slow, "is_owner", lambda: False)
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        slow.to_here(timeout=0.05)


def test_callbacks_may_call_and_wait(me: str) -> None:
    def again(done: torch.futures.Future[int]) -> int:
        result: int = rpc.rpc_async(me, program.add, args=(done.wait(), 1)).then(once_more).wait()
        return result

    def once_more(done: torch.futures.Future[int]) -> int:
        result: int = rpc.rpc_sync(me, program.add, args=(done.wait(), 10))
        return result

    futures = [rpc.rpc_async(me, program.add, args=(i, i)).then(again) for i in range(20)]
    assert torch.futures.wait_all(futures) == [2 * i + 11 for i in range(20)]


@pytest.mark.parametrize("mode", MODES)
def test_functions_that_answer_later(me: str, mode: str) -> None:
    x = torch.ones(2)
    assert torch.equal(call(mode, me, program.add_later, me, x, x), 4 * x)
    with pytest.raises(RuntimeError, match=r"must return a torch\.futures\.Future"):
        call(mode, me, program.no_future)


def test_a_block_waits_for_all_that_was_called_in_it(me: str) -> None:
    rref = rpc.remote(me, program.Counter, args=(1,))
    with rpc.api._wait_all():
        futures = [
            rpc.rpc_async(me, program.wait, args=(0.1,)),
            rref.rpc_async().add_later(me, 1),
            RemoteModule(me, program.Net, (0,)).forward_async(torch.ones(3)),
        ]
    assert all(future.done() for future in futures)
    with pytest.raises(AttributeError, match="missing"), rpc.api._wait_all():
        rref.rpc_async().missing()


# --- RRefs ---------------------------------------------------------------------------------------


def test_methods_are_called_where_the_value_is(me: str) -> None:
    rref = rpc.remote(me, program.Counter, args=(1,))
    assert rref.rpc_sync().add(2) == 3
    assert rref.rpc_async().add(2).wait() == 5
    assert rref.remote().add(2).to_here() == 7
    assert rref.rpc_sync().half(3) == 1.5
    assert rref.rpc_sync().add_later(me, 1) == 15
    assert rref.rpc_async().add_later(me, 1).wait() == 31
    assert torch.equal(rpc.RRef(torch.ones(2)).rpc_sync().add(1), torch.full((2,), 2.0))
    for missing in (rref.rpc_sync().missing, rref.remote().missing):
        with pytest.raises(AttributeError, match="has no attribute 'missing'"):
            missing()
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        rref.rpc_async().missing().wait()
    with pytest.raises(RuntimeError, match="may not be called"):
        rpc.RRef(torch.ones(2)).rpc_sync().untyped_storage()
    assert rref._get_type() is program.Counter


def test_what_may_not_be_called_says_what_to_do(me: str) -> None:
    with pytest.raises(RuntimeError, match=r"nn.modules.module.Module may not .*own function"):
        rpc.remote(me, program.Net, args=(0,)).rpc_sync().state_dict()
    for function in (time.sleep, torch.manual_seed):
        with pytest.raises(RuntimeError, match="own function"):
            rpc.rpc_sync(me, function, args=(1,))
    with pytest.raises(RuntimeError, match="own function"):
        rpc.RRef([1]).rpc_sync().append(2)
    with pytest.raises(RuntimeError, match="allow its module"):
        rpc.rpc_sync(me, test_what_may_not_be_called_says_what_to_do)


def test_an_rref_to_a_value_of_ones_own(me: str) -> None:
    value = object()
    rref = rpc.RRef(value)
    assert rref.is_owner()
    assert rref.confirmed_by_owner()
    assert rref.local_value() is value
    assert rref.to_here() is value
    assert rref.owner() == rpc.get_worker_info()
    assert rref.owner_name() == me
    assert str(rref).startswith("OwnerRRef(GloballyUniqueId(created_on=0")
    assert rpc._get_debug_info()["num_owner_rrefs"] == "0"  # nobody else has it
    assert rpc.rpc_sync(me, program.owner_of, args=(rref,)) == me
    until = time.monotonic() + DEADLINE
    while rpc._get_debug_info()["num_owner_rrefs"] != "0":  # nobody else has it any more
        assert time.monotonic() < until
        time.sleep(0.001)


def test_the_error_of_a_call_is_raised_where_its_rref_is_used(me: str) -> None:
    rref = rpc.remote(me, program.fail, args=("text",))
    for use in (rref.to_here, rref.local_value, rref._get_type, rref._get_future().wait):
        with pytest.raises(ValueError, match="text"):
            use()
    with pytest.raises(ValueError, match="text"):
        rpc.rpc_sync(me, program.value_of, args=(rref,))
    assert not rref.confirmed_by_owner()


def test_a_pass_from_an_rref(me: str) -> None:
    t = torch.rand(3, requires_grad=True)
    rpc.RRef((2 * t).sum()).backward()
    assert torch.equal(t.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
    with autograd.context() as context_id:
        rpc.RRef(rpc.rpc_sync(me, torch.mul, args=(t, t)).sum()).backward(context_id)
        assert torch.equal(autograd.get_gradients(context_id)[t], 2 * t)
    with pytest.raises(RuntimeError, match="RRef should contain a tensor"):
        rpc.RRef("text").backward()
    with pytest.raises(RuntimeError, match="Could not find autograd context with id: 100"):
        rpc.RRef(t.sum()).backward(100)
