"""Programs on torch's RPC, moved over: one worker that calls itself, which takes the same way."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._C._distributed_c10d import HashStore

from tests.helpers import DEADLINE
from tests.integration import compat_functions as program
from zmq_autograd import blocking
from zmq_autograd.compat import autograd, rpc
from zmq_autograd.compat.nn import RemoteModule
from zmq_autograd.compat.optim import DistributedOptimizer
from zmq_autograd.compat.rpc import state
from zmq_autograd.compat.rpc.joining import endpoint_for
from zmq_autograd.errors import PartialStepError
from zmq_autograd.node.codecs import Codecs
from zmq_autograd.wire import Limits

MODES = ["sync", "async", "remote"]


@pytest.fixture
def options(tmp_path: Path) -> rpc.TensorPipeRpcBackendOptions:
    """Where to meet."""
    return rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{tmp_path}/store", rpc_timeout=DEADLINE
    )


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Leave, and close the background loop, after each test, whatever became of it."""
    program.released.clear()
    yield
    program.released.set()
    if rpc._is_current_rpc_agent_set():
        rpc.shutdown(graceful=False)
    blocking.current_portal().close()


@pytest.fixture
def me(options: rpc.TensorPipeRpcBackendOptions) -> str:
    """Take part, alone, and allow the program's module; return this worker's name."""
    rpc.allow_module(program.__name__)
    rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
    return "me"


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
    with pytest.raises(ValueError, match=r"a codec for '.*:Counter'"):
        rpc.codec(program.Counter, pack=str, unpack=int)


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


# --- gradients -----------------------------------------------------------------------------------


def test_gradients_are_those_of_one_process(me: str) -> None:
    x = torch.rand(3, 3, requires_grad=True)
    alone_x = x.detach().clone().requires_grad_()
    alone_w = program.WEIGHT.detach().clone().requires_grad_()
    (torch.tanh(alone_x @ alone_w) * alone_x).sum().backward()  # type: ignore[no-untyped-call]
    with autograd.context() as context_id:
        loss = rpc.rpc_sync(me, program.nested, args=(me, x)).sum()
        autograd.backward(context_id, [loss])
        gradients = autograd.get_gradients(context_id)
        there = rpc.rpc_sync(me, program.gradients_here, args=(context_id,))
    torch.testing.assert_close(gradients[x], alone_x.grad)
    torch.testing.assert_close(there[0], alone_w.grad)
    assert x.grad is None


def test_the_first_call_by_an_rref_is_in_the_callers_context(me: str) -> None:
    rref = rpc.remote(me, program.Net, args=(0,))
    (x,) = inputs(1)
    alone_x, alone_net = x.clone().requires_grad_(), program.Net(0)
    alone_net(alone_x).sum().backward()
    with autograd.context() as context_id:
        x.requires_grad_()
        loss = rref.rpc_async().forward(x).wait().sum()
        autograd.backward(context_id, [loss])
        gradients = autograd.get_gradients(context_id)
    torch.testing.assert_close(gradients[x], alone_x.grad)
    torch.testing.assert_close(gradients[rref.local_value().weight], alone_net.weight.grad)


def test_a_graph_looks_as_torchs_does(me: str) -> None:
    x, y = torch.rand(2, requires_grad=True), torch.rand(2, requires_grad=True)
    with autograd.context() as context_id:
        z = rpc.rpc_sync(me, torch.mul, args=(x, y))
        context = autograd._current_context()
        assert (
            context._context_id()
            == context_id
            == autograd._retrieve_context(context_id)._context_id()
        )
        assert context._known_worker_ids() == {0}
        sent, replied = context._send_functions().values()
        came, received = context._recv_functions().values()
        assert sent.name() == "torch::distributed::autograd::SendRpcBackward"
        assert [node.variable for node, _ in sent.next_functions] == [x, y]
        ((product, _),) = replied.next_functions
        assert product.name() == "MulBackward0"
        assert [node for node, _ in product.next_functions] == [came, came]
        assert came.name() == "torch::distributed::autograd::RecvRpcBackward"
        assert z.grad_fn == received
        assert z.grad_fn != came


def test_contexts_do_not_nest_and_end(me: str) -> None:
    with autograd.context() as context_id:
        assert context_id >> 48 == 0
        assert context_id <= autograd._get_max_id()
        with (
            pytest.raises(RuntimeError, match="Already have an autograd context"),
            autograd.context(),
        ):
            pass
        assert autograd._get_debug_info()["num_autograd_contexts"] == "1"
    for use in (autograd.get_gradients, autograd._retrieve_context, autograd._is_valid_context):
        with pytest.raises(RuntimeError, match=f"autograd context with id: {context_id}"):
            use(context_id)
    with pytest.raises(RuntimeError, match="valid autograd context"):
        autograd._current_context()
    assert autograd._get_debug_info()["num_autograd_contexts"] == "0"


