"""What peers do with optimizers that live here: the other side of `zmq_autograd.optimizer`.

An optimizer is kept as the value of an RRef, and dropped with its holder.  Whoever makes one holds
RRefs to its parameters, so it reaches nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor
from torch.optim import Optimizer

from zmq_autograd.autograd.owned_optimizer import (
    TORCH_OPTIMIZERS,
    TORCH_PREFIX,
    Group,
    Outcome,
    OwnedOptimizer,
)
from zmq_autograd.engine import LocalContext
from zmq_autograd.engine.steps import clip, norms, step
from zmq_autograd.errors import ConfigurationError, ProtocolError
from zmq_autograd.node.current import served_call, served_value
from zmq_autograd.node.states import Handed, Item, States, counted
from zmq_autograd.session import checked_timeout, error_response

if TYPE_CHECKING:
    from zmq_autograd.node.node import Node
    from zmq_autograd.node.registry import Registry

PREFIX: Final = "za.optimizer."


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Parameters of an optimizer that is to be made, as far as they have come."""

    parameters: list[Tensor] = dataclasses.field(default_factory=list)


class Made:
    """An optimizer as its holder's RRef refers to it.

    Attributes:
        optimizer: it.
        states: those of its states that travel.
    """

    def __init__(self, optimizer: OwnedOptimizer) -> None:
        self.optimizer = optimizer
        self.states = States(
            lambda: [(False, "", parameter) for parameter in optimizer.parameters],
            "its parameters take",
        )


def add_to(registry: Registry) -> None:
    """Offer all of it."""
    functions = {
        "gather": _gather,
        "create": partial(_create, registry),
        "step": _step,
        "norms": _norms,
        "clip": _clip,
        "read_state": _read_state,
        "read_piece": _read_piece,
        "add_piece": _add_piece,
        "load_pieces": _load_pieces,
        "zero_grad": _zero_grad,
    }
    for name, function in functions.items():
        registry.register(function, PREFIX + name, internal=True)


def optimizer_class(name: str, registry: Registry, peer: str) -> type[Optimizer]:
    """Return the class of that name: one of torch's, or one that is registered for `peer`.

    Raises:
        NotRegistered: there is none, or not for this peer.
        ConfigurationError: it is no optimizer.
    """
    if name.startswith(TORCH_PREFIX):
        kind: type | None = TORCH_OPTIMIZERS.get(name)
    else:
        kind = registry.find_class(name, peer)
    if kind is None or not issubclass(kind, Optimizer):
        raise ConfigurationError(f"{name[:200]!r} is no class of optimizers")
    return kind


# --- making one ----------------------------------------------------------------------------------


async def _gather(rrefs: list[Any], gathered: Any = None) -> Any:
    """Take in RRefs to more parameters; return an RRef to all of them."""
    kept = Gathered() if gathered is None else _gathered(gathered)
    kept.parameters.extend(rref.local_value() for rref in rrefs)
    return served_call().node.rrefs.keep(kept) if gathered is None else gathered


async def _create(
    registry: Registry,
    name: str,
    gathered: Any,
    counts: list[int],
    groups: list[Group],
    args: list[Any],
    kwargs: Group,
) -> tuple[Any, Group, list[Group]]:
    """Make an optimizer.

    Args:
        registry: of this worker.
        name: of its class.
        gathered: an RRef to its parameters.
        counts: how many of them each group has.
        groups: the hyperparameters that each group has of its own.
        args: of the class, after the groups.
        kwargs: likewise.

    Returns:
        An RRef to it, its defaults, and the hyperparameters of each group.
    """
    call = served_call()
    kind = optimizer_class(name, registry, call.peer.name)
    rest = iter(_gathered(gathered).parameters)
    whole = [
        {**group, "params": [next(rest) for _ in range(count)]}
        for group, count in zip(groups, counts, strict=True)
    ]
    node: Node = call.node
    optimizer = await node.compute(lambda: OwnedOptimizer(kind, whole, args, kwargs))
    return node.rrefs.keep(Made(optimizer)), optimizer.defaults, optimizer.hyperparameters


# --- using it ------------------------------------------------------------------------------------


