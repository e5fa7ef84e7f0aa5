"""Distributed autograd for PyTorch over ZeroMQ."""

from zmq_autograd import wire
from zmq_autograd.errors import *  # noqa: F403
from zmq_autograd.wire import messages
