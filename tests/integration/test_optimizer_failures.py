"""A step that does not succeed everywhere says who applied it, who did not, and who is unknown."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import zmq_autograd as za
from tests.faults.victims import running_victim
from tests.helpers import DEADLINE, memory_endpoint


class Temperamental(torch.optim.Optimizer):
    """Subtracts the gradient, or fails in the way that a group says."""

    def __init__(self, params: Any, mood: str = "well") -> None:
        super().__init__(params, {"mood": mood})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.step_one(parameter, group["mood"])
            if group["mood"] == "cannot tell":
                group["note"] = object()
            if group["mood"] == "replaces":
                group["weights"] = [torch.ones(2)]

    def step_one(self, parameter: Tensor, mood: str) -> None:
        if mood == "raises before":
            raise ValueError("not today")
        if mood == "changes data and raises":
            parameter.data.add_(1)
            raise ValueError("not today")
        if parameter.grad is not None:
            parameter.sub_(parameter.grad)
        if mood == "adds state and raises":
            self.state[parameter]["count"] = 1
        if mood == "changes state and raises":
            self.state[parameter].setdefault("sum", torch.zeros(())).add_(1)
        if mood == "exits":
            raise SystemExit(3)
        if mood not in ("well", "cannot tell", "replaces"):
            raise ValueError("not today")


@dataclass(frozen=True)
class Setting:
    """A trainer with a parameter, and two servers, each with one.

    Attributes:
        trainer: the trainer.
        servers: the servers.
        remotes: the servers as the trainer sees them.
        values: the parameters: the trainer's, and those of the servers.
        params: the same as the trainer has them.
    """

    trainer: za.Worker
    servers: list[za.Worker]
    remotes: list[za.RemoteWorker]
    values: list[Tensor]
    params: list[Any]

    async def optimizer(self, *moods: str) -> za.DistributedOptimizer:
        """Return an optimizer of all parameters, each in a group of its own."""
        groups = [
            {"params": [given], "mood": mood}
            for given, mood in zip(self.params, moods, strict=True)
        ]
        return await za.DistributedOptimizer.create(Temperamental, groups)

    async def backward(self, ctx: za.Context) -> None:
        """Leave a gradient of one for each parameter."""
        products = [await remote.call("times", torch.ones(())) for remote in self.remotes]
        await ctx.backward(sum(products, self.values[0]))

    async def step(self, optimizer: za.DistributedOptimizer, timeout: float = DEADLINE) -> None:
        """Take one step."""
        async with self.trainer.context() as ctx:
            await self.backward(ctx)
            await optimizer.step(ctx, timeout=timeout)

    @property
    def now(self) -> list[float]:
        """The values of the parameters, 5 at first; each step takes 1."""
        return [value.item() for value in self.values]


def offer(worker: za.Worker, value: Tensor) -> None:
    def times(x: Tensor) -> Tensor:
        return value * x

    worker.register(times)
    worker.register(Temperamental)
    worker.register(lambda: worker.rref(value), "value")


@asynccontextmanager
async def setting() -> AsyncIterator[Setting]:
    values = [torch.tensor(5.0, requires_grad=True) for _ in range(3)]
    servers = [za.Worker(name, listen=memory_endpoint()) for name in ("good", "bad")]
    for server, value in zip(servers, values[1:], strict=True):
        offer(server, value)
    good, bad = servers
    async with good, bad, za.Worker("trainer") as trainer:
        remotes = [await trainer.connect(server.endpoints[0]) for server in servers]
        rrefs = [await remote.call("value") for remote in remotes]
        yield Setting(trainer, servers, remotes, values, [values[0], *rrefs])


async def test_a_step_that_succeeds_raises_nothing() -> None:
    async with setting() as there:
        await there.step(await there.optimizer("well", "well", "well"))
        assert there.now == [4, 4, 4]


async def test_who_raises_before_anything_has_changed_has_not_applied_it() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "raises before")
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        error = caught.value
        assert there.now == [4, 4, 5]
        assert (error.applied, error.not_applied, error.unknown) == (
            ("trainer", "good"),
            ("bad",),
            (),
        )
        cause = error.causes["bad"]
        assert isinstance(cause, za.RemoteError)
        assert (cause.type_name, cause.message, cause.worker) == ("ValueError", "not today", "bad")
        assert "in step_one" in (cause.traceback or "")
        assert error.__cause__ is cause
        assert error.worker == "bad"
        text = str(error)
        assert (
            "; applied: 'trainer', 'good'; not applied: 'bad' (RemoteError: ValueError on" in text
        )
        optimizer.param_groups[2]["mood"] = "well"
        await there.step(optimizer)
        assert there.now == [3, 3, 4]


@pytest.mark.parametrize(
    "mood",
    ["raises after", "adds state and raises", "changes state and raises", "exits"],
)
async def test_who_raises_in_the_midst_is_unknown(mood: str) -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", mood)
        with pytest.raises(
            za.PartialStepError, match="not known whether it was applied: 'bad'"
        ) as caught:
            await there.step(optimizer)
        error = caught.value
        assert (error.applied, error.not_applied, error.unknown) == (
            ("trainer", "good"),
            (),
            ("bad",),
        )
        assert there.now == [4, 4, 4]


async def test_what_goes_past_torchs_version_counters_is_seen_too() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "changes data and raises")
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        assert caught.value.unknown == ("bad",)


async def test_state_alone_may_have_changed() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "adds state and raises")
        async with there.trainer.context() as ctx:
            with pytest.raises(za.PartialStepError) as caught:
                await optimizer.step(ctx)  # without a gradient
        assert caught.value.unknown == ("bad",)
        assert there.now == [5, 5, 5]


async def test_this_side_may_be_the_one_that_fails() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("raises before", "well", "well")
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        error = caught.value
        assert (error.applied, error.not_applied) == (("good", "bad"), ("trainer",))
        assert type(error.causes["trainer"]) is ValueError
        assert there.now == [5, 4, 4]


async def test_where_nothing_was_applied_the_first_cause_is_raised() -> None:
    async with setting() as there:
        optimizer = await there.optimizer(*["raises before"] * 3)
        with pytest.raises(ValueError, match="not today"):
            await there.step(optimizer)
        assert there.now == [5, 5, 5]


async def test_owners_whose_outcome_cannot_travel_are_unknown() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "cannot tell")  # of which each has some
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        assert (caught.value.applied, caught.value.unknown) == (("trainer",), ("good", "bad"))
        assert there.now == [4, 4, 4]


async def test_hyperparameters_may_be_tensors_in_lists() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("replaces", "well", "replaces")
        for _ in range(2):
            await there.step(optimizer)
        assert there.now == [3, 3, 3]
        for group in optimizer.param_groups[::2]:
            assert torch.equal(group["weights"][0], torch.ones(2))


async def test_one_owner_that_raised_in_the_midst_is_a_partial_step() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(
            Temperamental, [there.params[2]], mood="raises after"
        )
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        assert (caught.value.applied, caught.value.unknown) == ((), ("bad",))


async def test_who_did_not_get_its_turn_has_not_applied_it() -> None:
    async with setting() as there, za.Worker("reader") as reader:
        bad = await reader.connect(there.servers[1].endpoints[0])
        optimizer = await there.optimizer("well", "well", "well")
        async with reader.context():
            await bad.call("times", torch.ones(()))
            with pytest.raises(za.PartialStepError) as caught:
                await asyncio.create_task(there.step(optimizer, 0.2), context=contextvars.Context())
        error = caught.value
        assert (error.applied, error.not_applied) == (("trainer", "good"), ("bad",))
        assert isinstance(error.causes["bad"], za.DeadlineExceeded)
        assert there.now == [4, 4, 5]
        await there.step(optimizer)
        assert there.now == [3, 3, 4]


async def test_who_was_lost_before_has_not_applied_it() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "well")
        async with there.trainer.context() as ctx:
            await there.backward(ctx)
            await there.servers[1].close()
            with pytest.raises(za.PartialStepError) as caught:
                await optimizer.step(ctx)
        error = caught.value
        assert (error.applied, error.not_applied) == (("trainer", "good"), ("bad",))
        assert isinstance(error.causes["bad"], za.WorkerLost)
        assert there.now == [4, 4, 5]


async def test_hyperparameters_that_cannot_travel_change_nothing_there() -> None:
    async with setting() as there:
        optimizer = await there.optimizer("well", "well", "well")
        optimizer.param_groups[1]["more"] = object()
        with pytest.raises(za.PartialStepError, match="cannot travel") as caught:
            await there.step(optimizer)
        assert caught.value.not_applied == ("good", "bad")
        assert there.now == [4, 5, 5]


async def test_a_context_that_was_lost_on_its_way_is_not_taken_for_one_without_gradients() -> None:
    """The owner was reached by way of a worker that is gone: its gradients went with that."""
    async with setting() as there, za.Worker("between", listen=memory_endpoint()) as between:
        way = await between.connect(there.servers[1].endpoints[0])
        between.register(lambda x: way.call("times", x), "times")
        remote = await there.trainer.connect(between.endpoints[0])
        optimizer = await za.DistributedOptimizer.create(Temperamental, there.params[1:])
        async with there.trainer.context() as ctx:
            await ctx.backward(
                await remote.call("times", torch.ones(()))
                + await there.remotes[0].call("times", torch.ones(()))
            )
            await between.close()
            with pytest.raises(za.PartialStepError) as caught:
                await optimizer.step(ctx)
        assert (caught.value.applied, caught.value.not_applied) == (("good",), ("bad",))
        assert isinstance(caught.value.causes["bad"], za.WorkerLost)
        assert there.now == [5, 4, 5]


async def test_a_context_finds_its_gradients_whichever_way_it_went() -> None:
    async with setting() as there, za.Worker("between", listen=memory_endpoint()) as between:
        way = await between.connect(there.servers[1].endpoints[0])
        between.register(lambda x: way.call("times", x), "times")
        remote = await there.trainer.connect(between.endpoints[0])
        optimizer = await za.DistributedOptimizer.create(Temperamental, [there.params[2]])
        async with there.trainer.context() as ctx:
            await ctx.backward(await remote.call("times", torch.ones(())))
            assert await optimizer.clip_grad_norm(ctx, 10.0) == 1
            await optimizer.step(ctx)
        assert there.now == [5, 5, 4]


@pytest.mark.parametrize(
    "told",
    [
        ("not applied", None, []),
        ("unknown", None, []),
        ("applied", {"code": 6, "text": "not today"}, []),
        ("perhaps", None, []),
        ("applied", None, [{"params": []}]),
        None,
    ],
)
async def test_an_outcome_that_cannot_be_is_taken_for_none(told: Any) -> None:
    async with setting() as there:
        bad = there.servers[1]

        async def forward(request: za.messages.ForwardRequest, peer: za.RemoteWorker) -> Any:
            if request.function == "za.optimizer.step":
                return za.messages.ForwardResponse(told)
            return await bad.default_handler(request, peer)

        bad.handler(za.messages.ForwardRequest)(forward)
        optimizer = await there.optimizer("well", "well", "well")
        with pytest.raises(za.PartialStepError) as caught:
            await there.step(optimizer)
        error = caught.value
        assert (error.applied, error.unknown) == (("trainer", "good"), ("bad",))
        assert isinstance(error.causes["bad"], za.ProtocolError)


@pytest.mark.parametrize(
    ("function", "reply"),
    [
        ("create", None),
        ("create", (1, {}, [{}])),
        ("create", "rref"),
        ("create", "rref, one group too many"),
        ("create", "rref, parameters"),
        ("read_state", ([(False, "x", (1, "step", 5))], None, 1)),
        ("read_state", ([(False, "x", (-1, "step", 5))], None, 1)),
        ("read_state", (5, None, 1)),
    ],
)
async def test_what_an_owner_tells_has_to_be_possible(function: str, reply: Any) -> None:
    async with setting() as there:
        bad = there.servers[1]
        replies: dict[str, tuple[Any, ...]] = {
            "rref": (bad.rref(1),),
            "rref, one group too many": (bad.rref(1), {}, [{}, {}]),
            "rref, parameters": (bad.rref(1), {}, [{"params": ["mine"]}]),
        }
        told = replies.get(reply, reply) if isinstance(reply, str) else reply

        async def forward(request: za.messages.ForwardRequest, peer: za.RemoteWorker) -> Any:
            if request.function == f"za.optimizer.{function}":
                return za.messages.ForwardResponse(told)
            return await bad.default_handler(request, peer)

        bad.handler(za.messages.ForwardRequest)(forward)

        async def make_and_read() -> None:
            await (await there.optimizer("well", "well", "well")).state_dict()

        with pytest.raises(za.ProtocolError, match=r"expected .*, got|expected an? "):
            await make_and_read()


@pytest.mark.parametrize("step_id", [-1, 2**64, True, b"x" * 1000, None])
async def test_an_id_of_a_step_has_to_be_one(step_id: Any) -> None:
    async with setting() as there, there.trainer.context() as ctx:
        remote = there.remotes[0]
        await remote.call("times", torch.ones(()))
        with pytest.raises(za.ProtocolError, match="step_id: expected an id"):
            await remote.call("za.done_reading", ctx.context_id, step_id)


@pytest.mark.parametrize("fate", ["killed", "frozen"])
async def test_who_falls_silent_in_a_step_is_unknown(fate: str) -> None:
    mine = torch.tensor(5.0, requires_grad=True)
    async with running_victim("victim") as victim, za.Worker("trainer") as trainer:
        remote = await trainer.connect(victim.endpoint, timeout=DEADLINE)
        theirs = await remote.remote("double", torch.ones(2))
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, [mine, theirs], lr=1.0)
        async with trainer.context() as ctx:
            await ctx.backward(mine * 1)
            victim.freeze()
            started = time.monotonic()
            step = asyncio.create_task(optimizer.step(ctx, timeout=0.5))
            if fate == "killed":
                await asyncio.sleep(0)
                victim.kill()
            with pytest.raises(za.PartialStepError) as caught:
                await step
            if fate == "frozen":
                victim.thaw()
        assert time.monotonic() - started < DEADLINE
        error = caught.value
        assert (error.applied, error.not_applied, error.unknown) == (("trainer",), (), ("victim",))
        kind = za.WorkerLost if fate == "killed" else za.DeadlineExceeded
        assert isinstance(error.causes["victim"], kind)
        assert mine.item() == 4


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, "soon"])
async def test_a_time_that_is_none_is_refused_before_anything_waits(seconds: Any) -> None:
    async with setting() as there:
        remote = there.remotes[0]
        gathered = await remote.call("za.optimizer.gather", [there.params[1]])
        optimizer, *_ = await remote.call(
            "za.optimizer.create", "torch.optim.SGD", gathered, [1], [{}], [], {}
        )
        step = remote.function("za.optimizer.step", timeout=DEADLINE)
        status, error, _ = await step(optimizer, 1, 0, 1, [{}], seconds)
        assert status == "not applied"
        assert "expected seconds >= 0 or None" in error["text"]


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("gather", ["no rref"]),
        ("gather", [[1]]),
        ("gather", [[], 5]),
        ("create", ["torch.optim.SGD", None, [], [], [], {}]),
        ("create", ["torch.optim.LBFGS", "gathered", [1], [{}], [], {}]),
        ("create", ["os.system", "gathered", [1], [{}], [], {}]),
        ("create", ["times", "gathered", [1], [{}], [], {}]),
        ("create", ["torch.optim.SGD", "gathered", [2], [{}], [], {}]),
        ("create", ["torch.optim.SGD", "gathered", [1, 1], [{}], [], {}]),
        ("step", ["value", 1, 0, 1, [{}], 1.0]),
        ("step", [None, 1, 0, 1, [{}], 1.0]),
        ("norms", ["value", 1, 0, 2.0]),
        ("clip", ["gathered", 1, 0, torch.ones(())]),
        ("read_state", ["gathered"]),
        ("load_pieces", ["optimizer", [], None, [{}, {}]]),
    ],
)
async def test_nonsense_is_an_error_of_who_sent_it(function: str, args: list[Any]) -> None:
    async with setting() as there:
        remote = there.remotes[0]
        gathered = await remote.call("za.optimizer.gather", [there.params[1]])
        adam = ["torch.optim.Adam", gathered, [1], [{}], [], {}]
        optimizer, *_ = await remote.call("za.optimizer.create", *adam)
        known = {"gathered": gathered, "value": there.params[1], "optimizer": optimizer}
        sent = [known.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
        with pytest.raises(za.ZmqAutogradError):
            await remote.call("za.optimizer." + function, *sent, timeout=DEADLINE)
        await there.step(await there.optimizer("well", "well", "well"))
        assert there.now == [4, 4, 4]


async def test_no_more_is_loaded_than_a_few_times_the_parameters() -> None:
    async with setting() as there:
        remote = there.remotes[0]
        gathered = await remote.call("za.optimizer.gather", [there.params[1]])
        adam = ["torch.optim.Adam", gathered, [1], [{}], [], {}]
        optimizer, *_ = await remote.call("za.optimizer.create", *adam)
        piece = [(False, "", (0, "exp_avg", torch.zeros(2**19)))]
        small = [(False, "", (0, "exp_avg", "x" * 1000))]
        load = remote.function("za.optimizer.load_pieces")
        add = remote.function("za.optimizer.add_piece")
        with pytest.raises(za.ResourceExhausted, match="8 times what its parameters take"):
            await load(optimizer, piece, None, [{}])
        with pytest.raises(za.ResourceExhausted, match="8 times what its parameters take"):
            await add(optimizer, piece)
        kept = [await add(optimizer, small) for _ in range(7)]  # each counts as a header of 256 KiB
        await add(optimizer, small, kept[0])
        for of in (None, kept[1]):
            with pytest.raises(za.ResourceExhausted, match="would keep states of"):
                await add(optimizer, small, of)


async def test_states_that_come_in_pieces_at_once_stay_apart() -> None:
    async with setting() as there:
        remote = there.remotes[0]
        gathered = await remote.call("za.optimizer.gather", [there.params[1]])
        adam = ["torch.optim.Adam", gathered, [1], [{}], [], {}]
        optimizer, *_ = await remote.call("za.optimizer.create", *adam)
        kept = [
            await remote.call("za.optimizer.add_piece", optimizer, [(False, "", (0, "step", n))])
            for n in range(3)
        ]
        for n in (1, 0, 2):
            await remote.call("za.optimizer.load_pieces", optimizer, [], kept[n], [{}])
            told = await remote.call("za.optimizer.read_state", optimizer)
            assert told == ([(False, "0.step", (0, "step", n))], None, 1)


@pytest.mark.parametrize(
    ("function", "args", "said"),
    [
        ("zero_grad", ["gathered", True], "an RRef to an optimizer"),
        ("create", ["torch.optim.SGD", "optimizer", [1], [{}], [], {}], "an RRef to parameters"),
        ("read_piece", ["optimizer", "optimizer", 0], "an RRef to a state that is kept"),
        *[("read_piece", ["optimizer", "kept", n], "piece") for n in (7, -1, 0.0, True, "text")],
        ("add_piece", ["optimizer", [1]], "state: expected a list"),
        ("add_piece", ["optimizer", [], "gathered"], "an RRef to a state that is kept"),
        ("load_pieces", ["optimizer", [1], None, [{}]], "state: expected a list"),
        ("load_pieces", ["optimizer", [(False, "0", 1)], None, [{}]], "expected an entry"),
        ("load_pieces", ["optimizer", [(False, "0", (1,))], None, [{}]], "expected an entry"),
        ("load_pieces", ["optimizer", [(False, "0", ([], 1))], None, [{}]], "expected an entry"),
        ("load_pieces", ["optimizer", [(False, "0", "text")], None, [{}]], "expected an entry"),
        (
            "load_pieces",
            ["optimizer", [(False, "0", (0, 1)), (False, "0", (0, "step", 1))], None, [{}]],
            "expected an entry",
        ),
    ],
)
async def test_what_breaks_the_protocol_is_told_so(
    function: str, args: list[Any], said: str
) -> None:
    async with setting() as there:
        remote = there.remotes[0]
        gathered = await remote.call("za.optimizer.gather", [there.params[1]])
        adam = ["torch.optim.Adam", gathered, [1], [{}], [], {}]
        optimizer, *_ = await remote.call("za.optimizer.create", *adam)
        kept = await remote.call("za.optimizer.add_piece", optimizer, [])
        known = {"gathered": gathered, "optimizer": optimizer, "kept": kept}
        sent = [known.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
        with pytest.raises(za.ProtocolError, match=said):
            await remote.call("za.optimizer." + function, *sent, timeout=DEADLINE)
