"""The package's surface without ``async``, for scripts, notebooks and threads.

::

    import zmq_autograd as za

    with za.blocking.connect("tcp://127.0.0.1:5555") as bob, bob.context() as ctx:
        y = bob.call("stage", x)
        ctx.backward(y.sum())

All of it is made from the async surface.  It runs on the event loop of a background thread, which
all threads share; in a compute thread, on that of the worker that it computes for.
"""

from zmq_autograd.blocking.objects import (
    Context,
    DistributedOptimizer,
    RemoteModule,
    RemoteParameter,
    RemoteWorker,
    RRef,
    Worker,
    WorldWorker,
    connect,
    current_context,
    current_peer,
    current_worker,
    init,
    of,
)
from zmq_autograd.blocking.portal import Portal, current_portal

__all__ = [
    # workers
    "Worker",
    "WorldWorker",
    "RemoteWorker",
    "connect",
    "init",
    "current_worker",
    "current_peer",
    # differentiating
    "Context",
    "current_context",
    # state that lives elsewhere
    "RRef",
    "RemoteModule",
    "RemoteParameter",
    "DistributedOptimizer",
    # the event loop
    "Portal",
    "current_portal",
    "of",
]
