"""DistributedOptimizer against torch's own over the same parameters in one process, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import zmq_autograd as za
from tests.helpers import Pair, memory_endpoint
from tests.integration.fleets import until
from tests.integration.training import Reference, check_state, setting

STEPS = 5

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adadelta, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Adagrad, {"lr_decay": 0.01}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.Adam, {"foreach": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.Adamax, {}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (torch.optim.ASGD, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    (torch.optim.Rprop, {}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]


def named(case: object) -> str:
    return case.__name__ if isinstance(case, type) else repr(case)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=named)
async def test_each_class_of_torch_steps_as_in_one_process(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    make: Callable[..., torch.optim.Optimizer] = kind
    reference = Reference(lambda params: make(params, **options))
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(kind, there.params, **options)
        for number in range(STEPS):
            assert await there.step(optimizer, number) == reference.step(number)
            reference.check(there.model)
        check_state(await optimizer.state_dict(), reference.optimizer.state_dict())
        assert all(parameter.grad is None for parameter in there.model.parameters())
    assert optimizer.defaults == reference.optimizer.defaults


async def test_muon_steps_matrices_as_in_one_process() -> None:
    reference = Reference(lambda params: torch.optim.Muon([p for p in params if p.dim() == 2]))
    async with setting() as there:
        matrices = [
            given
            for given, mine in zip(there.params, reference.model.parameters(), strict=True)
            if mine.dim() == 2
        ]
        optimizer = await za.DistributedOptimizer.create(torch.optim.Muon, matrices)
        for number in range(STEPS):
            assert await there.step(optimizer, number) == reference.step(number)
        reference.check(there.model)


async def test_an_rref_to_a_tensor_of_this_worker_is_that_tensor() -> None:
    leaf = torch.ones(1, requires_grad=True)
    async with za.Worker("alone") as worker:
        sgd = torch.optim.SGD
        optimizer = await za.DistributedOptimizer.create(sgd, [worker.rref(leaf)], lr=1.0)
        async with worker.context() as ctx:
            await ctx.backward(3 * leaf)
            await optimizer.step(ctx)
        assert leaf.item() == -2
        await refused("more than once", sgd, [leaf, worker.rref(leaf)])


async def test_rrefs_that_came_over_several_sessions_have_one_optimizer() -> None:
    came: list[Any] = []
    async with setting() as there, za.Worker("gatherer", listen="memory://gatherer") as gatherer:
        gatherer.register(came.extend, "take")
        way = await there.server.connect(gatherer.endpoints[0])
        await way.call("take", [there.server.rref(there.model.second.weight)])
        remote = await gatherer.connect(there.server.endpoints[0])
        came += await remote.call("tensors")
        assert came[0].owner is not came[1].owner
        before = there.server.status()["rrefs"]["owned"]
        optimizer = await za.DistributedOptimizer.create(torch.optim.Adam, came)
        await until(lambda: there.server.status()["rrefs"]["owned"] == before + 1)
        state = await optimizer.state_dict()
        assert state["param_groups"][0]["params"] == [0, 1, 2]


# --- groups and schedulers -----------------------------------------------------------------------


def groups_of(params: list[Any]) -> list[dict[str, Any]]:
    """Return groups of which each has parameters of both workers, and one with one parameter."""
    return [
        {"params": params[:2], "lr": 0.2},
        {"params": params[2:5], "momentum": 0.5},
        {"params": params[5], "nesterov": False},
    ]


async def test_groups_have_their_own_hyperparameters() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    reference = Reference(lambda params: torch.optim.SGD(groups_of(params), **options))
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.SGD, groups_of(there.params), **options
        )
        for number in range(STEPS):
            for each in (optimizer, reference.optimizer):
                each.param_groups[number % 2]["lr"] *= 0.5
                each.param_groups[1]["momentum"] += 0.01
            await there.step(optimizer, number)
            reference.step(number)
            reference.check(there.model)
        check_state(await optimizer.state_dict(), reference.optimizer.state_dict())
        assert [group["params"] for group in optimizer.param_groups] == [
            there.params[:2],
            there.params[2:5],
            there.params[5:],
        ]


async def test_named_parameters_keep_their_names() -> None:
    def names(params: list[Any]) -> list[tuple[str, Any]]:
        return [(f"parameter {number}", given) for number, given in enumerate(params)]

    reference = Reference(lambda params: torch.optim.Adam(names(params)))
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.Adam, names(there.params))
        await there.step(optimizer, 0)
        reference.step(0)
        reference.check(there.model)
        state = await optimizer.state_dict()
        check_state(state, reference.optimizer.state_dict())
        await optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["param_names"][1] == "parameter 1"


SCHEDULERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (lr_scheduler.StepLR, {"step_size": 2}),
    (lr_scheduler.LambdaLR, {"lr_lambda": lambda epoch: 0.9**epoch}),
    (lr_scheduler.OneCycleLR, {"max_lr": 0.3, "total_steps": 6}),
    (lr_scheduler.CyclicLR, {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 2}),
    (lr_scheduler.CosineAnnealingLR, {"T_max": 5}),
]


@pytest.mark.parametrize(
    ("kind", "options"), SCHEDULERS, ids=[kind.__name__ for kind, _ in SCHEDULERS]
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=repr)
async def test_schedulers_change_the_next_step(
    kind: Callable[..., Any], options: dict[str, Any], lr: Any
) -> None:
    def copied() -> Any:
        return lr.clone() if isinstance(lr, Tensor) else lr

    reference = Reference(lambda params: torch.optim.SGD(params, lr=copied(), momentum=0.9))
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.SGD, there.params, lr=copied(), momentum=0.9
        )
        schedulers = [kind(each, **options) for each in (optimizer, reference.optimizer)]
        for number in range(STEPS):
            await there.step(optimizer, number)
            reference.step(number)
            reference.check(there.model)
            for scheduler in schedulers:
                scheduler.step()
        check_state(await optimizer.state_dict(), reference.optimizer.state_dict())


async def test_a_scheduler_may_go_by_the_loss() -> None:
    options: dict[str, Any] = {"patience": 0, "threshold": 10.0}
    reference = Reference(lambda params: torch.optim.SGD(params, lr=0.1))
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params, lr=0.1)
        mine = lr_scheduler.ReduceLROnPlateau(optimizer, **options)
        theirs = lr_scheduler.ReduceLROnPlateau(reference.optimizer, **options)
        for number in range(STEPS):
            mine.step(await there.step(optimizer, number))
            theirs.step(reference.step(number))
        reference.check(there.model)
    assert optimizer.param_groups[0]["lr"] == reference.optimizer.param_groups[0]["lr"] < 0.1


async def test_a_tensor_for_a_learning_rate_stays_its_users() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    reference = Reference(lambda params: torch.optim.SGD(params, lr=0.0))
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params, lr=lr)
        lr.fill_(0.0)
        await there.step(optimizer, 0)
        reference.step(0)
        reference.check(there.model)


# --- what is left alone --------------------------------------------------------------------------


class Stubborn(torch.optim.SGD):
    """Would apply any gradient that it finds, a stale one too, and counts its own steps."""

    def __init__(self, params: Any, lr: float = 0.1, times: int = 1) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["steps"] = 0
            group["times"] = times

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * group["lr"] * group["times"])


async def test_a_registered_class_steps_and_its_own_hyperparameters_come_back() -> None:
    reference = Reference(lambda params: Stubborn(params, times=2))
    async with setting(Stubborn) as there:
        optimizer = await za.DistributedOptimizer.create(Stubborn, there.params, times=2)
        for number in range(STEPS):
            await there.step(optimizer, number)
            reference.step(number)
            reference.check(there.model)
        assert optimizer.param_groups[0]["steps"] == STEPS
        check_state(await optimizer.state_dict(), reference.optimizer.state_dict())


async def test_a_parameter_without_a_gradient_is_not_touched() -> None:
    async with setting(Stubborn) as there:
        model = there.model
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 100.0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = await za.DistributedOptimizer.create(Stubborn, there.params)
        async with there.trainer.context() as ctx:
            hidden = model.first(torch.ones(1, 4, dtype=torch.float64))
            await ctx.backward(hidden.sum())
            await optimizer.step(ctx)
        of_first = set(model.first.parameters())
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, old) == (parameter not in of_first)
            assert parameter.grad is not None
            assert parameter.grad.eq(100).all()


async def test_a_step_without_any_gradient_changes_nothing() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.AdamW, there.params, weight_decay=0.5
        )
        async with there.trainer.context() as ctx:
            await optimizer.step(ctx)
        Reference(torch.optim.AdamW).check(there.model)
        assert (await optimizer.state_dict())["state"] == {}


async def test_zero_grad_clears_what_a_pass_has_added() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params)
        async with there.trainer.context() as ctx:
            await ctx.backward(await there.forward(0), accumulate_grad=True)
        assert sum(p.grad is not None for p in there.model.parameters()) == 5
        await optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in there.model.parameters())


# --- sparse gradients ----------------------------------------------------------------------------


async def test_sparse_adam_steps_with_sparse_gradients() -> None:
    def embedding() -> torch.nn.EmbeddingBag:
        made = torch.nn.EmbeddingBag(10, 3, sparse=True, mode="sum")
        torch.nn.init.constant_(made.weight, 0.5)
        return made

    here, there = embedding(), embedding()
    plain = torch.optim.SparseAdam([here.weight], lr=0.1)
    server = za.Worker("server", listen="memory://sparse-adam")
    server.register(there, "bag", expose="module")
    async with server, za.Worker("trainer") as trainer:
        bag = await (await trainer.connect(server.endpoints[0])).module("bag")
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.SparseAdam, bag.parameters(), lr=0.1
        )
        for number in range(STEPS):
            words = torch.tensor([[number, number + 1], [number, 9]])
            plain.zero_grad()
            here(words).square().sum().backward()
            plain.step()  # type: ignore[no-untyped-call]
            async with trainer.context() as ctx:
                await ctx.backward((await bag(words)).square().sum())
                await optimizer.step(ctx)
            torch.testing.assert_close(there.weight, here.weight, rtol=0, atol=0)
        check_state(await optimizer.state_dict(), plain.state_dict())


# --- what cannot be ------------------------------------------------------------------------------


class Unregistered(torch.optim.SGD):
    pass


async def refused(problem: str, kind: Any, params: Any) -> None:
    with pytest.raises(za.ConfigurationError, match=problem):
        await za.DistributedOptimizer.create(kind, params)


async def test_what_cannot_be_optimized_is_refused() -> None:
    sgd = torch.optim.SGD
    async with setting() as there:
        params = there.params
        await refused("more than once", sgd, [params[0], *params])
        await refused("more than once", sgd, [{"params": [p]} for p in [*params, params[1]]])
        await refused("got a Tensor", sgd, torch.zeros(1))
        await refused("at least one parameter", sgd, [])
        await refused("at least one parameter", sgd, [{"params": []}])
        await refused(r"got a Linear: pass its parameters\(\)", sgd, [there.model.first])
        await refused("got a float", sgd, [1.0])
        await refused("got a set", sgd, [{"params": {params[0]}}])
        await refused("a list of parameters, got a int", sgd, [{"params": 5}])
        await refused("a list of parameters, got a NoneType", sgd, [{"params": None}])
        await refused("got a str", sgd, [{"params": "ab"}])
        await refused("with 'params'", sgd, [{"lr": 1.0}])
        await refused("names for all", sgd, [("a", params[0]), params[1]])
        await refused("names for all", sgd, [("a", params[0]), ("b", params[1], 3)])
        await refused("LBFGS", torch.optim.LBFGS, params)
        await refused("a class of optimizers", torch.nn.Linear, params)
        with pytest.raises(ValueError, match="non-leaf"):
            await za.DistributedOptimizer.create(sgd, [torch.ones(1, requires_grad=True) * 2])


async def test_what_an_owner_refuses_is_raised() -> None:
    async with setting() as there:
        create = za.DistributedOptimizer.create
        with pytest.raises(za.NotRegistered, match=r"worker.register\(Unregistered\)"):
            await create(Unregistered, there.params)
        with pytest.raises(za.RemoteError, match="Invalid learning rate"):
            await create(torch.optim.SGD, there.params[1:3], lr=-1.0)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            await create(torch.optim.SGD, there.params, lr=-1.0)
        there.server.register(lambda: there.server.rref("text"), "text")
        with pytest.raises(za.RemoteError, match="tensors, got a str"):
            await create(torch.optim.SGD, [await there.remote.call("text")])
        twice = [there.params[3], await there.remote.call("tensors")]
        with pytest.raises(za.RemoteError, match="more than once"):
            await create(torch.optim.SGD, [twice[0], twice[1][0]])


async def test_a_step_needs_a_context_that_lasts() -> None:
    async with setting() as there:
        optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, there.params)
        with pytest.raises(za.ConfigurationError, match="expected a context"):
            await optimizer.step(None)  # type: ignore[arg-type]
        async with there.trainer.context() as ctx:
            pass
        with pytest.raises(za.ContextError, match="has ended"):
            await optimizer.step(ctx)
        with pytest.raises(za.ConfigurationError, match="give all param groups"):
            optimizer.add_param_group({"params": [torch.zeros(1)]})


async def test_parameters_of_another_worker_of_the_process_are_not_passed_over() -> None:
    """By an RRef of its own, which that worker would have stepped in its own contexts alone."""
    leaf = torch.ones(1, requires_grad=True)
    async with za.Worker("alice") as alice, za.Worker("bob") as bob:
        sgd = torch.optim.SGD
        optimizer = await za.DistributedOptimizer.create(sgd, [bob.rref(leaf)], lr=1.0)
        async with alice.context() as ctx:
            with pytest.raises(za.ContextError, match="has parameters of worker 'bob'"):
                await optimizer.step(ctx)
        async with bob.context() as ctx:
            await ctx.backward(3 * leaf)
            await optimizer.step(ctx)
    assert leaf.item() == -2


async def test_what_one_owner_made_goes_when_another_one_refuses() -> None:
    class Mine(torch.optim.SGD):
        """Registered by one of the owners."""

    one, other = (za.Worker(name, listen=memory_endpoint()) for name in ("one", "other"))
    one.register(Mine)
    async with one, other, za.Worker("alice") as alice:
        params = []
        for owner in (one, other):
            owner.register(lambda: torch.ones(1, requires_grad=True), "make")
            remote = await alice.connect(owner.endpoints[0])
            params.append(await remote.remote("make"))
        kept = one.status()["rrefs"]["owned"]
        gc.disable()
        try:
            with pytest.raises(za.NotRegistered):
                await za.DistributedOptimizer.create(Mine, params, lr=1.0)
            await until(lambda: one.status()["rrefs"]["owned"] == kept)
        finally:
            gc.enable()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad])
async def test_what_is_made_and_loaded_in_inference_mode_is_stepped_outside_of_it(
    kind: Any,
) -> None:
    leaf = torch.ones(1, requires_grad=True)
    async with za.Worker("alice") as alice:
        with torch.inference_mode():
            optimizer = await za.DistributedOptimizer.create(kind, [leaf], lr=0.1)
        for _ in range(2):
            async with alice.context() as ctx:
                await ctx.backward(3 * leaf)
                await optimizer.step(ctx)
            with torch.inference_mode():
                state = await optimizer.state_dict()
                await optimizer.load_state_dict(state)
            assert not any(value.is_inference() for value in state["state"][0].values())


async def test_an_optimizer_is_dropped_with_its_holder() -> None:
    async with setting() as there:
        before = there.server.status()["rrefs"]["owned"]
        optimizer = await za.DistributedOptimizer.create(torch.optim.Adam, there.params)
        assert there.server.status()["rrefs"]["owned"] > before
        await there.step(optimizer, 0)
        del optimizer
        await until(lambda: there.server.status()["rrefs"]["owned"] == before)


async def test_an_optimizer_is_dropped_with_a_holder_that_leaves() -> None:
    async with setting() as there:
        async with za.Worker("other") as other:
            remote = await other.connect(there.server.endpoints[0])
            held = await za.DistributedOptimizer.create(
                torch.optim.Adam, await remote.call("tensors")
            )
            assert there.server.status()["rrefs"]["owned"] > 4
        await until(lambda: there.server.status()["rrefs"]["owned"] == 4)
        del held


async def test_a_context_has_to_be_open_and_of_the_same_worker(pair: Pair) -> None:
    pair.bob.register(torch.nn.Linear(2, 1), "net", expose="module")
    net = await pair.remote_bob.module("net")
    optimizer = await za.DistributedOptimizer.create(torch.optim.SGD, net.parameters(), lr=0.1)
    never = pair.alice.context()
    with pytest.raises(za.ContextError, match="has not been entered"):
        await optimizer.step(never)
    async with pair.alice.context() as ended:
        pass
    with pytest.raises(za.ContextError, match="has ended"):
        await optimizer.clip_grad_norm(ended, 1.0)
    async with za.Worker("zed") as zed, zed.context() as of_zed:
        with pytest.raises(za.ContextError, match="a context belongs to one worker"):
            await optimizer.step(of_zed)
        with pytest.raises(za.ContextError, match="a context belongs to one worker"):
            await optimizer.clip_grad_norm(of_zed, 1.0)
