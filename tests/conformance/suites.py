"""The tests of PyTorch's wheel that are run, and the areas and floors that they are counted in.

The classes are composed as PyTorch composes them, by its `rpc_utils.generate_tests`; only how the
processes of a test are started differs. Nothing of torch is imported before `compose`, so that
`aliases.install` can come first.
"""

from __future__ import annotations

import unittest
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from tests.conformance import aliases
from tests.conformance.left_out import LEFT_OUT, SKIPPED, SUITES_LEFT_OUT

AREAS: Final = {
    "RpcTest": "rpc",
    "TensorPipeAgentRpcTest": "rpc, sparse and options",
    "DistAutogradTest": "autograd",
    "TensorPipeAgentDistAutogradTest": "autograd",
    "DistOptimizerTest": "optimizer",
    "RemoteModuleTest": "RemoteModule",
    "ThreeWorkersRemoteModuleTest": "RemoteModule",
    "ParameterServerTest": "parameter server",
    "ReinforcementLearningRpcTest": "reinforcement learning",
    "DdpUnderDistAutogradTest": "DDP under autograd",
    "DdpComparisonTest": "DDP under autograd",
}
"""The suites that are run, by the name of PyTorch's class, each with its area."""

FLOORS: Final = {
    "autograd": 85,
    "optimizer": 4,
    "RemoteModule": 13,
    "parameter server": 1,
    "reinforcement learning": 1,
    "rpc": 170,
}
"""How many tests of an area must pass."""

FAST: Final = (
    "RpcTest.test_add",
    "RpcTest.test_nested_rpc",
    "RpcTest.test_py_tensors",
    "RpcTest.test_nested_rref",
    "RpcTest.test_async_function_chained",
    "RpcTest.test_py_function_exception",
    "TensorPipeAgentRpcTest.test_nested_rref_sparse",
    "DistAutogradTest.test_autograd_context",
    "DistAutogradTest.test_graph_for_py_nested_call",
    "DistAutogradTest.test_backward_simple",
    "DistAutogradTest.test_backward_rref_nested",
    "DistAutogradTest.test_backward_unused_send_function",
    "DistAutogradTest.test_trainer_ps",
    "TensorPipeAgentDistAutogradTest.test_embedding_bag_with_no_grad_tensors",
    "DistOptimizerTest.test_dist_optim_none_grads",
    "RemoteModuleTest.test_forward_sync",
    "RemoteModuleTest.test_remote_parameters",
    "DdpUnderDistAutogradTest.test_backward_ddp_inside",
    "DdpComparisonTest.test_ddp_dist_autograd_local_vs_remote",
    "ReinforcementLearningRpcTest.test_rl_rpc",
    "ParameterServerTest.test_batch_updating_parameter_server",
)
"""A test or more of each area, together about a minute."""


@dataclass(frozen=True)
class Case:
    """One test of PyTorch's."""

    suite: str
    test: str
    test_class: type[unittest.TestCase]

    @property
    def name(self) -> str:
        """The name that it has in `left_out` and in what is printed."""
        return f"{self.suite}.{self.test}"

    @property
    def area(self) -> str:
        return AREAS[self.suite]


def compose(*, variants: bool) -> list[Case]:
    """Import PyTorch's tests and return them, in order.

    Args:
        variants: whether ours take the place of the tests that assert faults of torch's.
    """
    # Late, since these import what is tested.
    with aliases.lenient_script():
        from torch.testing._internal.distributed import rpc_utils
    from tests.conformance import forked

    _check_suites(rpc_utils)
    replacing = _variants() if variants else {}
    cases = []
    for suite in AREAS:
        original = getattr(rpc_utils, suite)
        if suite in replacing:
            original = type(suite, (replacing[suite], original), {})
        composed: Any = rpc_utils.generate_tests("", forked.Forked, [original], __name__)[suite]
        globals()[suite] = composed  # PyTorch says so: some tests pickle their class
        names = unittest.defaultTestLoader.getTestCaseNames(composed)
        cases += [Case(suite, test, composed) for test in names]
    _check_names(cases)
    return cases


def _variants() -> dict[str, type[Any]]:
    from tests.conformance.variants import VARIANTS

    return VARIANTS


def _check_suites(rpc_utils: ModuleType) -> None:
    """Raise `LookupError` unless every suite of PyTorch's is run, or left out by name."""
    groups = [getattr(rpc_utils, name) for name in vars(rpc_utils) if name.endswith("_TESTS")]
    suites = {suite.__name__ for group in groups for suite in group}
    if unknown := suites ^ {*AREAS, *SUITES_LEFT_OUT}:
        raise LookupError(f"neither run nor left out, or not there: {', '.join(sorted(unknown))}")


def _check_names(cases: list[Case]) -> None:
    """Raise `LookupError` if a list of ours names a test that there is not."""
    stale = {*LEFT_OUT, *SKIPPED, *FAST} - {case.name for case in cases}
    if stale:
        raise LookupError(f"there is no test named {', '.join(sorted(stale))}")
    if contradictory := set(FAST) & set(LEFT_OUT):
        raise LookupError(f"in the fast subset and left out: {', '.join(sorted(contradictory))}")