def test_each_thread_has_contexts_of_its_own(me: str) -> None:
    results: list[bool] = []

    def work(n: int) -> None:
        t = torch.full((2,), float(n), requires_grad=True)
        with autograd.context() as context_id:
            autograd.backward(context_id, [rpc.rpc_sync(me, torch.mul, args=(t, t)).sum()])
            results.append(torch.equal(autograd.get_gradients(context_id)[t], 2 * t))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert results == [True] * 5


@pytest.mark.parametrize(
    ("roots", "text"),
    [
        ([], "No tensors provided"),
        ([torch.ones(1)], "requires_grad not set"),
        ([torch.ones(2, requires_grad=True)], "all roots need to be scalar"),
        ([torch.ones(1, requires_grad=True)], "valid gradient function"),
    ],
)
def test_roots_that_cannot_be(me: str, roots: list[Tensor], text: str) -> None:
    with autograd.context() as context_id, pytest.raises(RuntimeError, match=text):
        autograd.backward(context_id, roots)


def test_arguments_that_cannot_be(me: str) -> None:
    arguments: Any
    for arguments in ((None, None), (1, None), (None, []), (1, [3])):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            autograd.backward(*arguments)


# --- optimizer and module ------------------------------------------------------------------------


def alone(optimizer_class: Any, steps: int, **kwargs: Any) -> list[Tensor]:
    """Train in one process."""
    net = program.Net(0)
    optimizer = optimizer_class(net.parameters(), **kwargs)
    for x in inputs(steps):
        optimizer.zero_grad()
        net(x).sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


def inputs(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs"),
    [(optim.SGD, {"lr": 0.1, "momentum": 0.9}), (optim.Adam, {}), (program.Halving, {"lr": 0.1})],
)
def test_training_is_that_of_one_process(me: str, optimizer_class: Any, kwargs: Any) -> None:
    net = RemoteModule(f"{me}/cpu", program.Net, (0,))
    parameters = net.remote_parameters()
    optimizer = DistributedOptimizer(optimizer_class, parameters, **kwargs)
    for x in inputs(3):
        with autograd.context() as context_id:
            autograd.backward(context_id, [net(x).sum()])
            optimizer.step(context_id)
    for parameter, expected in zip(parameters, alone(optimizer_class, 3, **kwargs), strict=True):
        torch.testing.assert_close(parameter.to_here().detach(), expected)


def test_an_optimizer_that_fails_says_so(me: str) -> None:
    parameters = RemoteModule(me, program.Net, (0,)).remote_parameters()
    with pytest.raises(ValueError, match="Invalid learning rate"):
        DistributedOptimizer(optim.SGD, parameters, lr=-1.0)
    with pytest.raises(TypeError, match="expected RRefs, got a Tensor"):
        DistributedOptimizer(optim.SGD, [torch.ones(1)], lr=0.1)  # type: ignore[list-item]
    optimizer = DistributedOptimizer(program.Broken, parameters, lr=0.1)
    with autograd.context() as context_id:
        loss = rpc.rpc_sync(me, program.squares, args=(parameters[0],))
        autograd.backward(context_id, [loss])
        with pytest.raises(Exception, match="cannot step"):
            optimizer.step(context_id)
    with pytest.raises(RuntimeError, match="Could not find autograd context"):
        optimizer.step(context_id)


def test_a_step_that_may_have_been_applied_is_a_runtime_error_as_others_are(me: str) -> None:
    parameters = RemoteModule(me, program.Net, (0,)).remote_parameters()
    optimizer = DistributedOptimizer(program.Unfinished, parameters, lr=0.1)
    with autograd.context() as context_id:
        loss = rpc.rpc_sync(me, program.squares, args=(parameters[0],))
        autograd.backward(context_id, [loss])
        with pytest.raises(RuntimeError, match="cannot finish") as raised:
            optimizer.step(context_id)
    assert isinstance(raised.value, PartialStepError)
    assert raised.value.unknown == (me,)
    assert isinstance(raised.value.causes[me], ValueError)


def test_a_module_elsewhere(me: str) -> None:
    net = RemoteModule("rank:0/cpu", nn.Linear, (3, 2))
    x = torch.rand(4, 3)
    assert net(x).shape == (4, 2)
    torch.testing.assert_close(net.forward_async(x).wait(), net.forward(x))
    net.eval()
    assert net.get_module_rref().local_value().training is False
    with pytest.raises(ValueError, match="not supported for RemoteModule"):
        net.state_dict()
    with pytest.raises(ValueError, match="returns an instance of"):
        RemoteModule(me, program.Counter, (1,)).forward(x)  # type: ignore[arg-type]


