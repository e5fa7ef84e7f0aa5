"""Sparse (COO) tensors as the two plain ones that they travel as: their indices and their values.

Owns what must be true of these together.  Torch's kernels write to wherever an index points, so
none is taken on trust, neither from the wire nor from a user: torch does not check them either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zmq_autograd.wire.limits import MAX_ELEMENTS


def indices_of(tensor: Tensor) -> Tensor:
    """Return where the elements of `tensor` are: int64, ``[sparse dimensions, elements]``."""
    return tensor._indices()


def values_of(tensor: Tensor) -> Tensor:
    """Return the elements of `tensor`: ``[elements, *dense dimensions]``, without the graph."""
    return tensor.detach()._values()


def assembled(indices: Tensor, values: Tensor, shape: list[int], *, coalesced: bool) -> Tensor:
    """Return the sparse tensor of parts that `problem_of` and `problem_of_shapes` found right.

    It takes their memory over.
    """
    return torch.sparse_coo_tensor(
        indices, values, shape, is_coalesced=coalesced, check_invariants=False
    )


def problem_of_shapes(indices: Sequence[int], values: Sequence[int], shape: Sequence[int]) -> str:
    """Return why tensors of these shapes are not the parts of one of `shape`, empty if they are."""
    if len(indices) != 2 or not values:
        return f"indices of {len(indices)} and values of {len(values)} dimensions"
    sparse_dims, elements = indices
    if values[0] != elements:
        return f"{elements} indices for {values[0]} values"
    if sparse_dims + len(values) - 1 != len(shape) or list(shape[sparse_dims:]) != list(values[1:]):
        return f"{sparse_dims} sparse dimensions and values of another shape than its own"
    # Even where a dimension is 0: `_positions` counts on it.
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        return f"more than {MAX_ELEMENTS} elements"
    return ""


def problem_of(indices: Tensor, shape: Sequence[int], *, coalesced: bool) -> str:
    """Return what is wrong with `indices` of a tensor of `shape`, empty if nothing is.

    Args:
        indices: as `indices_of` returns them.
        shape: the tensor's.
        coalesced: they are said to be in order, and each there once.
    """
    sparse_dims, elements = indices.shape
    if elements and sparse_dims:
        sizes = torch.tensor(list(shape[:sparse_dims]))
        if int(indices.min()) < 0 or bool((indices.amax(1) >= sizes).any()):
            return "an index is out of bounds"
    if not coalesced or elements < 2:
        return ""
    if not sparse_dims:
        return "several values of one element, though said to be coalesced"
    positions = _positions(indices, shape)
    if bool((positions[1:] <= positions[:-1]).any()):
        return "indices are not in order or not unique, though said to be coalesced"
    return ""


def _positions(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Return for each column of `indices` how many elements of a dense tensor come before it."""
    positions = indices[0].clone()
    for row, size in zip(indices[1:], shape[1:], strict=False):
        positions.mul_(size).add_(row)
    return positions
