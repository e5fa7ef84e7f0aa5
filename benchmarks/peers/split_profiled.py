"""The members of `split_this_package` with timers around the parts of the package."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from time import process_time
from typing import Any

from timers import Timers, replace_everywhere

import zmq_autograd as za
from peers.members import run_member
from peers.split_this_package import ContextMember, ThisPackage
from zmq_autograd.wire import codec

MODEL, REST = "the model", "asyncio, tasks, other calls"
PROCESS = "all"
HOPS = "hops between threads"

# What is timed, and the rows that it is counted to.
SECTIONS = {
    "torch's engine": ("autograd.calls:_run_engine",),
    "torch's accumulators": ("autograd.accumulate:_run_accumulators",),
    "graph: record": ("autograd.record", "autograd.functions"),
    "graph: walk and plan": ("autograd.local_pass:LocalPass.__init__",),
    "graph: run stages": ("autograd.local_pass:LocalPass.run",),
    "contexts and passes": (
        "engine.contexts",
        "engine.context",
        "engine.local_context",
        "engine.distributed_pass",
        "engine.losses",
        "engine.places",
    ),
    "messages: encode": ("wire.codec:encode",),
    "messages: decode": ("wire.codec:open_envelope",),
    "session and sockets": ("node.channel:Channel.frames_received", "node.channel:Channel._send"),
    "compute threads": ("node.compute:_run_under",),
}
# What a step would not do if its gradients were sent back by hand.
ENGINE = ("graph: record", "graph: walk and plan", "graph: run stages", "contexts and passes")


@dataclass(frozen=True)
class Profile:
    """What one process did.

    Attributes:
        seconds: of CPU, by row; of the clock, for `HOPS`.
        messages: how many it sent, by type.
    """

    seconds: dict[str, float]
    messages: dict[str, int]

    def per_step(self, before: Profile, steps: int) -> Profile:
        """Return what came since `before`, for each of `steps`."""
        return Profile(
            {row: (s - before.seconds.get(row, 0)) / steps for row, s in self.seconds.items()},
            {kind: (n - before.messages.get(kind, 0)) / steps for kind, n in self.messages.items()},
        )


class ProfiledMember(ContextMember):
    """Counts what this process does, from `watch` on."""

    def __init__(self, worker: za.Worker) -> None:
        self._timers = Timers()
        self._messages: Counter[str] = Counter()
        for section, names in SECTIONS.items():
            for name in names:
                self._timers.time(name, section)
        self._timers.time_thread_hops(HOPS)
        self._count_messages()
        super().__init__(worker)
        worker.register(self.watch)
        worker.register(self.read)

    async def watch(self) -> None:
        """Begin with the running loop and the stage; again in the other process."""
        self._timers.time_loop(asyncio.get_running_loop(), REST)
        self.part.stage.forward = self._timers.timed(self.part.stage.forward, MODEL)
        if not self.is_last:
            await self.following.call("watch")

    async def read(self) -> list[tuple[dict[str, float], dict[str, int]]]:
        """Return the fields of a `Profile` for each process."""
        seconds = self._timers.seconds | {PROCESS: process_time()}
        own = [(dict(seconds), dict(self._messages))]
        return own if self.is_last else own + await self.following.call("read")

    def _count_messages(self) -> None:
        encode = codec.encode

        def counting(message: Any, *arguments: Any) -> Any:
            self._messages[type(message).__name__] += 1
            return encode(message, *arguments)

        replace_everywhere(encode, counting)


if __name__ == "__main__":
    run_member(ProfiledMember, ThisPackage)
