"""The names of `torch.distributed.rpc`, on `zmq_autograd`.

A program changes its import, and says which modules' functions others may call::

    from zmq_autograd.compat import rpc

    rpc.allow_module(__name__)
    rpc.init_rpc("worker0", rank=0, world_size=2)
    rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2), 1))
    rpc.shutdown()

Functions go by name, tensors as they are, objects of the program's own types by a `codec`.  Nothing
is pickled, and what nobody allowed does not run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import _create_store_from_options, rendezvous

from zmq_autograd.compat import autograd
from zmq_autograd.compat.rpc import api, backend_registry, constants, functions, options
from zmq_autograd.compat.rpc.agent import Agent as TensorPipeAgent
from zmq_autograd.compat.rpc.api import (
    RRef,
    _rref_context_get_debug_info,
    allow_module,
    codec,
    get_rpc_timeout,
    get_worker_info,
    register,
    remote,
    rpc_async,
    rpc_sync,
    shutdown,
)
from zmq_autograd.compat.rpc.backend_registry import BackendType
from zmq_autograd.compat.rpc.options import RpcBackendOptions, TensorPipeRpcBackendOptions
from zmq_autograd.compat.rpc.rref import PyRRef
from zmq_autograd.compat.rpc.worker_info import WorkerInfo

# Programs reach for these, too.
_get_current_rpc_agent = api._get_current_rpc_agent
_is_current_rpc_agent_set = api._is_current_rpc_agent_set
_set_rpc_timeout = api._set_rpc_timeout
enable_gil_profiling = api.enable_gil_profiling

__all__ = [
    "BackendType",
    "PyRRef",
    "RRef",
    "RpcBackendOptions",
    "TensorPipeAgent",
    "TensorPipeRpcBackendOptions",
    "WorkerInfo",
    "allow_module",
    "api",
    "backend_registry",
    "codec",
    "constants",
    "functions",
    "get_rpc_timeout",
    "get_worker_info",
    "init_rpc",
    "options",
    "register",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]

_init_counter = 0
_init_counter_lock = threading.Lock()


def is_available() -> bool:
    """Say whether this works here: it does."""
    return True


def init_rpc(
    name: str,
    backend: Any = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: Any = None,
) -> None:
    """Take part as the worker `name`; returns when all workers of a static group do.

    Args:
        name: letters, digits, ``_``, ``:``, ``-``; fewer than 128 of them.
        backend: a member of `BackendType`; there is one.
        rank: this worker's id, from 0; with ``env://`` by default the environment's ``RANK``.
        world_size: how many workers there are; None for a group that they come to and leave.
        rpc_backend_options: timeouts, where the workers meet, where this one listens.

    Raises:
        TypeError: `backend` or the options are something else.
        ValueError: the rank is missing, or the options cannot be.
        RuntimeError: it takes part already, the name is taken, or the others did not come in time.
    """
    if backend is not None and not isinstance(backend, backend_registry.BackendType):
        raise TypeError("Argument backend must be a member of BackendType")
    if rpc_backend_options is not None and not isinstance(rpc_backend_options, RpcBackendOptions):
        raise TypeError(
            "Argument rpc_backend_options must be an instance of RpcBackendOptions, got "
            f"{type(rpc_backend_options)}"
        )
    if backend is None:
        backend = _backend_for(rpc_backend_options)
    if rpc_backend_options is None:
        rpc_backend_options = backend_registry.construct_rpc_backend_options(backend)
    _check_not_initialized()
    store, rank = _meet(rpc_backend_options, rank, world_size)
    autograd._init(rank)
    _init_rpc_backend(backend, store, name, rank, world_size, rpc_backend_options)


def _check_not_initialized() -> None:
    if _is_current_rpc_agent_set():
        raise RuntimeError("RPC is already initialized")


def _backend_for(given: Any) -> Any:
    backends = backend_registry.BackendType
    if given is None:
        return backends["TENSORPIPE"]
    for backend in backends:
        if isinstance(given, type(backend_registry.construct_rpc_backend_options(backend))):
            return backend
    raise TypeError(f"Could not infer backend for options {given}")


def _meet(given: Any, rank: int, world_size: int | None) -> tuple[Any, int]:
    """Return the store that the workers meet at, and this one's rank.

    Each `init_rpc` of a process has keys of its own there.

    Raises:
        ValueError: the rank is missing.
    """
    global _init_counter
    if world_size:
        found = rendezvous(given.init_method, rank=rank, world_size=world_size)
        store, rank, _ = next(found)
    else:
        store = _create_store_from_options(given, rank)  # type: ignore[no-untyped-call]
        rank = int(os.environ["RANK"]) if rank < 0 else rank
    if given.rpc_timeout:
        store.set_timeout(timedelta(seconds=given.rpc_timeout))
    with _init_counter_lock:
        number = _init_counter
        _init_counter += 1
    return PrefixStore(f"rpc_prefix_{number}", store), rank


def _init_rpc_backend(
    backend: Any = None,
    store: Any = None,
    name: str = "",
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: Any = None,
) -> None:
    """Take part over a store that is there; see `init_rpc`."""
    _check_not_initialized()
    agent = backend_registry.init_backend(
        backend,
        store=store,
        name=name,
        rank=rank,
        world_size=world_size,
        rpc_backend_options=rpc_backend_options,
    )
    api._init_rpc_states(agent)


def _get_debug_info() -> Mapping[str, str]:
    """Return what this worker is doing, as torch tells it."""
    agent = api._get_current_rpc_agent()
    return {
        **_rref_context_get_debug_info(),
        **agent.get_debug_info(),
        **autograd._get_debug_info(),
    }
