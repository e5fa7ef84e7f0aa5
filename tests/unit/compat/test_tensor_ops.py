"""Which of torch's functions others may call: operators on tensors, and nothing that does more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zmq_autograd.compat.rpc import tensor_ops

LOAD_OR_RUN = (
    *("load", "save", "from_file", "frombuffer", "from_numpy", "from_dlpack", "compile", "jit"),
    *("hub", "serialization", "import_ir_module", "import_ir_module_from_buffer", "parse_ir"),
    *("classes", "ops", "library", "_C", "fork", "wait", "export", "package", "multiprocessing"),
    *("typename", "vmap", "cond", "while_loop", "storage", "UntypedStorage", "utils", "os", "sys"),
)
CHANGE_THE_PROCESS = (
    *("manual_seed", "seed", "initial_seed", "set_rng_state", "set_num_threads"),
    *("set_num_interop_threads", "set_default_dtype", "set_default_device", "set_printoptions"),
    *("set_grad_enabled", "set_flush_denormal", "set_anomaly_enabled", "set_autocast_enabled"),
    *("clear_autocast_cache", "use_deterministic_algorithms", "set_deterministic_debug_mode"),
    *("set_warn_always", "set_float32_matmul_precision", "inference_mode", "no_grad"),
)
SHOW_OR_TRUST_MEMORY = (
    *("empty", "empty_like", "empty_strided", "as_strided", "as_strided_copy", "resize_as_"),
    *("fbgemm_linear_fp16_weight", "fbgemm_pack_gemm_matrix_fp16", "quantized_gru_cell"),
    *("mkldnn_rnn_layer", "cudnn_convolution", "sparse_coo_tensor", "sparse_csr_tensor"),
    *("native_batch_norm", "native_layer_norm", "batch_norm_elemt", "batch_norm_stats"),
)
OF_A_TENSOR = (
    *("set_", "resize_", "data_ptr", "untyped_storage", "storage", "numpy", "share_memory_"),
    *("backward", "register_hook", "requires_grad_", "retain_grad", "apply_", "map_", "map2_"),
    *("new", "new_empty", "as_strided_", "module_load", "record_stream", "pin_memory", "data"),
    *("__reduce__", "__reduce_ex__", "__setstate__", "__deepcopy__", "__class__", "__init__"),
    *("__dict__", "__getattribute__", "__torch_function__", "__array__", "__dlpack__", "type"),
)


@pytest.mark.parametrize("name", [*LOAD_OR_RUN, *CHANGE_THE_PROCESS, *SHOW_OR_TRUST_MEMORY])
def test_what_is_dangerous_has_no_name(name: str) -> None:
    for space in ("torch", "torch.nn.functional", "torch.ops.aten", "builtins", "torch.nn"):
        assert f"{space}:{name}" not in tensor_ops.operators()
        assert f"{space}:{name}" not in tensor_ops.aten_operators()


@pytest.mark.parametrize("name", OF_A_TENSOR)
def test_what_a_tensor_stands_on_is_no_method(name: str) -> None:
    assert name not in tensor_ops.tensor_methods()
    assert f"torch.Tensor:{name}" not in tensor_ops.operators()
    assert f"torch.ops.aten:{name}" not in tensor_ops.aten_operators()


@pytest.mark.parametrize(
    "name",
    ["eval", "exec", "open", "compile", "getattr", "setattr", "__import__", "print", "input"],
)
def test_of_pythons_builtins_only_a_few_are_there(name: str) -> None:
    assert f"builtins:{name}" not in tensor_ops.operators()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("torch:add", torch.add),
        ("torch:matmul", torch.matmul),
        ("torch:stack", torch.stack),
        ("torch:split", torch.split),
        ("torch:einsum", torch.einsum),
        ("torch:ones", torch.ones),
        ("torch.Tensor:add_", Tensor.add_),
        ("torch.Tensor:view", Tensor.view),
        ("torch.linalg:multi_dot", torch.linalg.multi_dot),
        ("torch.fft:rfft", torch.fft.rfft),
        ("torch.nn.functional:relu", nn.functional.relu),
        ("torch.nn.functional:linear", nn.functional.linear),
        ("torch.nn.functional:max_pool2d", nn.functional.max_pool2d),
        ("torch.nn:Linear", nn.Linear),
        ("builtins:min", min),
    ],
)
def test_operators_and_layers_are_there(name: str, function: object) -> None:
    assert tensor_ops.operators()[name] is function


def test_the_operators_of_aten_are_those_that_torch_offers() -> None:
    aten = tensor_ops.aten_operators()
    assert aten["torch.ops.aten:add"] is torch.ops.aten.add
    assert aten["torch.ops.aten:add.Tensor"] is torch.ops.aten.add.Tensor
    assert "torch.ops.aten:max_pool2d_with_indices_backward" not in aten


def test_every_operator_has_a_public_name_and_can_be_called() -> None:
    for name, function in tensor_ops.operators().items():
        space, _, key = name.partition(":")
        is_method = space == "torch.Tensor"
        assert callable(function)
        assert not key.startswith("_") or (is_method and key.startswith("__"))
