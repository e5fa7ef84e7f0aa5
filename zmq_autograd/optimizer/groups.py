"""What a `DistributedOptimizer` is given, sorted: param groups, and who owns which parameter."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zmq_autograd.autograd.owned_optimizer import Group
from zmq_autograd.engine import Contexts
from zmq_autograd.errors import ConfigurationError
from zmq_autograd.module import RemoteParameter
from zmq_autograd.remote import RemoteWorker
from zmq_autograd.rref import RRef, home_of

Parameter = Tensor | RRef | RemoteParameter


def groups_of(params: Any) -> list[Group]:
    """Return the param groups that `params` stands for, each with a list of parameters.

    Raises:
        ConfigurationError: it is nothing that torch's optimizers would take, with RRefs and remote
            parameters among the tensors.
    """
    if isinstance(params, (Parameter, dict, str)) or not isinstance(params, Iterable):
        raise ConfigurationError(
            f"params: expected a list of parameters or of param groups, got a {_kind(params)}"
        )
    given = list(params)
    if not given:
        raise ConfigurationError("params: expected at least one parameter, got an empty list")
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    sorted_groups = [_group(group) for group in groups]
    _check_distinct(sorted_groups)
    return sorted_groups


def _group(given: Any) -> Group:
    if not isinstance(given, dict) or "params" not in given:
        raise ConfigurationError(
            f"params: expected groups that are dicts with 'params', got a {_kind(given)}"
        )
    params = given["params"]
    if isinstance(params, set):
        raise ConfigurationError("params: expected parameters in order, got a set: use a list")
    if isinstance(params, Parameter):
        params = [params]
    if not isinstance(params, Iterable):
        raise ConfigurationError(f"params: expected a list of parameters, got a {_kind(params)}")
    listed = list(params)
    group = dict(given)
    if any(isinstance(item, tuple) for item in listed):  # as `named_parameters` gives them
        if not all(isinstance(item, tuple) and len(item) == 2 for item in listed):
            raise ConfigurationError("params: expected names for all parameters or for none")
        group["param_names"] = [name for name, _ in listed]
        listed = [parameter for _, parameter in listed]
    for parameter in listed:
        if not isinstance(parameter, Parameter):
            hint = ": pass its parameters()" if hasattr(parameter, "parameters") else ""
            raise ConfigurationError(
                "params: expected tensors, RRefs to tensors, or a remote module's parameters, got "
                f"a {_kind(parameter)}{hint}"
            )
    group["params"] = listed
    return group


def _check_distinct(groups: list[Group]) -> None:
    if len({"param_names" in group for group in groups}) > 1:
        raise ConfigurationError("params: expected names in all param groups or in none")
    parameters = [place(parameter) for group in groups for parameter in group["params"]]
    keys = [p.rref_id if isinstance(p, RRef) else p for _, p in parameters]
    if len(set(keys)) != len(keys):
        raise ConfigurationError("some parameters appear more than once")


def loaded_state(given: Any) -> tuple[Mapping[Any, Any], list[Group]]:
    """Return the state, and a copy of the param groups, of an optimizer's state dict.

    Raises:
        ConfigurationError: it is none.
    """
    match given:
        case {"state": Mapping() as state, "param_groups": [*saved]} if all(map(_is_group, saved)):
            return state, copy.deepcopy(saved)
    raise ConfigurationError(
        "load_state_dict: expected a dict with 'state' and 'param_groups', as `state_dict` returns "
        f"it, got {reprlib.repr(given)}"
    )


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), Sequence)


def place(parameter: Parameter) -> tuple[RemoteWorker | None, Any]:
    """Return a parameter's owner, None for this worker, and the tensor, or the RRef to it."""
    if isinstance(parameter, Tensor):
        return None, parameter
    rref = _rref_of(parameter)
    return (None, rref.local_value()) if rref.is_owner else (rref.owner, rref)


def hyperparameters_of(group: Group) -> Group:
    """Return what of a param group is for its owners, too: not which parameters it has."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def homes_of(groups: list[Group]) -> set[Contexts]:
    """Return the contexts of the workers of this process that parameters were said to be on."""
    given = (parameter for group in groups for parameter in group["params"])
    rrefs = (_rref_of(parameter) for parameter in given if not isinstance(parameter, Tensor))
    return {home_of(rref) for rref in rrefs if rref.is_owner}


def _rref_of(parameter: RRef | RemoteParameter) -> RRef:
    return parameter.rref if isinstance(parameter, RemoteParameter) else parameter


def _kind(value: Any) -> str:
    return type(value).__qualname__
