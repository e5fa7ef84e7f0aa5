"""A convolutional net on a parameter server, trained by another process, as in torch's tutorial on
parameter servers by RPC; scikit-learn's handwritten digits stand for MNIST.

    python examples/tutorials/parameter_server.py                # on zmq_autograd
    python examples/tutorials/parameter_server.py --on torch     # on torch.distributed.rpc
"""

from __future__ import annotations

import multiprocessing as mp
import sys
import tempfile
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

if sys.argv[1:] == ["--on", "torch"]:
    import torch.distributed.autograd as dist_autograd
    import torch.distributed.rpc as rpc
    from torch.distributed.optim import DistributedOptimizer
else:
    from zmq_autograd.compat import autograd as dist_autograd
    from zmq_autograd.compat import rpc
    from zmq_autograd.compat.optim import DistributedOptimizer

    rpc.allow_module(__name__)

WORLD_SIZE = 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.dropout1 = nn.Dropout2d(0.1)
        self.dropout2 = nn.Dropout(0.2)
        self.fc1 = nn.Linear(128, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(self.dropout1(x), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


def call_method(method: Callable[..., Any], rref: rpc.RRef, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the object that an RRef refers to; runs on its owner."""
    return method(rref.local_value(), *args, **kwargs)


def remote_method(method: Callable[..., Any], rref: rpc.RRef, *args: Any, **kwargs: Any) -> Any:
    return rpc.rpc_sync(rref.owner(), call_method, args=(method, rref, *args), kwargs=kwargs)


# --- the server ----------------------------------------------------------------------------------


class ParameterServer(nn.Module):
    """Owns the net."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def evaluate(self, x: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            scores = self.model(x)
        self.model.train()
        return scores

    def get_dist_gradients(self, context_id: int) -> dict[Tensor, Tensor]:
        """Return the gradients in a context, by parameter."""
        return dist_autograd.get_gradients(context_id)

    def get_param_rrefs(self) -> list[rpc.RRef]:
        """Return RRefs to the parameters, for an optimizer."""
        return [rpc.RRef(parameter) for parameter in self.model.parameters()]


param_server: ParameterServer | None = None
global_lock = Lock()


def get_parameter_server() -> ParameterServer:
    """Return the one that all trainers use."""
    global param_server
    with global_lock:
        if param_server is None:
            param_server = ParameterServer()
        return param_server


def run_parameter_server(init_method: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = rpc.TensorPipeRpcBackendOptions(init_method=init_method)
    rpc.init_rpc("parameter_server", rank=0, world_size=WORLD_SIZE, rpc_backend_options=options)
    rpc.shutdown()  # serves until all others are done


# --- a trainer -----------------------------------------------------------------------------------


class TrainerNet(nn.Module):
    """What a trainer sees of the net: each method runs on the server."""

    def __init__(self) -> None:
        super().__init__()
        self.param_server_rref = rpc.remote("parameter_server", get_parameter_server)

    def get_global_param_rrefs(self) -> list[rpc.RRef]:
        return remote_method(ParameterServer.get_param_rrefs, self.param_server_rref)

    def forward(self, x: Tensor) -> Tensor:
        return remote_method(ParameterServer.forward, self.param_server_rref, x)


def load() -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def run_training_loop() -> None:
    train, test = load()
    net = TrainerNet()
    param_rrefs = net.get_global_param_rrefs()
    opt = DistributedOptimizer(optim.SGD, param_rrefs, lr=0.05, momentum=0.9)
    for epoch in range(3):
        for number, (data, target) in enumerate(DataLoader(train, batch_size=60, shuffle=True)):
            with dist_autograd.context() as context_id:
                loss = F.nll_loss(net(data), target)
                dist_autograd.backward(context_id, [loss])
                gradients = remote_method(
                    ParameterServer.get_dist_gradients, net.param_server_rref, context_id
                )
                largest = max(g.abs().max().item() for g in gradients.values())
                opt.step(context_id)
            if number % 5 == 0:
                what = f"loss {loss.item()!r}, largest gradient {largest!r}"
                print(f"epoch {epoch}, batch {number}: {what}", flush=True)
    images, labels = test.tensors
    scores = remote_method(ParameterServer.evaluate, net.param_server_rref, images)
    print(f"test accuracy {(scores.argmax(1) == labels).double().mean().item()!r}")
    for rref in param_rrefs:
        weight = rref.to_here().detach()
        print(f"parameter {list(weight.shape)}: {weight.double().norm().item()!r}", flush=True)


def run_trainer(rank: int, init_method: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    options = rpc.TensorPipeRpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"trainer_{rank}", rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    run_training_loop()
    rpc.shutdown()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        init_method = f"file://{directory}/store"
        processes = [mp.Process(target=run_parameter_server, args=(init_method,))]
        processes += [
            mp.Process(target=run_trainer, args=(rank, init_method))
            for rank in range(1, WORLD_SIZE)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
