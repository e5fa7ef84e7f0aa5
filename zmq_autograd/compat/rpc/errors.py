"""What goes wrong in a call, as programs on torch expect it: a RuntimeError each time."""

from __future__ import annotations

from zmq_autograd.errors import PartialStepError, SerializationError


class CannotTravel(SerializationError, RuntimeError):
    """A function or a value that cannot be sent; nothing was sent."""


class NotAllowed(RuntimeError):
    """A name that arrived and that nobody registered or allowed here; nothing was run."""


class RpcTimeout(RuntimeError):
    """A call that took longer than it may."""


class PartialStep(PartialStepError, RuntimeError):
    """An optimizer's step that some workers applied, or may have applied, and others did not."""


def timed_out(seconds: float | None) -> RpcTimeout:
    """Return what is raised where a call took longer than `seconds`."""
    return RpcTimeout(
        f"RPCErr:1:RPC ran for more than set timeout ({(seconds or 0) * 1000:g} ms) and will now "
        "be marked with an error"
    )
