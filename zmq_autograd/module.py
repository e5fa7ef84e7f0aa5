"""RemoteModules: an `nn.Module` that lives on another worker, used like one's own.

All of it is calls of what the module's owner exposed; the other side is `node.modules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from zmq_autograd.engine import Context, local_context
from zmq_autograd.errors import ConfigurationError, NotRegistered, ProtocolError
from zmq_autograd.node import Held
from zmq_autograd.node.states import Method, items_of, load_all, read_all, state_of
from zmq_autograd.wire.tensors import DTYPES

if TYPE_CHECKING:
    from zmq_autograd.remote import RemoteWorker
    from zmq_autograd.rref import RRef


class IncompatibleKeys(NamedTuple):
    """What did not match when a state was loaded; torch returns the same.

    Attributes:
        missing_keys: the module's, that the state has not.
        unexpected_keys: the state's, that the module has not.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class RemoteParameter:
    """A parameter that lives on another worker; `RemoteModule.parameters` returns them.

    Attributes:
        name: as in the module's ``named_parameters()``.
        rref: an RRef to the Parameter.
        shape: its shape, when the module was last asked.
        dtype: its dtype, likewise.
        requires_grad: whether gradients are computed for it, likewise.
    """

    def __init__(
        self, name: str, rref: RRef, shape: torch.Size, dtype: torch.dtype, requires_grad: bool
    ) -> None:
        """Describe a parameter; the module does."""
        self.name = name
        self.rref = rref
        self.shape = shape
        self.dtype = dtype
        self.requires_grad = requires_grad

    @property
    def owner(self) -> RemoteWorker:
        """The worker where it lives."""
        owner: RemoteWorker = self.rref.owner
        return owner

    def numel(self) -> int:
        """Return how many elements it has."""
        return self.shape.numel()

    def __repr__(self) -> str:
        what = f"{list(self.shape)}, {self.dtype}"
        return f"<RemoteParameter {self.name!r} on {self.owner.name!r}: {what}>"


