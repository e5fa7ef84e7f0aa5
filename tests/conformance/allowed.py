"""What the workers of PyTorch's tests offer each other, beyond tensor operators.

To be imported after `aliases.install`. A program that is moved to `zmq_autograd.compat` says the
same: which modules' functions may be called, and how values of its own types travel.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn
from torch.testing._internal.distributed.nn.api import remote_module_test
from torch.testing._internal.distributed.rpc import rpc_test

from zmq_autograd.compat import rpc
from zmq_autograd.compat.rpc import state

MODULES: Final = (
    "torch.testing._internal.dist_utils",
    "torch.testing._internal.distributed.ddp_under_dist_autograd_test",
    "torch.testing._internal.distributed.nn.api.remote_module_test",
    "torch.testing._internal.distributed.rpc.dist_autograd_test",
    "torch.testing._internal.distributed.rpc.dist_optimizer_test",
    "torch.testing._internal.distributed.rpc.examples.parameter_server_test",
    "torch.testing._internal.distributed.rpc.examples.reinforcement_learning_rpc_test",
    "torch.testing._internal.distributed.rpc.rpc_test",
)


def allow(test_classes: Iterable[type[unittest.TestCase]]) -> None:
    """Say it; to be done before the processes of a test are forked.

    Args:
        test_classes: the composed suites; some tests call their own methods on other workers.
    """
    for module in MODULES:
        state.names._allow(module)  # a program could not: they are torch's own
    rpc.codec(rpc_test.MyClass, pack=lambda it: it.a, unpack=rpc_test.MyClass)
    rpc.codec(
        rpc_test.SlowPickleClass,
        pack=rpc_test.SlowPickleClass.__getstate__,
        unpack=_unpack_slowly,
    )
    rpc.codec(nn.Linear, pack=_pack_linear, unpack=_unpack_linear)
    for test_class in test_classes:
        rpc.codec(test_class, pack=lambda test: test._testMethodName, unpack=test_class)
    rpc.codec(remote_module_test.MyModule, pack=nn.Module.state_dict, unpack=_unpack_my_module)


def _unpack_slowly(state: tuple[float]) -> rpc_test.SlowPickleClass:
    it = rpc_test.SlowPickleClass.__new__(rpc_test.SlowPickleClass)
    it.__setstate__(state)  # type: ignore[no-untyped-call]
    return it


def _pack_linear(module: nn.Linear) -> list[Any]:
    return [module.in_features, module.out_features, module.state_dict()]


def _unpack_linear(packed: list[Any]) -> nn.Linear:
    in_features, out_features, state = packed
    module = nn.Linear(in_features, out_features, bias="bias" in state)
    module.load_state_dict(state)
    return module


def _unpack_my_module(state: dict[str, torch.Tensor]) -> nn.Module:
    module: nn.Module = remote_module_test.MyModule(None)  # type: ignore[no-untyped-call]
    module.load_state_dict(state)
    return module
