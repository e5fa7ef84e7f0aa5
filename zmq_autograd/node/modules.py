"""An exposed module as its peers use it: what a `RemoteModule` calls, with results that travel.

The other side is `zmq_autograd.module`.  A name that arrives reaches nothing of the module but what
`ExposedModule.methods` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from zmq_autograd.engine import current_scope
from zmq_autograd.errors import ConfigurationError
from zmq_autograd.node.compute import compute
from zmq_autograd.node.current import current_call, served_call
from zmq_autograd.node.states import Handed, Item, States, items_of, state_of
from zmq_autograd.wire.tensors import DTYPES

T = TypeVar("T")

PARAMETERS_A_PAGE: Final = 200
"""How many parameters are told of in one message: half a kilobyte of its header each."""


class ExposedModule:
    """What peers may do with one module."""

    def __init__(self, module: Module) -> None:
        """Let peers use `module`."""
        self._module = module
        self._states = States(self._own, "the module's own takes")

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Return all that peers may call, by name."""
        return {
            "forward": self._module,  # through __call__, so that hooks run
            "remote_parameters": self.remote_parameters,
            "gradients": self.gradients,
            "state_dict": self.state_dict,
            "load_state_dict": self.load_state_dict,
            "read_state": self.read_state,
            "read_piece": self._states.read_piece,
            "add_piece": self._states.add_piece,
            "load_pieces": self.load_pieces,
            "train": self.train,
            "eval": self.eval,
            "zero_grad": self._module.zero_grad,
            "to": self.to,
        }

    # --- parameters ------------------------------------------------------------------------------

    async def remote_parameters(self, first: int = 0) -> tuple[list[Any], bool]:
        """Return a page of what `RemoteParameter` knows, from number `first`, and if more follow.

        Of each: its name, an RRef to it, its shape, the name of its dtype, and `requires_grad`.
        """
        rest = islice(self._module.named_parameters(), first, None)
        page = [
            (name, _to(p), list(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad)
            for name, p in islice(rest, PARAMETERS_A_PAGE)
        ]
        return page, next(rest, None) is not None

    async def gradients(self) -> Handed:
        """Return the gradients of the parameters in the context of the call, by name."""
        scope = current_scope.get()
        if scope is None:
            raise ConfigurationError("gradients belong to a context: call within one")
        found = scope.context.gradients()
        named = self._module.named_parameters()
        return self._states.hand_out([(False, name, found[p]) for name, p in named if p in found])

    # --- state -----------------------------------------------------------------------------------

    async def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, if it fits into one message."""
        return dict(await _at_once(self._copied))

    async def load_state_dict(
        self, state: Mapping[str, Any], strict: bool = True
    ) -> tuple[list[str], list[str]]:
        """Load a state; return the keys that are missing and those that are not expected."""
        missing, unexpected = await _at_once(self._module.load_state_dict, state, strict=strict)
        return list(missing), list(unexpected)

    async def read_state(self) -> Handed:
        """Return a copy of the state of one moment."""
        return self._states.hand_out(items_of(await _at_once(self._copied)))

    async def load_pieces(
        self, last: list[Item], rref: Any = None, strict: bool = True
    ) -> tuple[list[str], list[str]]:
        """Load a state at once, all pieces of it; see `load_state_dict`."""
        return await self.load_state_dict(state_of(self._states.whole(last, rref)), strict)

    def _own(self) -> Iterator[Item]:
        """Yield what the state is made of at least, without any of the module's own code."""
        for name, tensor in chain(self._module.named_parameters(), self._module.named_buffers()):
            yield False, name, tensor

    def _copied(self) -> Mapping[str, Any]:
        """Return a state dict that shares no memory with the module."""
        state = self._module.state_dict()
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.detach().clone()
        return state

    # --- modes, dtype and device -----------------------------------------------------------------

    def train(self, mode: bool = True) -> None:
        """Set the module to training mode, or to evaluation."""
        self._module.train(mode)

    def eval(self) -> None:
        """Set the module to evaluation mode."""
        self._module.eval()

    async def to(self, device: str | None, dtype: str | None, non_blocking: bool = False) -> None:
        """Convert the parameters and buffers, in place."""
        await _at_once(self._convert, device, dtype, non_blocking)

    def _convert(self, device: str | None, dtype: str | None, non_blocking: bool) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}")
        if device is not None and torch.device(device).type == "meta":
            raise ValueError("device 'meta' keeps no values: the module's would be lost")
        before = list(self._module.parameters())
        # What is made here outlives the mode of whoever calls.
        with torch.inference_mode(False):
            self._module.to(
                device, None if dtype is None else DTYPES[dtype], non_blocking=non_blocking
            )
        if any(old is not new for old, new in zip(before, self._module.parameters(), strict=True)):
            raise RuntimeError(
                "the module's parameters were replaced, not changed: ask for the module again"
            )


async def _at_once(function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Run `function`, which takes or sets the module's state, while no optimizer steps."""
    call = current_call.get()
    if call is None:  # its owner's own use of it
        return await compute(function, *args, **kwargs)
    async with call.node.contexts.gate.without_steps():
        return await compute(function, *args, **kwargs)


def _to(value: Any) -> Any:
    """Return an RRef to `value`."""
    return served_call().node.rrefs.keep(value)
