"""The optimizers that a `DistributedOptimizer` is made of, one for each owner of parameters."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from torch import Tensor
from torch.optim import Optimizer

from zmq_autograd.autograd.owned_optimizer import (
    TORCH_OPTIMIZERS,
    Group,
    Outcome,
    OwnedOptimizer,
)
from zmq_autograd.engine import LocalContext
from zmq_autograd.engine.steps import Norm, clip, norms, step
from zmq_autograd.errors import (
    NotRegistered,
    ProtocolError,
    RemoteError,
    SerializationError,
)
from zmq_autograd.node import compute, has_not_left
from zmq_autograd.node.optimizers import PREFIX, state_from, state_items
from zmq_autograd.node.states import Method, load_all, read_all
from zmq_autograd.optimizer.groups import hyperparameters_of
from zmq_autograd.remote import RemoteWorker
from zmq_autograd.rref import RRef
from zmq_autograd.session import exception_from
from zmq_autograd.wire.messages import ErrorResponse
from zmq_autograd.wire.tensors import DTYPES

REPLY_SECONDS: Final = 2.0
"""Seconds that an owner has to reply, beyond those that a step may wait for its turn."""

RREFS_A_PAGE: Final = 200
"""How many RRefs go into one message: a few hundred bytes of its header each."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an optimizer is made of.

    Attributes:
        kind: its class.
        groups: for each param group the hyperparameters that it has of its own.
        args: of the class, after the groups.
        kwargs: likewise.
        timeout: seconds for each message to an owner, None for ever.
    """

    kind: type[Optimizer]
    groups: list[Group]
    args: tuple[Any, ...]
    kwargs: Group
    timeout: float | None

    @property
    def name(self) -> str:
        """The class's name on the wire."""
        for name, kind in TORCH_OPTIMIZERS.items():
            if kind is self.kind:
                return name
        return self.kind.__name__


class Part(Protocol):
    """One optimizer of several.

    Attributes:
        owner: the worker that has the parameters, None for this one.
        numbers: for each of its parameters its number among all parameters.
        defaults: the hyperparameters of a group that does not have its own.
        hyperparameters: of each group, when it was made.
    """

    @property
    def owner(self) -> RemoteWorker | None: ...

    numbers: list[int]
    defaults: Group
    hyperparameters: list[Group]

    async def step(
        self, context: LocalContext, step_id: int, groups: list[Group], seconds: float | None
    ) -> Outcome:
        """Step, and return what became of it; waits so long for its turn."""

    async def norms(
        self, context: LocalContext, norm_type: float, timeout: float | None
    ) -> list[Norm]:
        """Return the norm of each parameter's gradient."""

    async def clip(self, context: LocalContext, coefficient: Tensor, timeout: float | None) -> None:
        """Multiply the gradients by a number."""

    async def read_state(self, timeout: float | None) -> dict[Any, Any]:
        """Return a copy of the state, by number of the parameter in this part."""

    async def load_state(
        self, state: Mapping[Any, Any], groups: list[Group], timeout: float | None
    ) -> None:
        """Load a state and the hyperparameters of each group."""

    async def zero_grad(self, set_to_none: bool, timeout: float | None) -> None:
        """Clear the parameters' ``.grad``."""


class LocalPart:
    """Parameters of this worker; see `Part`."""

    owner = None

    def __init__(
        self, recipe: Recipe, parameters: Sequence[Sequence[Tensor]], numbers: list[int]
    ) -> None:
        """Make the optimizer of `parameters`, those of each group."""
        groups = [
            {**group, "params": list(of_group)}
            for group, of_group in zip(recipe.groups, parameters, strict=True)
        ]
        self.numbers = numbers
        self._optimizer = OwnedOptimizer(recipe.kind, groups, recipe.args, recipe.kwargs)
        self.defaults = self._optimizer.defaults
        self.hyperparameters = self._optimizer.hyperparameters

    async def step(
        self, context: LocalContext, step_id: int, groups: list[Group], seconds: float | None
    ) -> Outcome:
        return await step(self._optimizer, context.table, context, step_id, groups, seconds)

    async def norms(
        self, context: LocalContext, norm_type: float, timeout: float | None
    ) -> list[Norm]:
        return await norms(self._optimizer, context.table, context, norm_type)

    async def clip(self, context: LocalContext, coefficient: Tensor, timeout: float | None) -> None:
        await clip(self._optimizer, context.table, context, coefficient)

    async def read_state(self, timeout: float | None) -> dict[Any, Any]:
        return await compute(self._optimizer.state)

    async def load_state(
        self, state: Mapping[Any, Any], groups: list[Group], timeout: float | None
    ) -> None:
        await compute(self._optimizer.load, state, groups)

    async def zero_grad(self, set_to_none: bool, timeout: float | None) -> None:
        await compute(self._optimizer.zero_grad, set_to_none)


