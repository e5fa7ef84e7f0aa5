"""Distributed autograd for PyTorch over ZeroMQ."""
