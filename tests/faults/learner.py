"""A worker in a process of its own that takes part in passes, for tests to kill, freeze and count.

    learner.py bob --listen tcp://127.0.0.1:0 [--next ENDPOINT]

Prints ``listening on ENDPOINT INCARNATION`` once it runs, and ``in backward`` where it holds a pass
up.  It leaves when its standard input ends.  The tests' side is `learners`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import threading
from typing import Any, Final

import psutil
import torch
from torch import Tensor

import zmq_autograd as za

HELD_UP_SECONDS: Final = 60.0
"""How long a pass is held up at most: longer than any test waits for it."""

STEP_SECONDS: Final = 20.0
"""What a step of training may take that is not meant to run out of time."""

SHORT_SECONDS: Final = 0.05
"""What a step may take that is."""

FAILURES: Final = {0: "fail", 20: "fail_in_backward", 40: "hold_up_backward"}
"""By number of a step, modulo `FAILURE_PERIOD`: what it calls that fails, one step in twenty."""

FAILURE_PERIOD: Final = 60


class Learner:
    """What a learner offers: functions that share a leaf, and training through them."""

    def __init__(self, following: str | None) -> None:
        self.w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        self._following = following
        self._held_up = threading.Event()

    def offer_on(self, worker: za.Worker) -> None:
        """Register all of it."""
        for function in (
            self.scale,
            self.fail,
            self.fail_in_backward,
            self.hold_up_backward,
            self.go_on,
            self.call_next,
            self.through,
            self.in_vain,
            self.gradient,
            self.gradient_behind,
            self.train,
            self.step_many,
            self.resident_bytes,
        ):
            worker.register(function)

    # --- forward ---------------------------------------------------------------------------------

    def scale(self, x: Tensor) -> Tensor:
        return x * self.w

    def fail(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("in forward")

    def fail_in_backward(self, x: Tensor) -> Any:
        return hooked(x * self.w, self._fail)

    def hold_up_backward(self, x: Tensor) -> Any:
        """Have the pass wait here until `go_on` is called."""
        self._held_up.clear()
        return hooked(x * self.w, self._hold_up)

    async def through(self, x: Tensor, depth: int, function: str) -> Any:
        """Scale `x` here and on `depth` workers behind, and call `function` on the last one."""
        y = self.scale(x)
        if depth == 0:
            return self.scale(await (await self._next()).call(function, y))
        return self.scale(await (await self._next()).call("through", y, depth - 1, function))

    async def in_vain(self, x: Tensor) -> Tensor:
        """Scale `x`, and not use what the next worker makes of it."""
        await (await self._next()).call("scale", x)
        return self.scale(x)

    async def gradient(self) -> Tensor | None:
        """Return the gradient of the leaf in the current context."""
        context = za.current_context()
        assert context is not None
        return context.gradients().get(self.w)

    async def gradient_behind(self, depth: int) -> Any:
        """Return the gradient of the leaf of a worker so far behind this one."""
        following = await self._next()
        if depth == 0:
            return await following.call("gradient")
        return await following.call("gradient_behind", depth - 1)

    async def go_on(self) -> None:
        """Let what is held up go on."""
        self._held_up.set()

    async def call_next(self, function: str) -> Any:
        """Call `function` on the next worker."""
        return await (await self._next()).call(function)

    def _fail(self, _: Tensor) -> None:
        raise ZeroDivisionError("in backward")

    def _hold_up(self, _: Tensor) -> None:
        say("in backward")
        self._held_up.wait(HELD_UP_SECONDS)

    async def _next(self) -> za.RemoteWorker:
        worker = za.current_worker()
        assert worker is not None
        assert self._following is not None
        return await worker.connect(self._following)

    # --- training --------------------------------------------------------------------------------

    async def train(self, function: str, depth: int) -> Tensor:
        """Open a context, run a pass through the workers behind, and return its gradient."""
        worker = za.current_worker()
        assert worker is not None
        x = torch.ones(3, requires_grad=True)
        following = await self._next()
        async with worker.context() as ctx:
            await ctx.backward((await following.call("through", x, depth, function)).sum())
            return ctx.gradients()[x]

    async def step_many(self, start: int, count: int) -> list[int]:
        """Make so many steps from number `start`; return how many of each kind failed."""
        failed = dict.fromkeys(FAILURES.values(), 0)
        for number in range(start, start + count):
            function = FAILURES.get(number % FAILURE_PERIOD, "scale")
            try:
                await self._step(number, function)
            except (za.RemoteError, za.DeadlineExceeded):
                failed[function] += 1
        return list(failed.values())

    async def _step(self, number: int, function: str) -> None:
        worker = za.current_worker()
        assert worker is not None
        x = torch.full((3,), float(number % 7), requires_grad=True)
        timeout = SHORT_SECONDS if function == "hold_up_backward" else STEP_SECONDS
        following = await self._next()
        async with worker.context() as ctx:
            y = await following.call("through", x, 0, function)
            try:
                await ctx.backward(y.sum(), timeout=timeout)
            except za.DeadlineExceeded:
                await following.call("call_next", "go_on")
                raise
            assert torch.equal(ctx.gradients()[x], self.w.detach() ** 3)

    async def resident_bytes(self) -> int:
        """Return what this process takes in memory, without what is garbage."""
        gc.collect()
        return int(psutil.Process().memory_info().rss)


def hooked(x: Tensor, hook: Any) -> Any:
    tensor: Any = x
    tensor.register_hook(hook)
    return tensor


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def serve(worker: za.Worker) -> None:
    """Run `worker` until standard input ends."""
    async with worker:
        loop = asyncio.get_running_loop()
        serving = loop.create_task(worker.serve_forever())
        loop.add_reader(sys.stdin, serving.cancel)
        say(f"listening on {worker.endpoints[0]} {worker.incarnation}")
        try:
            await serving
        except asyncio.CancelledError:
            pass  # the test has closed our standard input
        finally:
            loop.remove_reader(sys.stdin)


async def main() -> None:
    torch.set_num_threads(1)  # there are enough processes for the processors
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--next", help="whom this one calls")
    arguments = parser.parse_args()
    worker = za.Worker(arguments.name, arguments.listen, drain=1.0)
    learner = Learner(arguments.next)
    learner.offer_on(worker)
    await serve(worker)


if __name__ == "__main__":
    asyncio.run(main())
