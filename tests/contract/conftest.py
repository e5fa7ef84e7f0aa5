"""The endpoints that the contract is tried on."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

_names = itertools.count()


@pytest.fixture(params=["tcp", "tcp6", "ipc", "memory"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An endpoint to listen at."""
    return {
        "tcp": "tcp://127.0.0.1:0",
        "tcp6": "tcp://[::1]:0",
        "ipc": f"ipc://{tmp_path}/s",
        "memory": f"memory://contract-{next(_names)}",
    }[request.param]
