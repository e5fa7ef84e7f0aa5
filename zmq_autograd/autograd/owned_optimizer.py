"""A torch optimizer over parameters of this worker, stepped with gradients that are not in `.grad`.

What of a `DistributedOptimizer` its parameters' owner has.  Knows nothing of contexts or of who
asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, required

from zmq_autograd.autograd.accumulate import grads_swapped, is_dense, steps_of
from zmq_autograd.errors import ConfigurationError

TORCH_PREFIX: Final = "torch.optim."

TORCH_OPTIMIZERS: Final[dict[str, type[Optimizer]]] = {
    TORCH_PREFIX + name: getattr(torch.optim, name)
    for name in (
        *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "Muon"),
        *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
    )
    if hasattr(torch.optim, name)  # younger than the oldest torch supported
}
"""Torch's own classes, by their names on the wire; LBFGS needs a closure, which cannot travel."""

Gradients = Mapping[Tensor, Tensor]
Group = dict[str, Any]

Status = Literal["applied", "not applied", "unknown"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step on one worker.

    Attributes:
        status: whether it was applied; unknown where something was changed and then went wrong.
        error: what went wrong.
        changed: for each group the hyperparameters that the optimizer itself has changed.
    """

    status: Status
    error: BaseException | None = None
    changed: list[Group] = field(default_factory=list)


class OwnedOptimizer:
    """See the module.  Its methods may be called in any thread.

    Attributes:
        parameters: in the order of the groups.
    """

    def __init__(
        self,
        kind: type[Optimizer],
        groups: Sequence[Group],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Make a torch optimizer.

        Args:
            kind: its class.
            groups: param groups, some of which may have no parameters here.
            args: of the class, after the groups.
            kwargs: likewise.

        Raises:
            ConfigurationError: a parameter is no tensor, or there twice.
            Exception: whatever the class raises.
        """
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        for parameter in self.parameters:
            if not isinstance(parameter, Tensor):
                raise ConfigurationError(
                    f"expected parameters that are tensors, got a {type(parameter).__name__}"
                )
        if len(set(self.parameters)) != len(self.parameters):
            raise ConfigurationError("a parameter is given more than once")
        # As where state is read or loaded: it outlives the mode of whoever asks.
        with torch.inference_mode(mode=False):
            self._optimizer = kind([dict(group) for group in groups], *args, **kwargs)
        self._is_torchs = kind in TORCH_OPTIMIZERS.values()
        self._lock = threading.Lock()

    @property
    def defaults(self) -> Group:
        """The hyperparameters of a group that does not have its own."""
        return {k: v for k, v in self._optimizer.defaults.items() if v is not required}

    @property
    def hyperparameters(self) -> list[Group]:
        """For each group its hyperparameters."""
        groups = self._optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    # --- stepping --------------------------------------------------------------------------------

    def step(self, gradients: Gradients, groups: Sequence[Group]) -> Outcome:
        """Step with `gradients` in the parameters' ``.grad``, None where there is none.

        Args:
            gradients: by parameter; others are passed over.
            groups: for each group the hyperparameters to set before.
        """
        with self._lock:
            return self._step(gradients, groups)

    def _step(self, gradients: Gradients, groups: Sequence[Group]) -> Outcome:
        for group, hyperparameters in zip(self._optimizer.param_groups, groups, strict=True):
            group.update(hyperparameters, params=group["params"])  # which are not for peers to set
        before = self._mark()
        try:
            self._check_fused()
            with grads_swapped({p: gradients.get(p) for p in self.parameters}):
                self._optimizer.step()
            changed = [
                {key: value for key, value in now.items() if not _is_same(value, set_to.get(key))}
                for now, set_to in zip(self.hyperparameters, groups, strict=True)
            ]
        except BaseException as error:  # noqa: BLE001  # SystemExit too: the holder hears of it
            return Outcome("not applied" if before.still_holds(self._mark()) else "unknown", error)
        return Outcome("applied", changed=changed)

    def _check_fused(self) -> None:
        """Raise ConfigurationError if a fused step would read or write beyond its tensors.

        Torch's fused kernels go through the memory of parameters and state alike, and check neither
        shapes nor strides; state, and whether to step so, may be a peer's.
        """
        for group in self._optimizer.param_groups:
            for parameter in group["params"] if group.get("fused") else ():
                if not is_dense(parameter):
                    raise ConfigurationError(
                        "a fused step needs parameters whose elements fill their memory, got "
                        f"{_layout(parameter)}"
                    )
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    if key != "step" and not _is_laid_out(value, parameter):
                        raise ConfigurationError(
                            f"a fused step needs a state {key!r} that is laid out as its parameter "
                            f"of shape {list(parameter.shape)}, got {_layout(value)}"
                        )

    def _mark(self) -> _Mark:
        # What goes past torch's version counters (``p.data.add_()``) only its copy shows.  Torch's
        # own classes do not.
        copies = [] if self._is_torchs else [p.detach().clone() for p in self.parameters]
        values = [*self.parameters, *_values_in(self._optimizer.state)]
        return _Mark(values, [_version(value) for value in values], copies)

    # --- clipping --------------------------------------------------------------------------------

    def norms(self, gradients: Gradients, norm_type: float) -> list[Tensor | None]:
        """Return for each parameter the norm of its gradient, a scalar, as torch takes it."""
        grads = [gradients.get(parameter) for parameter in self.parameters]
        return [None if g is None else torch._foreach_norm([g], norm_type)[0] for g in grads]

    def scaled(self, gradients: Gradients, coefficient: Tensor) -> dict[Tensor, Tensor]:
        """Return the gradients of the parameters multiplied by `coefficient`, a scalar."""
        return {
            parameter: gradients[parameter] * coefficient.to(gradients[parameter].device)
            for parameter in self.parameters
            if parameter in gradients
        }

    # --- state -----------------------------------------------------------------------------------

    def state(self) -> dict[Any, Any]:
        """Return a copy of the state, by number of the parameter here."""
        with self._lock, torch.inference_mode(mode=False):
            state: dict[Any, Any] = self._optimizer.state_dict()["state"]
            return {key: copied(value) for key, value in state.items()}

    def load(self, state: Mapping[Any, Any], groups: Sequence[Group]) -> None:
        """Load a copy of a state.

        Args:
            state: by number of the parameter here.
            groups: for each group its hyperparameters.

        Raises:
            Exception: whatever torch raises.
        """
        numbers = iter(range(len(self.parameters)))
        param_groups = [
            {**new, "params": [next(numbers) for _ in group["params"]]}
            for group, new in zip(self._optimizer.param_groups, groups, strict=True)
        ]
        with self._lock, torch.inference_mode(mode=False):
            own = {number: self._own(number, values) for number, values in state.items()}
            self._optimizer.load_state_dict({"state": own, "param_groups": param_groups})

    def _own(self, number: Any, values: Any) -> Any:
        """Return a copy of the state of a parameter, its tensors with the parameter's strides.

        So torch makes them; what has travelled is contiguous.
        """
        if not isinstance(values, Mapping) or number not in range(len(self.parameters)):
            return copied(values)
        like = self.parameters[number]
        return {
            key: torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
            if isinstance(value, Tensor) and value.shape == like.shape and not value.is_sparse
            else copied(value)
            for key, value in values.items()
        }

    def zero_grad(self, set_to_none: bool) -> None:
        """Clear the parameters' ``.grad``, which is not what a step that runs has there."""
        with grads_swapped({}):
            self._optimizer.zero_grad(set_to_none)


@dataclass(frozen=True, slots=True, eq=False)
class _Mark:
    """How parameters and state are at one time.

    Attributes:
        values: the parameters, and all that is in the state.
        versions: those of the tensors in `values`.
        copies: of the parameters, where these say more.
    """

    values: list[Any]
    versions: list[int]
    copies: list[Tensor]

    def still_holds(self, now: _Mark) -> bool:
        """Tell whether nothing has changed by `now`."""
        return (
            self.versions == now.versions
            and all(a is b for a, b in zip(self.values, now.values, strict=True))
            and all(torch.equal(a, b) for a, b in zip(self.copies, now.copies, strict=True))
        )


def _is_laid_out(value: Any, parameter: Tensor) -> bool:
    return value is None or (
        isinstance(value, Tensor)
        and (value.shape, value.layout) == (parameter.shape, parameter.layout)
        and steps_of(value) == steps_of(parameter)
    )


def _layout(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    strides = f" and strides {value.stride()}" if value.layout is torch.strided else ""
    return f"one of shape {list(value.shape)}{strides}"


def _version(value: Any) -> int:
    # Torch does not count those of inference tensors.
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _values_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _values_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _values_in(item)
    else:
        yield value


def copied(value: Any) -> Any:
    """Return a state, or a part of one, that shares no memory with `value`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        is_alike = (one.dtype, one.device) == (other.dtype, other.device)
        return is_alike and torch.equal(one, other)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) is type(other) and bool(one == other)