async def _step(
    rref: Any,
    context_id: int,
    committed: int,
    step_id: int,
    groups: list[Group],
    seconds: float | None,
) -> tuple[str, dict[str, Any] | None, list[Group]]:
    """Step; return the fields of an `Outcome`, its error as those of an `ErrorResponse`."""
    call = served_call()
    node: Node = call.node
    optimizer = _made(rref).optimizer
    try:
        seconds = checked_timeout(seconds)  # not a number, it would upset the loop's timers
        context = await _context(context_id, committed)
    except Exception as error:  # noqa: BLE001  # whatever it is, nothing has begun
        outcome = Outcome("not applied", error)
    else:
        outcome = await step(
            optimizer, node.contexts, context, step_id, groups, seconds, told=(call.peer,)
        )
    if outcome.error is None:
        return outcome.status, None, outcome.changed
    told = error_response(outcome.error, node.name, send_traceback=node.tracebacks)
    return outcome.status, dataclasses.asdict(told), []


async def _norms(
    rref: Any, context_id: int, committed: int, norm_type: float
) -> tuple[list[str | None], list[float | None]]:
    """Return for each parameter its gradient's dtype and norm; None where there is none."""
    optimizer = _made(rref).optimizer
    context = await _context(context_id, committed)
    found = await norms(optimizer, served_call().node.contexts, context, norm_type)
    dtypes = [None if norm is None else str(norm[0]) for norm in found]
    return dtypes, [None if norm is None else norm[1] for norm in found]


async def _clip(rref: Any, context_id: int, committed: int, coefficient: Tensor) -> None:
    """Scale the gradients of the parameters in a context."""
    optimizer = _made(rref).optimizer
    context = await _context(context_id, committed)
    await clip(optimizer, served_call().node.contexts, context, coefficient)


async def _read_state(rref: Any) -> Handed:
    """Return a copy of the state of one moment."""
    made = _made(rref)
    return made.states.hand_out(state_items(await served_call().node.compute(made.optimizer.state)))


async def _read_piece(rref: Any, kept: Any, number: int) -> list[Item]:
    return await _made(rref).states.read_piece(kept, number)


async def _add_piece(rref: Any, piece: list[Item], kept: Any = None) -> Any:
    return await _made(rref).states.add_piece(piece, kept)


async def _load_pieces(rref: Any, last: list[Item], kept: Any, groups: list[Group]) -> None:
    """Load a state at once, all pieces of it, and the hyperparameters of each group.

    Raises:
        ResourceExhausted: it is much larger than the parameters.
    """
    made = _made(rref)
    items = made.states.whole(last, kept)
    made.states.check_size(counted(items))  # other than a module, it keeps whatever it loads
    await served_call().node.compute(partial(made.optimizer.load, state_from(items), groups))


async def _zero_grad(rref: Any, set_to_none: bool) -> None:
    optimizer = _made(rref).optimizer
    await served_call().node.compute(partial(optimizer.zero_grad, set_to_none))


def state_items(state: Mapping[Any, Any]) -> list[Item]:
    """Return an optimizer's state as items that travel, no larger than one tensor each."""
    items: list[Item] = []
    for key, value in state.items():
        if isinstance(value, dict) and value:
            items += [(False, f"{key}.{name}", (key, name, of)) for name, of in value.items()]
        else:
            items.append((False, str(key), (key, value)))
    return items


def state_from(items: list[Item]) -> dict[Any, Any]:
    """Return the state that `items`, which arrived, hold.

    Raises:
        ProtocolError: they are not what `state_items` makes.
    """
    state: dict[Any, Any] = {}
    for _, _, entry in items:
        try:
            match entry:
                case (key, value):
                    state[key] = value
                case (key, name, value) if isinstance(of := state.setdefault(key, {}), dict):
                    of[name] = value
                case _:
                    raise TypeError("no key and value")
        except TypeError as error:  # a key that cannot be one, too
            raise ProtocolError(f"state: expected an entry of one ({error})") from error
    return state


# --- what they are called with -------------------------------------------------------------------


def _made(rref: Any) -> Made:
    return served_value(rref, Made, "an optimizer")


def _gathered(rref: Any) -> Gathered:
    return served_value(rref, Gathered, "parameters of an optimizer")


async def _context(context_id: int, committed: int) -> LocalContext | None:
    """Return a context once it has the gradients of pass `committed`; None if it is not here."""
    contexts = served_call().node.contexts
    context: LocalContext | None = contexts.reached(context_id)
    if context is not None:
        context.passes.learn_committed(committed)
        await context.passes.until_committed()
    return context
