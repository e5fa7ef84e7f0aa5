"""DistributedOptimizer: a torch optimizer whose parameters live on several workers.

Each owner of parameters has a torch optimizer over its own; here is what ties them together.
"""

from zmq_autograd.optimizer.distributed import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
