"""Two blocking workers, and what one has of the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import DEADLINE, memory_endpoint
from zmq_autograd import blocking


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close the background loop after each test, with all that a failed one has left open."""
    yield
    blocking.current_portal().close()


@pytest.fixture
def bob() -> Iterator[blocking.Worker]:
    """A worker."""
    with blocking.Worker("bob", listen=memory_endpoint()) as bob:
        yield bob


@pytest.fixture
def alice(bob: blocking.Worker) -> Iterator[blocking.Worker]:
    """A worker that leaves before `bob`."""
    with blocking.Worker("alice") as alice:
        yield alice


@pytest.fixture
def remote(alice: blocking.Worker, bob: blocking.Worker) -> blocking.RemoteWorker:
    """What `alice` has of `bob`."""
    found: blocking.RemoteWorker = alice.connect(bob.endpoints[0], timeout=DEADLINE)
    return found
