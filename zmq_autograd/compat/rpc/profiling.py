"""What calls are named in profiles: as torch's RPC names them, for torch's legacy profiler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled, _profiler_type
from torch._C._profiler import ActiveProfilerType

from zmq_autograd.compat.rpc.worker_info import WorkerInfo
from zmq_autograd.node.recorder import call_named


def profiled(
    mode: str, function: Callable[..., Any], here: WorkerInfo, there: WorkerInfo
) -> AbstractContextManager[None]:
    """Have a call that is made in a block go by torch's name for it: ``rpc_sync#f(a -> b)``.

    Kineto, which torch's RPC does not know, has it by this package's own.

    Args:
        mode: ``"sync"``, ``"async"`` or ``"remote"``.
        function: what is called.
        here: the worker that calls.
        there: the worker that is called.
    """
    if not _profiler_enabled() or _profiler_type() != ActiveProfilerType.LEGACY:
        return nullcontext()
    name: str | None = torch.jit._builtins._find_builtin(function)  # type: ignore[no-untyped-call]
    if name is None and isinstance(function, torch.jit.ScriptFunction):
        name = function.qualified_name
    elif name is None:
        name = function.__qualname__
    return call_named(f"rpc_{mode}#{name}({here.name} -> {there.name})")
