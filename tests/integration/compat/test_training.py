"""Contexts, passes, optimizers and modules of programs on torch's RPC, moved over."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from tests.helpers import DEADLINE
from tests.integration import compat_functions as program
from zmq_autograd.compat import autograd, rpc
from zmq_autograd.compat.nn import RemoteModule
from zmq_autograd.compat.optim import DistributedOptimizer
from zmq_autograd.errors import PartialStepError

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