class RemotePart:
    """Parameters of another worker; see `Part`."""

    def __init__(
        self, owner: RemoteWorker, rref: Any, numbers: list[int], made: tuple[Group, list[Group]]
    ) -> None:
        """Hold the optimizer that `rref` refers to; `create` makes one."""
        self.numbers = numbers
        self.defaults, self.hyperparameters = made
        self.owner = owner
        self._rref = rref

    @classmethod
    async def create(
        cls,
        owner: RemoteWorker,
        recipe: Recipe,
        parameters: Sequence[Sequence[RRef]],
        numbers: list[int],
    ) -> RemotePart:
        """Have `owner` make an optimizer of `parameters`, those of each group.

        Raises:
            NotRegistered: its class is not registered there, or not for this worker.
            RemoteError: a parameter is no tensor, or the class raised.
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        rrefs = [rref for of_group in parameters for rref in of_group]
        gathered = None
        for first in range(0, len(rrefs), RREFS_A_PAGE):
            page = rrefs[first : first + RREFS_A_PAGE]
            gathered = await owner.call(PREFIX + "gather", page, gathered, timeout=recipe.timeout)
        try:
            made = await owner.call(
                PREFIX + "create",
                recipe.name,
                gathered,
                [len(of_group) for of_group in parameters],
                recipe.groups,
                list(recipe.args),
                recipe.kwargs,
                timeout=recipe.timeout,
            )
        except NotRegistered as error:
            raise NotRegistered(
                f"no optimizer is registered as {recipe.name!r} for this worker: "
                f"`worker.register({recipe.name})` there",
                type_name=error.type_name,
                worker=error.worker or owner.name,
                path=error.path,
            ) from error
        match made:
            case [RRef() as rref, dict() as defaults, [*groups]] if len(groups) == len(
                recipe.groups
            ) and all(map(_are_hyperparameters, groups)):
                return cls(owner, rref, numbers, (defaults, groups))
        raise ProtocolError(
            f"create: expected an RRef, and hyperparameters of {len(recipe.groups)} groups, got "
            f"{reprlib.repr(made)}",
            worker=owner.name,
        )

    async def step(
        self, context: LocalContext, step_id: int, groups: list[Group], seconds: float | None
    ) -> Outcome:
        was_connected = self.owner.is_connected
        timeout = None if seconds is None else seconds + REPLY_SECONDS
        try:
            reply = await self._ask_about(context, "step", timeout, step_id, groups, seconds)
            return _outcome(reply, self.owner.name)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts go on
            is_unknown = was_connected and _may_have_begun(error)
            return Outcome("unknown" if is_unknown else "not applied", error)

    async def norms(
        self, context: LocalContext, norm_type: float, timeout: float | None
    ) -> list[Norm]:
        reply = await self._ask_about(context, "norms", timeout, norm_type)
        try:
            return [
                None if dtype is None else (DTYPES[dtype.removeprefix("torch.")], float(norm))
                for dtype, norm in zip(*reply, strict=True)
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"clip_grad_norm: expected dtypes and norms ({error!r})", worker=self.owner.name
            ) from error

    async def clip(self, context: LocalContext, coefficient: Tensor, timeout: float | None) -> None:
        await self._ask_about(context, "clip", timeout, coefficient)

    async def read_state(self, timeout: float | None) -> dict[Any, Any]:
        state = state_from(await read_all(self._method(timeout), "read_state"))
        for key in state:
            if isinstance(key, int) and key not in range(len(self.numbers)):
                raise ProtocolError(
                    f"state_dict: expected a parameter below {len(self.numbers)}, got {key}",
                    worker=self.owner.name,
                )
        return state

    async def load_state(
        self, state: Mapping[Any, Any], groups: list[Group], timeout: float | None
    ) -> None:
        await load_all(self._method(timeout), state_items(state), self.owner.limits, groups)

    def _method(self, timeout: float | None) -> Method:
        return lambda name: partial(self._ask, name, timeout)

    async def zero_grad(self, set_to_none: bool, timeout: float | None) -> None:
        await self._ask("zero_grad", timeout, set_to_none)

    async def _ask_about(
        self, context: LocalContext, function: str, timeout: float | None, *args: Any
    ) -> Any:
        """Ask something about a context's gradients after its last pass."""
        committed = context.passes.committed
        reply = await self._ask(function, timeout, context.context_id, committed, *args)
        context.passes.told_committed(self.owner, committed)
        return reply

    async def _ask(self, function: str, timeout: float | None, *args: Any) -> Any:
        return await self.owner.call(PREFIX + function, self._rref, *args, timeout=timeout)


def _may_have_begun(error: Exception) -> bool:
    """Tell whether a step that was asked for, and ended with `error`, may have been applied."""
    # What the step itself raises comes in an outcome, which may be what cannot travel.
    if isinstance(error, RemoteError):
        return error.type_name == SerializationError.__name__
    return not has_not_left(error)


def _are_hyperparameters(group: object) -> bool:
    """Tell whether `group` may be hyperparameters: which parameters there are is for this side."""
    return isinstance(group, dict) and group.keys() == hyperparameters_of(group).keys()


def _outcome(reply: Any, owner: str) -> Outcome:
    """Return what `owner` told of a step.

    Raises:
        ProtocolError: it is something else.
    """
    try:
        status, error, changed = reply
        if status not in ("applied", "not applied", "unknown"):
            raise ValueError(f"unknown status {status!r}")
        if not isinstance(changed, list) or not all(map(_are_hyperparameters, changed)):
            raise TypeError("expected a list of dicts of hyperparameters")
        if (status == "applied") != (error is None):
            raise ValueError(f"{status} with error {error!r:.200}")
        cause = None if error is None else exception_from(ErrorResponse(**error), owner)
    except (TypeError, ValueError) as problem:
        raise ProtocolError(f"step: expected an outcome ({problem})", worker=owner) from problem
    return Outcome(status, cause, changed)
