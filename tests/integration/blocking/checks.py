"""What the tests of the blocking surface compare."""

from __future__ import annotations

import torch
from torch import Tensor


def same(result: Tensor, expected: Tensor | None) -> bool:
    return expected is not None and torch.equal(result, expected)
