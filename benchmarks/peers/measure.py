"""What all peers share: the client's command loop and the clock.

A client reads one JSON command a line from its standard input and answers with one JSON line; it
lives as long as the whole run, so that every round meets a warm connection.  It knows nothing of
how tensors travel: that is the `Client` it is given.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP_CALLS = 3
LEAST_CALLS = 5


class Client(Protocol):
    async def echo(self, tensor: Tensor) -> Tensor:
        """Send the tensor and return what came back."""

    async def flood(self, tensor: Tensor, in_flight: int, until: float) -> int:
        """Keep `in_flight` echoes under way until `perf_counter()` is `until`; return how many."""


async def measure_echo(client: Client, tensor: Tensor, seconds: float) -> dict[str, Any]:
    """Return the median round trip in seconds, one call at a time."""
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < LEAST_CALLS or perf_counter() < end:
        start = perf_counter()
        await client.echo(tensor)
        times.append(perf_counter() - start)
    return {"seconds": statistics.median(times), "calls": len(times)}


async def measure_flood(
    client: Client, tensor: Tensor, seconds: float, in_flight: int
) -> dict[str, Any]:
    """Return the seconds per call with `in_flight` calls under way."""
    start = perf_counter()
    calls = await client.flood(tensor, in_flight, start + seconds)
    return {"seconds": (perf_counter() - start) / calls, "calls": calls}


async def answer_commands(client: Client) -> None:
    """Measure what standard input asks for, until it ends."""
    torch.set_num_threads(1)
    checked: set[int] = set()
    # Read in a thread: between commands the client's loop goes on, as a program's would.
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        tensor = torch.arange(command["bytes"] // 8, dtype=torch.float64)
        for _ in range(WARM_UP_CALLS):
            returned = await client.echo(tensor)
        if command["bytes"] not in checked:
            if not torch.equal(returned, tensor):
                raise RuntimeError(f"the echo of {command['bytes']} bytes came back changed")
            checked.add(command["bytes"])
        del returned
        gc.collect()
        if command["in_flight"] == 1:
            result = await measure_echo(client, tensor, command["seconds"])
        else:
            result = await measure_flood(client, tensor, command["seconds"], command["in_flight"])
        print(json.dumps(result), flush=True)
