"""Which of torch's functions another worker may call: its tensor operators, in one closed table.

An operator gets in if it is public, if torch declares it in its operator schemas, and if one of
these takes or returns a tensor.  What only changes the process (``torch.set_num_threads``), loads,
saves or compiles has no such schema.  Left out of the rest is what reads files, shows memory that
the tensor does not own, takes pointers as tensors, or runs a backward pass.  To these come torch's
tensor functions that are written in Python, the layers of `torch.nn`, and a few plain builtins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any, Final

import torch
from torch import Tensor, nn

Operator = Callable[..., Any]

_SPACES: Final = (
    # What is scanned, under which name, and how its operators begin in the schemas.
    (torch, "torch", ("",)),
    (nn.functional, "torch.nn.functional", ("",)),
    (torch.linalg, "torch.linalg", ("linalg_",)),
    (torch.fft, "torch.fft", ("fft_",)),
    (torch.special, "torch.special", ("special_",)),
    (torch.sparse, "torch.sparse", ("_sparse_", "sparse_")),
)

_PYTHON: Final = {
    "torch": torch.functional.__all__,
    "torch.sparse": ("sum",),
    "torch.nn.functional": (
        *("relu", "glu", "hardtanh", "relu6", "elu", "selu", "celu", "leaky_relu", "rrelu"),
        *("tanhshrink", "softsign", "softmin", "softmax", "gumbel_softmax", "log_softmax", "tanh"),
        *("sigmoid", "hardsigmoid", "silu", "mish", "hardswish", "threshold", "dropout"),
        *("alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"),
        *("embedding", "embedding_bag", "batch_norm", "instance_norm", "layer_norm", "rms_norm"),
        *("group_norm", "local_response_norm", "normalize", "ctc_loss", "nll_loss"),
        *("poisson_nll_loss", "gaussian_nll_loss", "kl_div", "cross_entropy"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits", "smooth_l1_loss"),
        *("huber_loss", "l1_loss", "mse_loss", "margin_ranking_loss", "hinge_embedding_loss"),
        *("multilabel_margin_loss", "soft_margin_loss", "multilabel_soft_margin_loss"),
        *("cosine_embedding_loss", "multi_margin_loss", "triplet_margin_loss", "interpolate"),
        *("upsample", "grid_sample", "affine_grid", "pad", "unfold", "fold"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_unpool1d", "max_unpool2d"),
        *("max_unpool3d", "lp_pool1d", "lp_pool2d", "lp_pool3d", "adaptive_max_pool1d"),
        *("adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_avg_pool2d"),
        *("adaptive_avg_pool3d", "multi_head_attention_forward"),
    ),
}
"""Tensor functions that torch has written in Python, where no schema says what they do."""

_TENSOR_METHODS: Final = (
    *("float", "double", "half", "bfloat16", "int", "long", "short", "char", "byte", "bool"),
    *("cfloat", "cdouble", "tolist", "unique", "ndimension", "nelement"),
    *("__add__", "__sub__", "__mul__", "__truediv__", "__floordiv__", "__mod__", "__pow__"),
    *("__matmul__", "__neg__", "__abs__", "__radd__", "__rsub__", "__rmul__", "__rtruediv__"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__and__", "__or__", "__xor__"),
    *("__invert__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__len__"),
    *("__getitem__", "__setitem__", "__bool__", "__float__", "__int__"),
)
"""Methods of tensors that have no schema of their name."""

_LEFT_OUT: Final = frozenset(
    (
        *("as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter"),  # others' memory
        *("empty", "empty_like", "empty_permuted", "empty_quantized", "empty_strided"),  # unwritten
        *("new_empty", "new_empty_strided", "resize", "resize_", "resize_as", "resize_as_"),
        *("resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_"),
        *("set_", "set_data", "data", "record_stream", "pin_memory"),  # what a tensor stands on
        *("backward", "retain_grad", "requires_grad_", "is_leaf", "output_nr"),  # the local graph
        *("sym_constrain_range", "sym_constrain_range_for_size", "batch_norm_gather_stats"),
    )
)

_LEFT_OUT_PREFIXES: Final = (
    *("fbgemm_", "quantized_", "choose_qparams", "mkldnn_", "miopen_", "cudnn_"),  # packed pointers
    *("sparse_", "unsafe_", "native_", "batch_norm_"),  # what nothing checks: indices, sizes
)

_LAYER_METHODS: Final = (
    *("__call__", "forward", "train", "eval", "zero_grad", "extra_repr"),
    *("float", "double", "half", "bfloat16"),
)
"""Methods of torch's own layers, and of all modules."""