# --- taking part ---------------------------------------------------------------------------------


def test_a_worker_may_leave_and_come_again(
    me: str, options: rpc.TensorPipeRpcBackendOptions
) -> None:
    with pytest.raises(RuntimeError, match="already initialized"):
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=copy.copy(options))
    rref = rpc.remote(me, program.add, args=(1, 2))
    rpc.shutdown()
    for use in (lambda: rpc.rpc_sync(me, program.add), lambda: rpc.get_worker_info()):
        with pytest.raises(RuntimeError, match=r"^RPC has not been initialized"):
            use()
    with pytest.raises(RuntimeError, match="RPC agent is not set"):
        rpc.RRef(1)
    del rref
    rpc.init_rpc("me2", rank=0, world_size=1, rpc_backend_options=options)
    assert rpc.rpc_sync("me2", program.add, args=(1, 2)) == 3
    rpc.shutdown()


def test_a_group_that_workers_come_to(options: rpc.TensorPipeRpcBackendOptions) -> None:
    rpc.allow_module(program.__name__)
    rpc.init_rpc("me", rank=0, rpc_backend_options=options)
    assert rpc.rpc_sync("me", program.add, args=(1, 2)) == 3
    assert [info.name for info in rpc._get_current_rpc_agent().get_worker_infos()] == ["me"]
    rpc.shutdown()


def test_calls_that_nobody_waits_for_are_done_before_a_worker_leaves(me: str) -> None:
    program.ran.clear()
    rpc.rpc_async(me, program.chain, args=([me], 10))
    rpc.shutdown()
    assert program.how_often("chain") == 11


def test_leaving_at_once_ends_what_is_under_way(me: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    future = rpc.rpc_async(me, program.wait, timeout=0)
    rpc.shutdown(graceful=False)
    with pytest.raises(RuntimeError):
        future.wait()
    assert not caplog.records


def test_a_worker_listens_on_this_machine_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, options: rpc.TensorPipeRpcBackendOptions
) -> None:
    assert endpoint_for(options) == "tcp://127.0.0.1:0"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert endpoint_for(rpc.TensorPipeRpcBackendOptions()) == "tcp://127.0.0.1:0"
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(ValueError, match="beyond this machine"):
        endpoint_for(rpc.TensorPipeRpcBackendOptions())
    with pytest.raises(ValueError, match="beyond this machine"):
        endpoint_for(rpc.TensorPipeRpcBackendOptions(init_method="tcp://192.0.2.1:29500"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # a launcher says that it is one machine
    assert endpoint_for(rpc.TensorPipeRpcBackendOptions()) == "tcp://127.0.0.1:0"
    there = "tcp://192.0.2.7:0"
    assert endpoint_for(rpc.TensorPipeRpcBackendOptions(listen=there, insecure=True)) == there


def test_a_worker_takes_in_as_much_as_its_options_say(
    options: rpc.TensorPipeRpcBackendOptions,
) -> None:
    rpc.allow_module(program.__name__)
    large = bytes(Limits().header_bytes)
    for limits, is_enough in ((Limits(), False), (Limits(header_bytes=3 * len(large)), True)):
        options.limits = limits
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
        if is_enough:
            assert rpc.rpc_sync("me", program.add, args=(large, b"!")) == large + b"!"
        else:
            with pytest.raises(RuntimeError, match="would refuse this message"):
                rpc.rpc_sync("me", program.add, args=(large, b"!"))
        rpc.shutdown()


def test_nothing_is_left_of_a_worker_whose_name_is_taken(
    options: rpc.TensorPipeRpcBackendOptions,
) -> None:
    store = HashStore()
    store.set("member/1", '["me", 1, "tcp://127.0.0.1:1"]')
    with pytest.raises(RuntimeError, match="is not unique"):
        rpc._init_rpc_backend(rpc.BackendType.TENSORPIPE, store, "me", 0, 2, options)
    with pytest.raises(RuntimeError, match="has not been initialized"):
        rpc.get_worker_info()


def test_options_that_cannot_be(options: rpc.TensorPipeRpcBackendOptions) -> None:
    with pytest.raises(TypeError, match="member of BackendType"):
        rpc.init_rpc("me", backend="TENSORPIPE", rank=0, world_size=1)
    with pytest.raises(TypeError, match="instance of RpcBackendOptions"):
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options={})
    with pytest.raises(RuntimeError, match="Worker name must match"):
        rpc.init_rpc("not a name", rank=0, world_size=1, rpc_backend_options=options)
    options.listen = "tcp://192.0.2.7:0"
    with pytest.raises(ValueError, match="anybody could call it"):
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
    assert not rpc._is_current_rpc_agent_set()
