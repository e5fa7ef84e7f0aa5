"""PyTorch's fixture for the agent under test, but with processes forked instead of spawned.

To be imported after `aliases.install`.
"""

from __future__ import annotations

import time
from functools import wraps
from typing import Any, Final

import torch
from torch import distributed
from torch.testing._internal.common_distributed import MultiProcessTestCase
from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import (
    TensorPipeRpcAgentTestFixture,
)

GLOO_SECONDS: Final = 0.2
"""Seconds that a thread of gloo's has to let go of its last tensor, see `destroy_process_group`."""

_destroy_process_group = distributed.destroy_process_group


@wraps(_destroy_process_group)
def destroy_process_group(*args: Any, **kwargs: Any) -> None:
    """Destroy a process group when its threads are idle.

    Torch joins them while it holds Python's lock, also when the last module that refers to the
    group is collected right afterwards. A thread that waits for that lock just then, to let go of
    a tensor, waits for ever: on TensorPipe too, but more often with another Python thread about.
    """
    time.sleep(GLOO_SECONDS)
    _destroy_process_group(*args, **kwargs)


distributed.destroy_process_group = destroy_process_group


class Forked(TensorPipeRpcAgentTestFixture, MultiProcessTestCase):
    """Starts the processes of a test from the warm one; all else is PyTorch's."""

    def _spawn_processes(self) -> None:
        self._start_processes(torch.multiprocessing.get_context("fork").Process)

    def _check_return_codes(self, fn: object, elapsed: float) -> None:
        super()._check_return_codes(fn, elapsed)  # looks no further than rank 0
        exits = [process.exitcode for process in self.processes]
        if any(exits):
            raise AssertionError(f"exit statuses of the ranks: {exits}")
