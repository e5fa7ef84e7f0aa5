"""Tests that take the place of one of PyTorch's that asserts a fault of its own.

This module, too, is to be imported after `aliases.install`.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.testing._internal.dist_utils import dist_init, worker_name

from zmq_autograd.compat import autograd, rpc


class DistAutogradVariants:
    """For `DistAutogradTest`."""

    @dist_init
    def test_backward_unused_send_function(self: Any) -> None:
        """The result of a call is not used: PyTorch's test asserts that backward hangs then."""
        next_rank = (self.rank + 1) % self.world_size
        with autograd.context() as context_id:
            t1 = torch.rand((3, 3), requires_grad=True)
            t2 = torch.rand((3, 3), requires_grad=True)
            rpc.rpc_sync(worker_name(next_rank), torch.add, args=(t1, t2))
            autograd.backward(context_id, [torch.mul(t1, t2).sum()])
            gradients = autograd.get_gradients(context_id)
        assert set(gradients) == {t1, t2}
        assert torch.equal(gradients[t1], t2)
        assert torch.equal(gradients[t2], t1)


VARIANTS: Final[dict[str, type[Any]]] = {"DistAutogradTest": DistAutogradVariants}
"""For each suite some of whose tests are replaced, the class that defines these."""
