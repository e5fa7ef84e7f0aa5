"""Distributed autograd end to end, as torch's documentation shows it: each worker has its neighbour
make two tensors, adds them up, runs backward through both processes and steps both tensors.

    python examples/tutorials/end_to_end.py                # on zmq_autograd
    python examples/tutorials/end_to_end.py --on torch     # on torch.distributed.rpc
"""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.multiprocessing as mp
from torch import Tensor, optim

if sys.argv[1:] == ["--on", "torch"]:
    import torch.distributed.autograd as dist_autograd
    import torch.distributed.rpc as rpc
    from torch.distributed.optim import DistributedOptimizer
else:
    from zmq_autograd.compat import autograd as dist_autograd
    from zmq_autograd.compat import rpc
    from zmq_autograd.compat.optim import DistributedOptimizer

    rpc.allow_module(__name__)

WORLD_SIZE, STEPS = 2, 3


def random_tensor(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((3, 3), generator=generator).requires_grad_()


def run_training(rank: int) -> None:
    neighbour = f"worker{(rank + 1) % WORLD_SIZE}"
    # References to tensors that the neighbour makes and keeps.
    rref1 = rpc.remote(neighbour, random_tensor, args=(2 * rank,))
    rref2 = rpc.remote(neighbour, random_tensor, args=(2 * rank + 1,))
    dist_optim = DistributedOptimizer(optim.SGD, [rref1, rref2], lr=0.05)
    lines = []
    for step in range(STEPS):
        with dist_autograd.context() as context_id:
            # Forward, there and here; backward, here and there; a step of the neighbour's tensors.
            product = rpc.rpc_sync(neighbour, torch.mul, args=(rref1.to_here(), rref2.to_here()))
            loss = torch.tanh(product).sum()
            dist_autograd.backward(context_id, [loss])
            dist_optim.step(context_id)
        lines.append(f"worker {rank}, step {step}: loss {loss.item()!r}")
    lines.append(f"worker {rank}: {[rref.to_here().tolist() for rref in (rref1, rref2)]}")
    print("\n".join(lines), flush=True)  # in one piece: the others print, too


def run_worker(rank: int, init_method: str) -> None:
    torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    run_training(rank)
    rpc.shutdown()  # waits until the other is done, too


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        init_method = f"file://{directory}/store"
        mp.start_processes(run_worker, (init_method,), WORLD_SIZE, start_method="fork")
