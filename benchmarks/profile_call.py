"""Where a call's time goes: cProfile in the client's and in the server's event loop.

    python benchmarks/profile_call.py [--bytes 64] [--in-flight 64] [--function echo_in_thread]

cProfile makes every Python call dearer, so trust the order of the rows more than their times; what
the loop waits for shows as `poll`.  Compute threads are not profiled, only what the loop pays.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import pstats
import subprocess
import sys
from time import perf_counter

import torch
from machine import describe
from peers.this_package import ZmqAutograd, make_server

import zmq_autograd as za

WARM_UP_CALLS = 200
ROWS = 25


def report(profile: cProfile.Profile, sort: str) -> str:
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats(sort).print_stats(ROWS)
    return text.getvalue()


async def serve() -> None:
    profile = cProfile.Profile()
    worker = make_server()

    # `async def`, so that both run in the loop's thread, which is the one to be profiled.
    @worker.register
    async def start_profile() -> None:
        profile.enable()

    @worker.register
    async def stop_profile(sort: str) -> str:
        profile.disable()
        return report(profile, sort)

    async with worker:
        print(worker.endpoints[0], flush=True)
        await worker.serve_forever()


async def measure(endpoint: str, arguments: argparse.Namespace) -> None:
    function, size, in_flight = arguments.function, arguments.bytes, arguments.in_flight
    seconds, sort = arguments.seconds, arguments.sort
    tensor = torch.zeros(size // 8, dtype=torch.float64)
    async with za.connect(endpoint) as remote:
        client = ZmqAutograd(remote, function)
        for _ in range(WARM_UP_CALLS):
            await client.echo(tensor)
        start = perf_counter()
        calls = await client.flood(tensor, in_flight, start + seconds)
        plain = (perf_counter() - start) / calls

        await remote.call("start_profile")
        profile = cProfile.Profile()
        profile.enable()
        start = perf_counter()
        calls = await client.flood(tensor, in_flight, start + seconds)
        profiled = (perf_counter() - start) / calls
        profile.disable()
        server = await remote.call("stop_profile", sort)
    print(f"client, {calls} calls\n{report(profile, sort)}\nserver\n{server}")
    print(f"{function} of {size} B, {in_flight} in flight: {1e6 * plain:.1f} us a call,", end=" ")
    print(f"{1e6 * profiled:.1f} us under the profilers\n{describe()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--function", choices=["echo", "echo_in_thread"], default="echo")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--sort", choices=["tottime", "cumtime"], default="tottime")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        asyncio.run(serve())
        return
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True
    )
    try:
        endpoint = server.stdout.readline().strip()
        asyncio.run(measure(endpoint, arguments))
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
