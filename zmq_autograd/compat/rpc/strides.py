"""Tensors keep their strides, where that costs little: a transposed one arrives as one.

What travels is contiguous.  A tensor that requires grad arrives so, too: another layout would put a
copy on its graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

MAX_SPREAD: Final = 4
"""How many times the memory of its elements a tensor may take for the sake of its strides."""


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that `tensor` is to arrive with, none for a contiguous one."""
    if tensor.layout is not torch.strided or tensor.is_contiguous() or tensor.requires_grad:
        return ()
    strides = tensor.stride()
    return strides if _can_have(tensor.shape, strides) else ()


def with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """Return `tensor` with these strides; as it is if there are none.

    Raises:
        ValueError: it cannot have them.
    """
    if not strides:
        return tensor
    if len(strides) != tensor.dim() or any(type(stride) is not int for stride in strides):
        raise ValueError(f"expected {tensor.dim()} strides, got {list(strides)[:65]}")
    if tensor.layout is not torch.strided or not _can_have(tensor.shape, strides):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} cannot have strides {strides}")
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def _can_have(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether no two elements would share memory, and the memory be not too much."""
    elements = extent = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        elements *= size
        if size > 1:
            if stride < extent:
                return False
            extent += stride * (size - 1)
    return elements > 0 and extent <= MAX_SPREAD * elements
