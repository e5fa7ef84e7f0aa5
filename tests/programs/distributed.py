"""Runs a random program on the workers of a fleet: calls are calls, passes are distributed ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

import zmq_autograd as za
from tests.programs.local import Frame, Run
from tests.programs.program import (
    WORKERS,
    Backward,
    Call,
    Collect,
    Custom,
    Finish,
    Gather,
    Hook,
    LocalStep,
    Outcome,
    Pass,
    Program,
    Start,
    Step,
    all_calls,
    leaf_site,
)
from tests.programs.record import FREED, LEAF_HOOK, InjectedFault, Key
from tests.programs.reference import roots_of, tag_of, tag_within

DEADLINE: Final = 5.0
"""Seconds after which a program hangs."""


ABORT_DEADLINE: Final = 2.0
"""Seconds in which all workers have heard that a pass was aborted."""

Peers = Sequence[Sequence[za.RemoteWorker]]
"""``peers[a][b]`` is what worker `a` has of worker `b`."""


class InjectedFailure(RuntimeError):
    """Raised by a handler, where a program says so."""


@dataclass
class Gate:
    """Where a started call waits when its body has run."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class DistributedRun(Run):
    """One run of a program on workers; what was seen is in `record`."""

    def __init__(self, program: Program, workers: Sequence[za.Worker], peers: Peers) -> None:
        """Make the leaves; nothing runs yet."""
        super().__init__(program)
        self._workers = workers
        self._peers = peers
        self._bodies = {call.number: call for body in program.trainers for call in all_calls(body)}
        self._worker_of: Mapping[int | None, int] = _workers_of_sites(program)
        self._gates: dict[str, Gate] = {}
        self._tasks: dict[str, asyncio.Task[list[Tensor]]] = {}

    async def run(self) -> None:
        """Run the program.

        Raises:
            TimeoutError: it hangs.
        """
        try:
            async with asyncio.timeout(DEADLINE):
                if len(self.program.trainers) == 1:
                    await self._run_trainer(0)
                else:
                    async with asyncio.TaskGroup() as group:
                        for trainer in range(len(self.program.trainers)):
                            group.create_task(self._run_trainer(trainer))
        finally:
            for task in self._tasks.values():
                task.cancel()

    async def _run_trainer(self, trainer: int) -> None:
        frame = Frame(trainer, trainer, tag_of(trainer))
        async with self._workers[trainer].context() as context:
            assert za.current_context() is context
            await self._run_body(frame, self.program.trainers[trainer])
            await self._collect(frame)

    # --- serving ---------------------------------------------------------------------------------

    async def serve(
        self, worker: int, trainer: int, tag: str, number: int, fails: bool, args: list[Tensor]
    ) -> Any:
        """Run the body of call `number` on `worker`, as its handler."""
        call = self._bodies[number]
        frame = Frame(worker, trainer, tag, args)
        gate = self._gates.get(tag)
        try:
            await self._run_body(frame, call.body, in_threads=call.in_threads)
            if gate is not None:
                gate.reached.set()
                await gate.release.wait()
            return _outcome(frame, call, fails)
        finally:
            if gate is not None:
                gate.over.set()

    def serve_in_thread(
        self, worker: int, trainer: int, tag: str, number: int, fails: bool, args: list[Tensor]
    ) -> Any:
        """Run a body that calls nobody, as a handler that is a plain function."""
        call = self._bodies[number]
        frame = Frame(worker, trainer, tag, args)
        for step in call.body:
            assert isinstance(step, LocalStep)
            self.step(frame, step)
        return _outcome(frame, call, fails)

    def gradients_on(self, worker: int) -> list[Tensor | None]:
        """Return the gradients of the leaves on `worker` in the current context."""
        context = za.current_context()
        assert context is not None
        gradients = context.gradients()
        leaves = self._leaves_on(worker)
        strange = [tensor for tensor in gradients if not any(tensor is leaf for leaf in leaves)]
        assert not strange, f"gradients of no leaf of {WORKERS[worker]}: {strange}"
        return [gradients.get(leaf) for leaf in leaves]

    def _leaves_on(self, worker: int) -> list[Tensor]:
        pairs = zip(self.program.leaves, self.leaves, strict=True)
        return [tensor for leaf, tensor in pairs if leaf.worker == worker]

    # --- bodies ----------------------------------------------------------------------------------

    async def _run_body(
        self, frame: Frame, body: tuple[Step, ...], *, in_threads: bool = False
    ) -> None:
        for step in body:
            match step:
                case Call():
                    frame.registers += await self._call(frame, step)
                case Gather():
                    calls = (self._call(frame, call) for call in step.calls)
                    for results in await asyncio.gather(*calls):
                        frame.registers += results
                case Start():
                    await self._start(frame, step.call)
                case Finish():
                    frame.registers += await self._finish(frame, step)
                case Backward():
                    await self._run_passes(frame, step.passes)
                case Collect():
                    await self._collect(frame)
                case _ if in_threads:
                    await za.compute(self.step, frame, step)
                case _:
                    self.step(frame, step)

    async def _call(self, frame: Frame, call: Call) -> list[Tensor]:
        for attempt in range(call.failures):
            await self._attempt(frame, call, attempt, fails=True)
        return await self._attempt(
            frame, call, call.failures, fails=call.outcome is Outcome.FAILURE
        )

    async def _attempt(
        self, frame: Frame, call: Call, attempt: int, *, fails: bool
    ) -> list[Tensor]:
        remote = self._peers[frame.worker][call.worker]
        tag = tag_within(frame.tag, call, attempt)
        is_plain = all(isinstance(step, LocalStep) for step in call.body)
        is_plain = is_plain and call.in_threads and tag not in self._gates
        function = "serve_in_thread" if is_plain else "serve"
        args = frame.get(call.args)
        with torch.no_grad() if call.no_grad else nullcontext():
            try:
                reply = await remote.call(
                    function, frame.trainer, tag, call.number, fails, args, timeout=DEADLINE
                )
            except za.RemoteError as error:
                if not fails or error.type_name != InjectedFailure.__name__:
                    raise
                return []
        assert not fails, f"call {tag} did not fail"
        if call.outcome is Outcome.TENSORS:
            return list(reply)
        assert reply == (None if call.outcome is Outcome.NONE else call.number)
        return []

    async def _start(self, frame: Frame, call: Call) -> None:
        tag = tag_within(frame.tag, call, 0)
        gate = self._gates[tag] = Gate()
        task = self._tasks[tag] = asyncio.create_task(self._call(frame, call))
        task.add_done_callback(lambda _: gate.reached.set())  # it went wrong: finishing it tells
        await gate.reached.wait()

    async def _finish(self, frame: Frame, step: Finish) -> list[Tensor]:
        tag = tag_within(frame.tag, self._bodies[step.number], 0)
        task, gate = self._tasks.pop(tag), self._gates[tag]
        if not step.cancels:
            gate.release.set()
            return await task
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled(), f"call {tag} ended before it was cancelled"
        await gate.over.wait()
        return []

    # --- passes ----------------------------------------------------------------------------------

    async def _run_passes(self, frame: Frame, passes: tuple[Pass, ...]) -> None:
        context = za.current_context()
        assert context is not None
        if passes[0].fails:
            await self._run_failing_pass(frame, context, passes[0])
            return
        all_roots = [roots_of(frame, one.roots) for one in passes]
        await asyncio.gather(
            *(
                context.backward(roots, grads, retain_graph=one.retain_graph, timeout=DEADLINE)
                for one, (roots, grads) in zip(passes, all_roots, strict=True)
            )
        )

    async def _run_failing_pass(self, frame: Frame, context: za.Context, one: Pass) -> None:
        roots, grads = roots_of(frame, one.roots)
        counts = self._own_counts(frame.trainer)
        error: Exception | None = None
        with self.record.switched_on(one.fault):
            try:
                await context.backward(
                    roots, grads, retain_graph=one.retain_graph, timeout=DEADLINE
                )
            except (RuntimeError, za.RemoteError) as raised:
                error = raised
        self._check_cause(frame, one, error)
        del error  # and what it holds on to
        await self._await_aborted(context)
        self._check_and_forget(frame.trainer, counts)
        if not one.retain_graph:
            await self._check_broken(context, roots, grads)

    async def _check_broken(
        self, context: za.Context, roots: list[Tensor], grads: list[Tensor | None]
    ) -> None:
        """Check that no pass runs any more, since parts of the graph are gone."""
        try:
            await context.backward(roots, grads, timeout=DEADLINE)
        except za.ContextError:
            return
        raise AssertionError("a pass ran where an aborted one may have freed parts of the graph")

    def _check_cause(self, frame: Frame, one: Pass, error: Exception | None) -> None:
        """Check that a pass of `frame` raised what went wrong, and where."""
        if one.meets_freed:
            assert FREED in str(error), f"raised {error!r} where parts of the graph are gone"
            return
        where = self._worker_of[one.fault]
        if isinstance(error, za.RemoteError):
            told = (error.type_name, error.worker)
            assert told == (InjectedFault.__name__, WORKERS[where]), str(error)
        else:
            assert type(error) is InjectedFault
        assert isinstance(error, InjectedFault) == (where == frame.worker), repr(error)

    async def _await_aborted(self, context: za.Context) -> None:
        """Wait until no worker takes part in a pass of `context` any more."""
        async with asyncio.timeout(ABORT_DEADLINE):
            while any(
                one["passes"]
                for worker in self._workers
                for one in worker.status()["contexts"]
                if one["context_id"] == context.context_id
            ):
                await asyncio.sleep(0.001)

    def _own_counts(self, trainer: int) -> dict[Key, int]:
        """Return the counts that only the passes of `trainer` change."""
        is_alone = len(self.program.trainers) == 1
        own = tag_of(trainer)
        return {
            key: count
            for key, count in self.record.counts().items()
            if key[0].startswith(own) or (is_alone and key[0] == LEAF_HOOK)
        }

    def _check_and_forget(self, trainer: int, before: dict[Key, int]) -> None:
        """Forget what an aborted pass called: how far it came is its own affair."""
        counts = self._own_counts(trainer)
        for key, count in counts.items():
            assert count - before.get(key, 0) <= 1, f"{key} was called twice in an aborted pass"
        self.record.cut({key: before.get(key, 0) for key in counts})

    async def _collect(self, frame: Frame) -> None:
        found: dict[int, Tensor | None] = {}
        for worker, name in enumerate(WORKERS):
            if worker == frame.worker:
                gradients = self.gradients_on(worker)
            else:
                remote = self._peers[frame.worker][worker]
                gradients = await remote.call("gradients", timeout=DEADLINE)
            leaves = [n for n, leaf in enumerate(self.program.leaves) if leaf.worker == worker]
            assert len(leaves) == len(gradients), name
            found |= dict(zip(leaves, gradients, strict=True))
        in_order = tuple(found[leaf] for leaf in range(len(self.leaves)))
        self.record.collected[frame.tag].append(in_order)


def _outcome(frame: Frame, call: Call, fails: bool) -> Any:
    if fails:
        raise InjectedFailure(f"call {call.number} fails")
    if call.outcome is Outcome.TENSORS:
        return tuple(frame.get(call.returns))
    return None if call.outcome is Outcome.NONE else call.number


def _workers_of_sites(program: Program) -> dict[int | None, int]:
    """Return which worker each site is on."""
    bodies = [(trainer, body) for trainer, body in enumerate(program.trainers)]
    bodies += [(call.worker, call.body) for _, body in bodies for call in all_calls(body)]
    sites: dict[int | None, int] = {
        step.site: worker
        for worker, body in bodies
        for step in body
        if isinstance(step, (Hook, Custom))
    }
    return sites | {leaf_site(n): leaf.worker for n, leaf in enumerate(program.leaves)}
