"""What there is one of in a process: its names, its codecs, and the agent while it takes part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from zmq_autograd.compat.rpc.names import Names
from zmq_autograd.compat.rpc.values import Values

if TYPE_CHECKING:
    from zmq_autograd.compat.rpc.agent import Agent

names: Final = Names()
values: Final = Values(names)

_agent: Any = None


def set_agent(agent: Any) -> None:
    """Take part by `agent` from now on; None for no longer."""
    global _agent
    _agent = agent


def is_initialized() -> bool:
    """Say whether this process takes part."""
    return _agent is not None


def agent() -> Agent:
    """Return the agent.

    Raises:
        RuntimeError: `init_rpc` has not been called.
    """
    if _agent is None:
        raise RuntimeError(
            "RPC has not been initialized. Current RPC agent is not set! Did you initialize the "
            "RPC framework (e.g. by calling `rpc.init_rpc`)?"
        )
    return _agent  # type: ignore[no-any-return]  # a backend of the program's own may be any object
