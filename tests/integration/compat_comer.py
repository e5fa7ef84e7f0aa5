"""``python -m tests.integration.compat_comer NAME RANK STORE``: a worker that comes and goes.

Takes part in a dynamic group; calls each worker that a line of its standard input names, and leaves
when that ends.
"""

from __future__ import annotations

import sys

import torch

from zmq_autograd.compat import rpc


def main(name: str, rank: int, store: str) -> None:
    """Take part until there is nothing to do."""
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{store}", rpc_timeout=20)
    rpc.init_rpc(name, rank=rank, rpc_backend_options=options)
    say("here")
    for line in sys.stdin:
        say(str(rpc.rpc_sync(line.strip(), torch.add, args=(torch.tensor(1), 2)).item()))
    rpc.shutdown()


def say(what: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
