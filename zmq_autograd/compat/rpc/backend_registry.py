"""Backends by name: there is one, and programs may register others as torch lets them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

from zmq_autograd.compat.rpc import constants
from zmq_autograd.compat.rpc.joining import join
from zmq_autograd.compat.rpc.options import TensorPipeRpcBackendOptions

__all__ = [
    "BackendType",
    "BackendValue",
    "backend_registered",
    "construct_rpc_backend_options",
    "init_backend",
    "register_backend",
]


class BackendValue(NamedTuple):
    """What a backend is made of.

    Attributes:
        construct_rpc_backend_options_handler: makes its options.
        init_backend_handler: makes its agent.
    """

    construct_rpc_backend_options_handler: Callable[..., Any]
    init_backend_handler: Callable[..., Any]


def _options(rpc_timeout: float, init_method: str, **kwargs: Any) -> TensorPipeRpcBackendOptions:
    return TensorPipeRpcBackendOptions(rpc_timeout=rpc_timeout, init_method=init_method, **kwargs)


def _init(
    store: Any, name: str, rank: int, world_size: int | None, rpc_backend_options: Any
) -> Any:
    return join(store, name, rank, world_size, rpc_backend_options)


class _Backend(enum.Enum):
    """Base of the kinds of backends."""

    def __repr__(self) -> str:
        return f"BackendType.{self.name}"


def _backend_type(backends: dict[str, BackendValue]) -> Any:
    make: Any = _Backend  # called so, an enum without members makes one with members
    return make("BackendType", backends)


# Its members are the backends that are registered, so it is made anew with each: an enum is closed.
BackendType = _backend_type({"TENSORPIPE": BackendValue(_options, _init)})


def backend_registered(backend_name: str) -> bool:
    """Say whether there is a backend of that name."""
    return backend_name in BackendType.__members__


def register_backend(
    backend_name: str,
    construct_rpc_backend_options_handler: Callable[..., Any],
    init_backend_handler: Callable[..., Any],
) -> Any:
    """Add a backend and return its member of `BackendType`.

    Args:
        backend_name: its name.
        construct_rpc_backend_options_handler: makes its options.
        init_backend_handler: makes its agent.

    Raises:
        RuntimeError: there is one of that name.
    """
    global BackendType
    if backend_registered(backend_name):
        raise RuntimeError(f"RPC backend {backend_name}: already registered")
    members = {member.name: member.value for member in BackendType}
    members[backend_name] = BackendValue(
        construct_rpc_backend_options_handler, init_backend_handler
    )
    BackendType = _backend_type(members)
    return BackendType[backend_name]


def construct_rpc_backend_options(
    backend: Any,
    rpc_timeout: float = constants.DEFAULT_RPC_TIMEOUT_SEC,
    init_method: str = constants.DEFAULT_INIT_METHOD,
    **kwargs: Any,
) -> Any:
    """Make the options of a backend."""
    return backend.value.construct_rpc_backend_options_handler(
        rpc_timeout=rpc_timeout, init_method=init_method, **kwargs
    )


def init_backend(backend: Any, *args: Any, **kwargs: Any) -> Any:
    """Make the agent of a backend."""
    return backend.value.init_backend_handler(*args, **kwargs)