_BUILTINS: Final[tuple[Operator, ...]] = (abs, all, any, divmod, len, max, min, round, sorted, sum)

_ATEN: Final = "torch.ops.aten"


@functools.cache
def operators() -> dict[str, Operator]:
    """Return the table: by name, ``torch:add`` or ``torch.Tensor:add_``, what may be called."""
    table: dict[str, Operator] = {
        f"builtins:{function.__name__}": function for function in _BUILTINS
    }
    for space, name, prefixes in _SPACES:
        for key, value in _declared(vars(space), prefixes, (BuiltinFunctionType,)):
            table[f"{name}:{key}"] = value
        for key in _PYTHON.get(name, ()):
            table[f"{name}:{key}"] = vars(space)[key]
    for key, value in tensor_methods().items():
        table[f"torch.Tensor:{key}"] = value
    for key, value in vars(nn).items():
        if _is_layer(value):
            table[f"torch.nn:{key}"] = value
    return table


@functools.cache
def tensor_methods() -> dict[str, Operator]:
    """Return what of a tensor's methods may be called."""
    methods: dict[str, Operator] = {}
    for kind in (torch._C.TensorBase, Tensor):
        methods.update(_declared(vars(kind), ("",), (MethodDescriptorType, FunctionType)))
        methods.update({key: vars(kind)[key] for key in _TENSOR_METHODS if key in vars(kind)})
    return methods


def layer_methods() -> tuple[str, ...]:
    """Return the names of what every `nn.Module` has and may be called."""
    return _LAYER_METHODS


@functools.cache
def names() -> dict[int, str]:
    """Return the name of each operator, by the ``id`` of the function."""
    return {id(function): name for name, function in operators().items()}


@functools.cache
def aten_operators() -> dict[str, Operator]:
    """Return the same operators as `torch.ops.aten` has them, with and without an overload.

    Those that torch offers nowhere else, backward formulas say, trust their arguments too much.
    """
    table: dict[str, Operator] = {}
    public = {name.partition(":")[2] for name in operators() if name.startswith("torch")}
    for key in sorted(_names_with_tensors() & public):
        packet = getattr(torch.ops.aten, key)
        table[f"{_ATEN}:{key}"] = packet
        for overload in packet.overloads():
            table[f"{_ATEN}:{key}.{overload}"] = getattr(packet, overload)
    return table


def aten_name(function: object) -> str | None:
    """Return the name of one of `torch.ops.aten`'s operators, None for anything else."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"{_ATEN}:{str(function).removeprefix('aten.')}"
    return None


def _declared(
    members: Mapping[str, Any],
    prefixes: tuple[str, ...],
    wanted: tuple[type, ...],
) -> Iterator[tuple[str, Operator]]:
    """Yield those of `members` that torch's schemas declare to be tensor operators."""
    declared = _names_with_tensors()
    for key, value in members.items():
        if type(value) not in wanted or key.startswith("_") or _is_left_out(key):
            continue
        if any(prefix + key in declared for prefix in prefixes):
            yield key, value


@functools.cache
def _names_with_tensors() -> frozenset[str]:
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        values = [*schema.arguments, *schema.returns]
        if space != "aten" or any(value.name == "filename" for value in values):
            continue
        if any("Tensor" in str(value.type) for value in values):
            found.add(name)
    return frozenset(found)


def _is_left_out(key: str) -> bool:
    return key in _LEFT_OUT or key.startswith(_LEFT_OUT_PREFIXES)


def _is_layer(value: object) -> bool:
    return value is nn.Parameter or (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__.startswith("torch.nn.modules.")
    )
