"""Workers that offer what is profiled."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.helpers import Pair, connected
from tests.integration.fleets import Fleet
from tests.integration.profiles import product, profiled_chain, set_up_kineto


@pytest.fixture(scope="module", autouse=True)
def kineto() -> None:
    set_up_kineto()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with connected() as pair:
        pair.bob.register(product)
        yield pair


@pytest.fixture
async def chain() -> AsyncIterator[Fleet]:
    async with profiled_chain() as fleet:
        yield fleet
