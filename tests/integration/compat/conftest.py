"""One worker that calls itself, which takes the same way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import DEADLINE
from tests.integration import compat_functions as program
from zmq_autograd import blocking
from zmq_autograd.compat import rpc


@pytest.fixture
def options(tmp_path: Path) -> rpc.TensorPipeRpcBackendOptions:
    """Where to meet."""
    return rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{tmp_path}/store", rpc_timeout=DEADLINE
    )


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Leave, and close the background loop, after each test, whatever became of it."""
    program.released.clear()
    yield
    program.released.set()
    if rpc._is_current_rpc_agent_set():
        rpc.shutdown(graceful=False)
    blocking.current_portal().close()


@pytest.fixture
def me(options: rpc.TensorPipeRpcBackendOptions) -> str:
    """Take part, alone, and allow the program's module; return this worker's name."""
    rpc.allow_module(program.__name__)
    rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
    return "me"
