"""Distributed autograd for PyTorch over ZeroMQ.

::

    import zmq_autograd as za

    worker = za.Worker("bob", listen="tcp://127.0.0.1:5555")

    @worker.register
    def double(x):
        return 2 * x

See the README for the first steps, and ``docs/`` for the rest.
"""

from zmq_autograd import blocking, wire
from zmq_autograd.engine import Context
from zmq_autograd.errors import (
    AuthenticationError,
    ConfigurationError,
    ContextError,
    DeadlineExceeded,
    NotRegistered,
    PartialStepError,
    ProtocolError,
    RemoteError,
    ResourceExhausted,
    SerializationError,
    WorkerLost,
    ZmqAutogradError,
)
from zmq_autograd.launch.world import init
from zmq_autograd.module import RemoteModule, RemoteParameter
from zmq_autograd.node import compute
from zmq_autograd.optimizer import DistributedOptimizer
from zmq_autograd.remote import RemoteWorker
from zmq_autograd.rref import RRef
from zmq_autograd.wire import Limits, messages
from zmq_autograd.worker import Worker, connect, current_context, current_peer, current_worker

__version__ = "0.1.0"

__all__ = [
    # workers
    "Worker",
    "RemoteWorker",
    "connect",
    "init",
    "compute",
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
    # without async
    "blocking",
    # the wire
    "wire",
    "messages",
    "Limits",
    # errors
    "ZmqAutogradError",
    "AuthenticationError",
    "ConfigurationError",
    "ContextError",
    "DeadlineExceeded",
    "NotRegistered",
    "PartialStepError",
    "ProtocolError",
    "RemoteError",
    "ResourceExhausted",
    "SerializationError",
    "WorkerLost",
]
