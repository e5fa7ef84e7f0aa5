"""``python -m tests.integration.compat_workers RANK STORE``: one process of a world of three.

Worker 0 is a parameter server, 1 and 2 train.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import pytest
import torch
from torch import Tensor, nn

from tests.integration import compat_functions as program
from zmq_autograd.compat import autograd, rpc
from zmq_autograd.compat.nn import RemoteModule
from zmq_autograd.compat.optim import DistributedOptimizer

WORLD = 3
LEARNING_RATE = 0.1


def train() -> None:
    """Train one module of worker 0's from two workers in turn, as one process would."""
    net = RemoteModule("worker0/cpu", program.Net, (0,))
    # The second trainer gets the module, and the parameters, from the first.
    first = train_on(net, net.remote_parameters(), 1)
    second = rpc.rpc_sync("worker2", train_on, args=(net, net.remote_parameters(), 2))
    alone = program.Net(0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=LEARNING_RATE)
    expected = []
    for seed in (1, 2):
        x = input_of(seed).requires_grad_()
        optimizer.zero_grad()
        loss = alone(2 * x).sum()
        loss.backward()
        optimizer.step()
        expected.append([loss.detach(), x.grad])
    torch.testing.assert_close([first, second], expected)
    there = [parameter.to_here().detach() for parameter in net.remote_parameters()]
    torch.testing.assert_close(there, [parameter.detach() for parameter in alone.parameters()])


def train_on(
    net: RemoteModule, parameters: list[rpc.RRef[nn.Parameter]], seed: int
) -> list[Tensor]:
    """Train for one step; return the loss, and the gradient of what went in."""
    # A class of the program's own, which the parameters' owner knows by name, too.
    optimizer = DistributedOptimizer(program.Halving, parameters, lr=2 * LEARNING_RATE)
    x = input_of(seed).requires_grad_()
    with autograd.context() as context_id:
        other = f"worker{3 - rpc.get_worker_info().id}"
        doubled = rpc.rpc_sync(other, program.add_later, args=("worker0", x, torch.zeros_like(x)))
        loss = net(doubled).sum()
        autograd.backward(context_id, [loss])
        optimizer.step(context_id)
        return [loss.detach(), autograd.get_gradients(context_id)[x]]


def input_of(seed: int) -> Tensor:
    """Return a batch."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def pass_on() -> None:
    """Pass an RRef around; the value stays as long as anybody has it."""
    until_kept(0)
    rref = rpc.remote("worker0", program.Counter, args=(1,))
    assert rpc.rpc_sync("worker2", count_on, args=(rref, 2)) == 3
    assert rref.rpc_sync().add(1) == 4
    until_kept(1)
    kept = rpc.rpc_sync("worker2", make_elsewhere)
    assert kept.owner_name() == "worker0"
    assert kept.to_here() == 5
    assert kept.confirmed_by_owner()
    del rref, kept
    until_kept(0)


def count_on(rref: rpc.RRef[program.Counter], n: int) -> int:
    """Count."""
    assert not rref.is_owner()
    result: int = rref.rpc_sync().add(n)
    return result


def make_elsewhere() -> rpc.RRef[int]:
    """Return an RRef to a value of a third worker's."""
    return rpc.remote("worker0", program.add, args=(2, 3))


def counts() -> list[str]:
    """Return how many values are kept here, and how many references to them there are."""
    info = rpc._get_debug_info()
    return [info["num_owner_rrefs"], info["num_forks"]]


def until_kept(number: int) -> None:
    """Wait until worker 0 keeps so many values, each for one who refers to it."""
    until = time.monotonic() + 20
    while (found := rpc.rpc_sync("worker0", counts)) != [str(number), str(number)]:
        assert time.monotonic() < until, found
        time.sleep(0.01)


def chain() -> None:
    """Leave while calls that nobody waits for call on."""
    names = [f"worker{rank}" for rank in range(WORLD)]
    rpc.rpc_sync("worker2", program.chain, args=(names, 30))


def lose() -> None:
    """Wait for a worker that dies."""
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="worker2"):
        rpc.rpc_sync("worker2", os_exit)
    assert time.monotonic() - began < 10


def os_exit() -> None:
    """Die."""
    os._exit(7)


def main(rank: int, store: str) -> None:
    """Take part twice: in a world that ends well, and in one that does not."""
    torch.set_num_threads(1)
    rpc.allow_module(program.__name__)
    rpc.allow_module("tests.integration.compat_workers")
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}", rpc_timeout=30)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=WORLD, rpc_backend_options=options)
    if rank == 1:
        train()
        pass_on()
        chain()
    rpc.shutdown()
    sys.stdout.write(f"{program.how_often('chain')}\n")
    sys.stdout.flush()
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=WORLD, rpc_backend_options=options)
    if rank == 1:
        lose()
    began = time.monotonic()
    # The dead one may have said that it is done before it died: then nobody need complain.
    with contextlib.suppress(RuntimeError):
        rpc.shutdown()
    assert time.monotonic() - began < 30
    assert not rpc._is_current_rpc_agent_set()


if __name__ == "__main__":
    # Under its own name, so that its functions go by the same name everywhere.
    from tests.integration import compat_workers

    compat_workers.main(int(sys.argv[1]), sys.argv[2])
