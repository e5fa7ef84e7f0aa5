"""Tests' side of `learner`: runs chains of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq_autograd as za
from tests.faults.victims import DEADLINE_SECONDS, Victim


class Learner(Victim):
    """A worker in a process of its own that takes part in passes."""

    MODULE = "tests.faults.learner"

    async def in_backward(self) -> None:
        """Wait until it holds a pass up."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            line = await asyncio.to_thread(self.heard)
        assert line == "in backward", f"learner {self.name!r} said {line!r}"


@contextmanager
def learners(folder: Path, *names: str) -> Iterator[list[Learner]]:
    """Run learners, each of which calls the one after it; they are killed on the way out."""
    started: list[Learner] = []
    endpoints = [f"ipc://{folder}/{name}" for name in names]
    try:
        for index, name in enumerate(names):
            following = endpoints[index + 1 : index + 2]
            options = ["--next", *following] if following else []
            started.append(Learner(name, *options, listen=endpoints[index]))
        for learner in started:
            learner.started()
        yield started
    finally:
        for learner in started:
            learner.close()


async def contexts_of(remote: za.RemoteWorker) -> list[dict[str, Any]]:
    """Return what `remote` says of its contexts."""
    reply = await remote.request(za.messages.Status(), timeout=DEADLINE_SECONDS)
    assert isinstance(reply, za.messages.StatusResponse)
    contexts: list[dict[str, Any]] = reply.status["contexts"]
    return contexts


async def until_none_left(remotes: list[za.RemoteWorker]) -> None:
    """Wait until none of `remotes` has a context, where nothing tells of it."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while any([await contexts_of(remote) for remote in remotes]):
            await asyncio.sleep(0.01)
