"""The distributed optimizer itself: steps all its parts, and tells truthfully what became of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Final, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from zmq_autograd import ids
from zmq_autograd.autograd.owned_optimizer import Group, Outcome
from zmq_autograd.engine import Context, LocalContext, local_context
from zmq_autograd.engine.steps import Norm, done_reading
from zmq_autograd.errors import ConfigurationError, PartialStepError
from zmq_autograd.node import compute
from zmq_autograd.node.current import shortened
from zmq_autograd.optimizer.groups import (
    groups_of,
    homes_of,
    hyperparameters_of,
    loaded_state,
    place,
)
from zmq_autograd.optimizer.parts import LocalPart, Part, Recipe, RemotePart
from zmq_autograd.remote import DEFAULT_TIMEOUT, RemoteWorker, caller_of
from zmq_autograd.session import checked_timeout

STEP_TIMEOUT: Final = 60.0
"""Seconds that a step waits for its turn unless told otherwise."""

T = TypeVar("T")


class DistributedOptimizer(Optimizer):
    """A torch optimizer whose parameters live on several workers.

    Each of those has an optimizer of the same class over its own parameters, and keeps the state;
    the gradients are those of a context.  Learning-rate schedulers of ``torch.optim`` take this for
    an optimizer: what they write into `param_groups` goes with the next step.

    Attributes:
        param_groups: as in torch; ``"params"`` are what `create` was given.
        defaults: the hyperparameters of a group that does not have its own.
    """

    def __init__(self, groups: list[Group], defaults: Group, parts: list[Part]) -> None:
        """Tie `parts` together; `create` makes them."""
        self._parts = parts
        self._homes = homes_of(groups)
        self._is_made = False
        super().__init__(groups, defaults)
        self._is_made = True

    @classmethod
    async def create(
        cls,
        optimizer_class: type[Optimizer],
        params: Iterable[Any],
        *args: Any,
        timeout: float | None = DEFAULT_TIMEOUT,
        **kwargs: Any,
    ) -> Self:
        """Make an optimizer, with the parameters' owners (torch: ``DistributedOptimizer``).

        Args:
            optimizer_class: one of ``torch.optim``, or one that each owner has registered under its
                own name: ``worker.register(MySGD)``.
            params: tensors of this worker, RRefs to tensors, and parameters of remote modules; with
                names, or as dicts, as in torch.
            args: for the class.
            timeout: seconds for each message to an owner, None for ever.
            kwargs: for the class.

        Raises:
            ConfigurationError: the class or the parameters cannot be.
            NotRegistered: an owner has not registered the class, or not for this worker.
            RemoteError: the class raised on an owner, or an RRef's value is no tensor.
            ZmqAutogradError: as for `RemoteWorker.call`.
            Exception: what the class raised on this worker.

        Whatever it raises, and if it is cancelled, no owner keeps anything.
        """
        _check_class(optimizer_class)
        groups = groups_of(params)
        own = list(map(hyperparameters_of, groups))
        recipe = Recipe(optimizer_class, own, args, kwargs, checked_timeout(timeout))
        parts = await _parts_of(recipe, groups)
        for group, found in zip(groups, parts[0].hyperparameters, strict=True):
            given = kwargs | group
            for key, value in found.items():
                # A tensor stays the one that the user, or a scheduler, writes to.
                group[key] = given[key] if isinstance(given.get(key), Tensor) else value
        return cls(groups, parts[0].defaults, parts)

    def add_param_group(self, param_group: Group) -> None:
        """Refuse: all groups are given to `create`.

        Raises:
            ConfigurationError: always.
        """
        if self._is_made:
            raise ConfigurationError("add_param_group: give all param groups to `create`")
        self.param_groups.append(param_group)

    # --- stepping --------------------------------------------------------------------------------

    async def step(  # type: ignore[override]
        self, context: Context, *, timeout: float | None = STEP_TIMEOUT
    ) -> None:
        """Step all parameters that have a gradient in `context`.

        The others are not touched, and ``.grad`` is left alone.  Where other contexts still need a
        parameter for a backward pass, its owner waits for them.  This context is done with what it
        has read so far: what it computed of the parameters until now may no longer be
        differentiated.

        Args:
            context: a context, after its backward passes.
            timeout: seconds that a step waits for its turn on each owner, None for ever; a worker
                that has not replied two seconds later counts as silent.

        Raises:
            PartialStepError: it was not applied on every worker, but may have been on some.
            Exception: it was not applied on any worker: what went wrong on the first of them.
            ContextError: the context has ended.
            ConfigurationError: `context` is none, or the timeout cannot be.

        Cancelling it withdraws it where its turn has not come.
        """
        local = self._local_context(context)
        seconds = shortened(checked_timeout(timeout))
        for before in self._optimizer_step_pre_hooks.values():
            before(self, (context,), {})
        groups = list(map(hyperparameters_of, self.param_groups))
        step_id = ids.random_id()
        told = [part.owner for part in self._parts if part.owner is not None]
        async with done_reading(local, step_id, told):
            outcomes = await asyncio.gather(
                *(part.step(local, step_id, groups, seconds) for part in self._parts)
            )
        for outcome in outcomes:
            for group, changed in zip(self.param_groups, outcome.changed, strict=False):
                group.update(changed)
        self._check_applied(local, outcomes)
        for after in self._optimizer_step_post_hooks.values():
            after(self, (context,), {})

    # Torch would wrap it to run its hooks, which it does before anything has been awaited.
    step.hooked = True  # type: ignore[attr-defined]

    def _local_context(self, context: Context) -> LocalContext:
        local = local_context(context)
        local.check_open()
        for part in self._parts:
            if part.owner is not None:
                caller_of(part.owner).check_context(local)
        for home in self._homes:
            if home is not local.table:
                raise local.error(f"the optimizer has parameters of worker {home.host.name!r}")
        return local

    def _check_applied(self, context: LocalContext, outcomes: list[Outcome]) -> None:
        names: dict[str, list[str]] = {"applied": [], "not applied": [], "unknown": []}
        causes: dict[str, BaseException] = {}
        for part, outcome in zip(self._parts, outcomes, strict=True):
            name = part.owner.name if part.owner is not None else context.table.host.name
            names[outcome.status].append(name)
            if outcome.error is not None:
                causes.setdefault(name, outcome.error)
        if not names["not applied"] and not names["unknown"]:
            return
        first = next(iter(causes.values()))
        if not names["applied"] and not names["unknown"]:
            raise first
        raise PartialStepError(
            applied=names["applied"],
            not_applied=names["not applied"],
            unknown=names["unknown"],
            causes=causes,
        ) from first

    async def clip_grad_norm(
        self,
        context: Context,
        max_norm: float,
        norm_type: float = 2.0,
        *,
        error_if_nonfinite: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> Tensor:
        """Clip the norm of all gradients in `context` together (torch: ``clip_grad_norm_``).

        Args:
            context: a context, after its backward passes.
            max_norm: the norm that they have at most afterwards.
            norm_type: which norm, ``float("inf")`` too.
            error_if_nonfinite: raise if the norm is infinite or NaN; nothing has changed then.
            timeout: seconds for each message to an owner, None for ever.

        Returns:
            The norm that they had, a tensor without dimensions.

        Raises:
            RuntimeError: the norm is infinite or NaN, and `error_if_nonfinite`.
            ContextError: the context has ended, or a pass was completed meanwhile.
            ZmqAutogradError: as for `RemoteWorker.call`.

        If it raises anything but the first, or is cancelled, some gradients may be clipped.
        """
        local = self._local_context(context)
        timeout, norm_type = checked_timeout(timeout), float(norm_type)
        found = await _all(part.norms(local, norm_type, timeout) for part in self._parts)
        norms: dict[int, Norm] = {}
        for part, of_part in zip(self._parts, found, strict=True):
            norms |= zip(part.numbers, of_part, strict=True)
        total = _total_norm([norms[number] for number in sorted(norms)], norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is "
                "non-finite, so it cannot be clipped. To disable this error and scale the "
                "gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        coefficient = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
        await _all(part.clip(local, coefficient, timeout) for part in self._parts)
        return total

    async def zero_grad(  # type: ignore[override]
        self, set_to_none: bool = True, *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> None:
        """Clear the parameters' ``.grad``, where a pass with ``accumulate_grad=True`` adds.

        A context's gradients are its own: no step needs this before the next one.

        Raises:
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        timeout = checked_timeout(timeout)
        await _all(part.zero_grad(set_to_none, timeout) for part in self._parts)

    # --- state -----------------------------------------------------------------------------------

    async def state_dict(  # type: ignore[override]
        self, *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> dict[str, Any]:
        """Return what one optimizer of the same class over the same parameters would return.

        Args:
            timeout: seconds for each message to an owner, None for ever.

        Raises:
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        timeout = checked_timeout(timeout)
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        found = await _all(part.read_state(timeout) for part in self._parts)
        of_parameters: dict[int, Any] = {}
        others: dict[Any, Any] = {}
        for part, state in zip(self._parts, found, strict=True):
            for key, value in state.items():
                if isinstance(key, int):
                    of_parameters[part.numbers[key]] = value
                else:
                    others[key] = value
        numbers = iter(range(sum(len(part.numbers) for part in self._parts)))
        state_dict: dict[str, Any] = {
            "state": dict(sorted(of_parameters.items())) | others,
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"}
                | {"params": [next(numbers) for _ in group["params"]]}
                for group in self.param_groups
            ],
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            state_dict = after(self, state_dict) or state_dict
        return state_dict

    async def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> None:
        """Load what `state_dict`, or that of a torch optimizer over the same parameters, returned.

        Args:
            state_dict: the state; not written to, but its tensors must not be until this returns.
            timeout: seconds for each message to an owner, None for ever.

        Raises:
            ConfigurationError: it is no state, or its groups are of other sizes; nothing has
                changed.
            RemoteError: torch refused it on an owner.
            ResourceExhausted: a tensor is larger than an owner takes in, or all of them are much
                larger than its parameters.
            ZmqAutogradError: as for `RemoteWorker.call`.

        If it raises anything else, or is cancelled, some owners may have loaded it: load it again.
        """
        timeout = checked_timeout(timeout)
        given: Any = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = before(self, given) or given
        state, groups = loaded_state(given)
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ConfigurationError(
                "load_state_dict: expected param groups of "
                f"{[len(g['params']) for g in self.param_groups]} parameters, got "
                f"{[len(g['params']) for g in groups]}"
            )
        saved = [key for group in groups for key in group["params"]]
        for group, mine in zip(groups, self.param_groups, strict=True):
            group["params"] = mine["params"]
            if "param_names" in mine:
                group.setdefault("param_names", mine["param_names"])
        hyperparameters = list(map(hyperparameters_of, groups))
        await _all(
            part.load_state(_state_of(part, state, saved), hyperparameters, timeout)
            for part in self._parts
        )
        self.param_groups = groups
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return what all of them return; if any raises, the first that does, once all have ended."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            try:
                raise result
            finally:  # or whoever keeps the error keeps what the others have returned
                del result, results
    return [result for result in results if not isinstance(result, BaseException)]


def _check_class(kind: Any) -> None:
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        raise ConfigurationError(f"expected a class of optimizers, torch.optim.SGD say, got {kind}")
    if issubclass(kind, LBFGS):
        raise ConfigurationError(
            "LBFGS evaluates the loss again within a step, by a closure, which cannot be done on "
            "another worker: use another optimizer"
        )


class _Share(NamedTuple):
    """The parameters of one owner.

    Attributes:
        owner: it, None for this worker.
        numbers: of them, among all parameters.
        parameters: those of each group, as tensors, or RRefs to them.
    """

    owner: RemoteWorker | None
    numbers: list[int]
    parameters: list[list[Any]]


async def _parts_of(recipe: Recipe, groups: list[Group]) -> list[Part]:
    """Make an optimizer on each owner of parameters."""
    shares: dict[str, _Share] = {}
    numbers = itertools.count()
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            owner, held = place(parameter)
            # There may be several sessions with one worker.
            who = "" if owner is None else owner.incarnation
            share = shares.setdefault(who, _Share(owner, [], [[] for _ in groups]))
            share.numbers.append(next(numbers))
            share.parameters[index].append(held)
    if not shares:
        raise ConfigurationError("params: expected at least one parameter, got none")

    async def part(share: _Share) -> Part:
        if share.owner is None:
            # In a thread: the first optimizer of a process has torch import its compiler, for
            # seconds, in which the peers of a loop that stands still would take it for lost.
            return await compute(LocalPart, recipe, share.parameters, share.numbers)
        return await RemotePart.create(share.owner, recipe, share.parameters, share.numbers)

    return await _all(map(part, shares.values()))


def _total_norm(norms: list[Norm], norm_type: float) -> Tensor:
    """Return the norm of all norms, bitwise as torch's ``clip_grad_norm_`` takes it."""
    there = [norm for norm in norms if norm is not None]
    if not there:
        return torch.tensor(0.0)
    # Torch takes them by dtype of the gradients.
    like: list[Tensor | None] = [torch.empty((), dtype=dtype) for dtype, _ in there]
    grouped = _group_tensors_by_device_and_dtype([like], with_indices=True)
    scalars = [
        torch.tensor(there[index][1], dtype=there[index][0].to_real())
        for _, indices in grouped.values()
        for index in indices
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(scalars), norm_type)
    return total


def _state_of(part: Part, state: Mapping[Any, Any], saved: list[Any]) -> dict[Any, Any]:
    """Return what of `state` belongs to `part`: its parameters', by its own numbers, and to all."""
    of_parameters = {
        index: state[saved[number]]
        for index, number in enumerate(part.numbers)
        if saved[number] in state
    }
    known = set(saved)
    return of_parameters | {key: value for key, value in state.items() if key not in known}