class RemoteModule:
    """An `nn.Module` that lives on another worker (torch: ``RemoteModule``).

    Got from `RemoteWorker.module`, or made of an RRef.  ``await net(x)`` calls it, hooks included,
    where it lives; within a context gradients flow through it and into its parameters.  Whatever is
    passed goes to the module; a call waits for its reply as long as was said when this was made.

    Attributes:
        owner: the worker where it lives.
        name: the name under which it is registered there, or its RRef's id.
    """

    def __init__(self, owner: RemoteWorker, name: str, method: Method) -> None:
        """Use a module by its methods; its parameters are not known yet."""
        self.owner = owner
        self.name = name
        self._method = method
        self._parameters: dict[str, RemoteParameter] = {}

    @classmethod
    async def registered(cls, owner: RemoteWorker, name: str, timeout: float | None) -> Self:
        """Return the module that `owner` has registered as `name`; see `RemoteWorker.module`."""
        module = cls(owner, name, lambda key: owner.function(f"{name}.{key}", timeout=timeout))
        try:
            await module._refresh()
        except NotRegistered as error:
            raise NotRegistered(
                f"no module is registered as {name[:200]!r} with expose='module' for this worker",
                type_name=error.type_name,
                worker=error.worker or owner.name,
                path=error.path,
            ) from error
        return module

    @classmethod
    async def from_rref(cls, rref: RRef, *, timeout: float | None = 60.0) -> Self:
        """Return the module that `rref` refers to; its class is registered with expose="module".

        Args:
            rref: ``await bob.remote("Net", 3)``, say.
            timeout: seconds that each call waits for its reply, None for ever.

        Raises:
            ConfigurationError: it lives on this worker, or is no RRef.
            NotRegistered: the class is not registered so, or not for this worker.
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        if not isinstance(rref, Held):
            raise ConfigurationError(f"from_rref: expected an RRef, got a {type(rref).__name__}")
        if rref.is_owner:
            raise ConfigurationError("the module lives on this worker: use `rref.local_value()`")
        name = f"RRef {rref.rref_id}"
        module = cls(rref.owner, name, lambda key: rref.method(key, timeout=timeout))
        await module._refresh()
        return module

    def __repr__(self) -> str:
        return f"<RemoteModule {self.name!r} on {self.owner.name!r}>"

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with its hooks, and return its result (torch: ``forward_async``).

        Raises:
            ZmqAutogradError: as for `RemoteWorker.call`.

        Cancelling it drops the result; the module finishes.
        """
        return await self._method("forward")(*args, **kwargs)

    # --- parameters ------------------------------------------------------------------------------

    def parameters(self) -> list[RemoteParameter]:
        """Return its parameters, each once, in the module's order (torch: `remote_parameters`)."""
        return list(self._parameters.values())

    def named_parameters(self) -> list[tuple[str, RemoteParameter]]:
        """Return its parameters with their names, each once."""
        return list(self._parameters.items())

    async def gradients(self, context: Context) -> dict[str, Tensor]:
        """Return the gradients of its parameters in `context`, by name.

        Copies of what ``context.gradients()`` has on its owner: a parameter that no pass led to has
        none.

        Args:
            context: a context of this side's worker; it need not be the current one.

        Raises:
            ContextError: the context has ended, or is another worker's.
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        with local_context(context).entered():
            items = await read_all(self._method, "gradients")
        return {key: value for _, key, value in items}

    async def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear its parameters' ``.grad``, where a pass with ``accumulate_grad=True`` adds."""
        await self._method("zero_grad")(set_to_none)

    # --- state -----------------------------------------------------------------------------------

    async def state_dict(self) -> dict[str, Any]:
        """Return a copy of its parameters and buffers of one moment, on this side.

        A state that is larger than one message comes in several; meanwhile its owner keeps a copy.

        Raises:
            ResourceExhausted: a tensor is larger than this worker takes in, or the owner keeps as
                much as it is ready to.
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        return state_of(await read_all(self._method, "read_state"))

    async def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Copy a state into its parameters and buffers, in place: RRefs to them stay valid.

        A state that is larger than one message goes in several, and is loaded once it is complete;
        its tensors must not be written to until this returns.

        Args:
            state_dict: as `state_dict` returns it, or a module's own.
            strict: raise if keys do not match.

        Raises:
            RemoteError: keys or shapes do not match, in torch's words.
            ResourceExhausted: a tensor is larger than the owner takes in, or all of them are much
                larger than the module.
            ZmqAutogradError: as for `RemoteWorker.call`.

        Cancelling it may leave the module loaded or not.
        """
        items = [
            (is_metadata, key, value.detach() if isinstance(value, Tensor) else value)
            for is_metadata, key, value in items_of(state_dict)
        ]
        reply = await load_all(self._method, items, self.owner.limits, strict)
        return IncompatibleKeys(*reply)

    # --- modes, dtype and device -----------------------------------------------------------------

    async def train(self, mode: bool = True) -> Self:
        """Set it to training mode, or to evaluation; for all who use it."""
        await self._method("train")(mode)
        return self

    async def eval(self) -> Self:
        """Set it to evaluation mode; for all who use it."""
        await self._method("eval")()
        return self

    async def to(self, *args: Any, **kwargs: Any) -> Self:
        """Convert its parameters and buffers in place: RRefs to them stay valid.

        Args:
            args: a device, a dtype, both, or a tensor that has them; as for ``nn.Module.to``.
            kwargs: ``device``, ``dtype`` and ``non_blocking``, likewise.

        Raises:
            TypeError: they are none of these.
            RemoteError: the owner has no such device, or the module cannot be converted.
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, non_blocking, memory_format = parsed
        if memory_format is not None:
            raise TypeError("to: a memory format does not change a remote module")
        await self._method("to")(
            None if device is None else str(device),
            None if dtype is None else str(dtype).removeprefix("torch."),
            non_blocking,
        )
        await self._refresh()
        return self

    async def _refresh(self) -> None:
        """Ask the owner what the parameters are now."""
        count, more = 0, True
        while more:
            page, more = _page(await self._method("remote_parameters")(count))
            for now in page:
                known = self._parameters.setdefault(now.name, now)
                known.shape, known.dtype = now.shape, now.dtype
                known.requires_grad = now.requires_grad
            count += len(page)


def _page(told: Any) -> tuple[list[RemoteParameter], bool]:
    """Return the parameters that the owner told of, and whether there are more.

    Raises:
        ProtocolError: it told something else.
    """
    try:
        entries, more = told
        page = [_parameter(*entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"module: expected a page of parameters ({error!r})") from error
    if more and not page:
        raise ProtocolError("module: expected more parameters, got none")
    return page, bool(more)


def _parameter(
    name: str, rref: Any, shape: list[int], dtype: str, requires_grad: bool
) -> RemoteParameter:
    if not isinstance(rref, Held):
        raise TypeError(f"expected an RRef, got {type(rref).__name__}")
    return RemoteParameter(
        str(name), cast("RRef", rref), torch.Size(shape), DTYPES[dtype], bool(requires_grad)
    )
