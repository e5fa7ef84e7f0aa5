"""The tests of PyTorch's that are left out, by name, each for one of four reasons."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Reason(Enum):
    """Why a test cannot be run over anything but TensorPipe, or not without a GPU."""

    TORCHSCRIPT = "TorchScript"
    CUDA = "CUDA"
    INTERNALS = "TensorPipe's private internals"
    PICKLE = "the test itself pickles or sends an arbitrary class"


LEFT_OUT: Final[dict[str, tuple[Reason, str]]] = {
    "DistAutogradTest.test_trainer_ps_torchscript_functions": (
        Reason.TORCHSCRIPT,
        "a scripted function fetches an RRef",
    ),
    "RemoteModuleTest.test_forward_async_script": (
        Reason.TORCHSCRIPT,
        "a scripted function calls a RemoteModule",
    ),
    "RemoteModuleTest.test_forward_sync_script": (
        Reason.TORCHSCRIPT,
        "a scripted function calls a RemoteModule",
    ),
    "RpcTest.test_py_nested_pickle": (
        Reason.PICKLE,
        "sends an object of a class that uses the RPC pickler to be pickled",
    ),
    "RpcTest.test_use_rpc_pickler": (
        Reason.PICKLE,
        "replaces the pickler",
    ),
    "RpcTest.test_use_rref_after_shutdown": (
        Reason.PICKLE,
        "pickles an RRef",
    ),
    "RpcTest.test_wait_all_exit_early_builtin": (
        Reason.INTERNALS,
        "a future that fails in C++, which only torch's own agent can make",
    ),
    "RpcTest.test_wait_all_exit_early_python": (
        Reason.INTERNALS,
        "a future that fails in C++, which only torch's own agent can make",
    ),
    "RpcTest.test_wait_all_exit_early_script_function": (
        Reason.INTERNALS,
        "a future that fails in C++, which only torch's own agent can make",
    ),
    "RpcTest.test_server_process_global_profiler": (
        Reason.PICKLE,
        "makes torch's own profile on another worker, and has its C++ event objects sent",
    ),
    "TensorPipeAgentRpcTest.test_dynamic_rpc_existing_rank_can_communicate_with_new_rank_cuda": (
        Reason.CUDA,
        "needs two GPUs",
    ),
}
"""The reason and a remark, for each `Suite.test`."""

SKIPPED: Final = {
    "RpcTest.test_profiler_rpc_key_names": "PyTorch skips it on Linux: its issue 125365",
}
"""Tests that skip themselves, on TensorPipe too; they count as left out."""

SUITES_LEFT_OUT: Final = {
    "JitRpcTest": Reason.TORCHSCRIPT,
    "JitDistAutogradTest": Reason.TORCHSCRIPT,
    "JitFaultyAgentRpcTest": Reason.TORCHSCRIPT,
    "CudaRpcTest": Reason.CUDA,
    "CudaDistAutogradTest": Reason.CUDA,
    "CudaRemoteModuleTest": Reason.CUDA,
    "CudaDdpComparisonTest": Reason.CUDA,
    "TensorPipeAgentCudaRpcTest": Reason.CUDA,
    "TensorPipeCudaDistAutogradTest": Reason.CUDA,
    "FaultyAgentRpcTest": Reason.INTERNALS,
    "FaultyAgentDistAutogradTest": Reason.INTERNALS,
}
"""PyTorch's other suites, whole: their agent, their devices or their compiler are not here."""
