"""A worker, and a peer that knows nothing of this package."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import zmq_autograd as za
from tests.helpers import endpoint_of
from tests.integration.helpers_bare_peer import BarePeer, in_session


@pytest.fixture(params=["tcp", "tcp6", "ipc"])
async def bob(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[za.Worker]:
    """A worker with something to offer."""
    async with za.Worker("bob", listen=endpoint_of(request.param, tmp_path)) as bob:
        yield bob


@pytest.fixture
async def peer(bob: za.Worker) -> AsyncIterator[BarePeer]:
    """A peer that has a session with it."""
    async with in_session(bob.endpoints[0]) as peer:
        yield peer
