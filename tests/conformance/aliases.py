"""Puts `zmq_autograd.compat` in the place of torch's modules, for PyTorch's tests to find.

The tests import `torch.distributed.rpc` and its relatives, and reach them as attributes of
`torch.distributed`; so both `sys.modules` and these attributes are replaced. What of a package of
torch's has no counterpart in `compat` stays torch's own.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, Final

REPLACED: Final = {
    "torch.distributed.rpc": "zmq_autograd.compat.rpc",
    "torch.distributed.rpc.api": "zmq_autograd.compat.rpc.api",
    "torch.distributed.rpc.backend_registry": "zmq_autograd.compat.rpc.backend_registry",
    "torch.distributed.rpc.constants": "zmq_autograd.compat.rpc.constants",
    "torch.distributed.rpc.functions": "zmq_autograd.compat.rpc.functions",
    "torch.distributed.rpc.options": "zmq_autograd.compat.rpc.options",
    "torch.distributed.autograd": "zmq_autograd.compat.autograd",
    "torch.distributed.nn.api.remote_module": "zmq_autograd.compat.nn",
}
"""Which module stands in for each of torch's."""

ATTRIBUTES: Final = {
    ("torch.distributed.optim", "DistributedOptimizer"): "zmq_autograd.compat.optim",
    ("torch.distributed.nn", "RemoteModule"): "zmq_autograd.compat.nn",
}
"""Names of torch's that are replaced in modules that stay; each with the module that has it."""

KEPT: Final = ("torch.distributed.rpc.internal",)
"""Modules of torch's that its tests use and that do no more than build names and enums."""

ABSENT: Final = {"torch.distributed.rpc.api": ("_use_rpc_pickler",)}
"""Names that are imported for tests that are left out, and that `compat` does not have."""


def install() -> None:
    """Put it there; PyTorch's test modules must not have been imported yet."""
    for name in (*REPLACED, *KEPT, *(module for module, _ in ATTRIBUTES)):
        importlib.import_module(name)  # torch's own first, so that nothing of it binds to ours
    for name, ours in REPLACED.items():
        _replace(name, importlib.import_module(ours))
    for name in KEPT:
        _replace(name, sys.modules[name])
    for (module, attribute), ours in ATTRIBUTES.items():
        setattr(sys.modules[module], attribute, getattr(importlib.import_module(ours), attribute))
    for name, absent in ABSENT.items():
        for attribute in absent:
            setattr(sys.modules[name], attribute, None)


def check(modules: Iterable[str]) -> None:
    """Raise `LookupError` if one of `modules`, imported since, has got hold of torch's own."""
    for name in modules:
        for key, value in vars(sys.modules[name]).items():
            origin = value.__name__ if isinstance(value, ModuleType) else _origin(value)
            if origin in REPLACED or origin == "torch._C._distributed_rpc":
                raise LookupError(f"{name}.{key} is torch's own: {value}")


def _origin(value: Any) -> Any:
    return getattr(value, "__module__", None) if callable(value) else None


def _replace(name: str, module: ModuleType) -> None:
    parent, _, last = name.rpartition(".")
    sys.modules[name] = module
    setattr(sys.modules[parent], last, module)


@contextlib.contextmanager
def lenient_script() -> Iterator[None]:
    """Leave functions uncompiled that TorchScript cannot compile, for the time of an import.

    Some modules of tests compile functions when they are imported, a few of them with RRefs in
    their signatures, which TorchScript knows as torch's own only.
    """
    import torch

    script = torch.jit.script

    def try_script(obj: Any, optimize: None = None, _frames_up: int = 0, **options: Any) -> Any:
        try:
            return script(obj, optimize, _frames_up + 1, **options)
        except (RuntimeError, ValueError):
            return obj

    torch.jit.script = try_script  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.jit.script = script
