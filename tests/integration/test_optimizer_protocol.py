"""What owners and holders of optimizers tell each other: what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zmq_autograd as za
from tests.helpers import DEADLINE
from tests.integration.temperamental import setting


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
