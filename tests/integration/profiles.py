"""What tests of profiles compute, and find in them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler, profiler_legacy

import zmq_autograd as za
from tests.integration.fleets import Fleet, running

PROFILES: list[Any] = [torch.profiler.profile, profiler.profile, profiler_legacy.profile]

x = torch.arange(6.0).reshape(2, 3)


def product(a: Tensor) -> Tensor:
    return torch.mm(a, a.T)


def events_of(profile: Any) -> list[Any]:
    events = profile.events() if hasattr(profile, "events") else profile.function_events
    return list(events)


def named(profile: Any, name: str) -> list[Any]:
    return [event for event in events_of(profile) if event.name == name]


def only(profile: Any, name: str) -> Any:
    (event,) = named(profile, name)
    return event


def is_within(inner: Any, outer: Any) -> bool:
    inner, outer = inner.time_range, outer.time_range
    return bool(outer.start <= inner.start <= inner.end <= outer.end)


def set_up_kineto() -> None:
    """Have Kineto set up what it keeps for good, so that no test seems to leave it behind."""
    with torch.profiler.profile():
        pass


@asynccontextmanager
async def profiled_chain() -> AsyncIterator[Fleet]:
    """Run alice, bob and carol; bob's `middle` computes and calls carol's `product`."""
    async with running("alice", "bob", "carol") as fleet:
        fleet["carol"].register(product)
        carol = await fleet.way("bob", "carol")

        async def middle(a: Tensor) -> Any:
            return await carol.call("product", await za.compute(torch.relu, a))

        fleet["bob"].register(middle)
        yield fleet
