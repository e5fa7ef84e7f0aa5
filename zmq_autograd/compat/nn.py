"""`torch.distributed.nn.RemoteModule`: a module that lives on another worker, by RRefs to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.distributed.remote_device import _remote_device
from torch.futures import Future
from torch.nn import Module
from torch.utils._pytree import tree_map

from zmq_autograd.compat.rpc import state
from zmq_autograd.compat.rpc.api import remote, rpc_async, rpc_sync
from zmq_autograd.compat.rpc.errors import CannotTravel, NotAllowed
from zmq_autograd.compat.rpc.rref import PyRRef, RRef

__all__ = ["RemoteModule"]

_REMOTE_MODULE_PICKLED_ATTRIBUTES: Final = (
    "on",
    "device",
    "is_device_map_set",
    "is_scriptable",
    "generated_methods",
    "module_rref",
)
"""What of a remote module travels; torch's name for it."""

_GENERATED: Final = ("forward_async", "forward")

_NOT_SUPPORTED: Final = (
    *("register_buffer", "register_parameter", "add_module", "apply", "cuda", "ipu", "xpu", "cpu"),
    *("type", "float", "double", "half", "bfloat16", "to", "register_backward_hook"),
    *("register_forward_pre_hook", "register_forward_hook", "state_dict", "load_state_dict"),
    *("named_parameters", "buffers", "named_buffers", "children", "named_children", "modules"),
    *("named_modules", "requires_grad_", "zero_grad", "share_memory", "extra_repr"),
)


@dataclass(frozen=True, slots=True)
class _Call:
    """What calls a module: among the attributes of a remote one that arrived, as in torch."""

    module_rref: PyRRef[Module]
    device: str
    is_async: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = rpc_async if self.is_async else rpc_sync
        arguments = (self.module_rref, self.device, args, kwargs)
        return call(self.module_rref.owner(), _forward, arguments)


class _RemoteModule(Module):
    """A module made, or found, on another worker; see `RemoteModule`."""

    def __init__(
        self,
        remote_device: str,
        module_cls: Callable[..., Module],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        _module_interface_cls: type[Any] | None = None,
    ) -> None:
        super().__init__()
        self._prepare(remote_device, _module_interface_cls)
        made = (module_cls, tuple(args or ()), dict(kwargs or {}), self.device)
        self.module_rref: PyRRef[Module] = remote(self.on, _create_module, made)

    def _prepare(self, remote_device: str, interface: type[Any] | None) -> None:
        place = _remote_device(remote_device)
        name = place.worker_name()
        self.on: Any = place.rank() if name is None else name
        state.agent().get_worker_info(self.on)  # raises where there is no such worker
        self.device = str(place.device())
        self.is_device_map_set = False
        self.is_scriptable = interface is not None
        self.generated_methods = _GENERATED
        self._interface = interface

    @staticmethod
    def init_from_module_rref(
        remote_device: str,
        module_rref: PyRRef[Module],
        _module_interface_cls: type[Any] | None = None,
    ) -> RemoteModule:
        """Return a remote module for a module that is there already.

        Args:
            remote_device: where it is, as for `RemoteModule`.
            module_rref: the module.
        """
        made = RemoteModule.__new__(RemoteModule)
        Module.__init__(made)
        made._prepare(remote_device, _module_interface_cls)
        made.module_rref = module_rref
        return made

    # --- what it does ----------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module where it is, hooks and all, and return what it returns."""
        return _Call(self.module_rref, self.device, is_async=False)(*args, **kwargs)

    def forward_async(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the module where it is and return the future of what it returns."""
        future: Future[Any] = _Call(self.module_rref, self.device, is_async=True)(*args, **kwargs)
        return future

    def remote_parameters(self, recurse: bool = True) -> list[RRef[nn.Parameter]]:
        """Return RRefs to the module's parameters, for an optimizer.

        Args:
            recurse: those of its submodules, too.
        """
        found: list[RRef[nn.Parameter]] = rpc_sync(
            self.module_rref.owner(), _parameters, (self.module_rref, recurse)
        )
        return found

    def get_module_rref(self) -> PyRRef[Module]:
        """Return the RRef to the module."""
        return self.module_rref

    def train(self, mode: bool = True) -> Self:
        """Put the module into training mode, or out of it."""
        rpc_sync(self.module_rref.owner(), _train, (self.module_rref, mode))
        return self

    def eval(self) -> Self:
        """Put the module out of training mode."""
        return self.train(False)

    def parameters(self, recurse: bool = True) -> NoReturn:
        """Refuse: they are elsewhere."""
        raise ValueError(
            "Method ``parameters`` not supported for RemoteModule. Please use "
            "``remote_parameters`` instead."
        )

    # --- going elsewhere -------------------------------------------------------------------------

    def __getstate__(self) -> NoReturn:
        raise RuntimeError(
            "Cannot pickle RemoteModule in python pickler. RemoteModule can only be pickled when "
            "using RPC"
        )

    def _pack(self) -> list[Any]:
        return [getattr(self, name) for name in _REMOTE_MODULE_PICKLED_ATTRIBUTES]

    @staticmethod
    def _unpack(values: Iterable[Any]) -> RemoteModule:
        """Return what arrived: as in torch it has these attributes and the two methods alone."""
        made = RemoteModule.__new__(RemoteModule)
        vars(made).update(zip(_REMOTE_MODULE_PICKLED_ATTRIBUTES, values, strict=True))
        for name in _GENERATED:
            is_async = name == "forward_async"
            vars(made)[name] = _Call(made.module_rref, made.device, is_async=is_async)
        return made

    def __prepare_scriptable__(self) -> Module:
        """Return what `torch.jit.script` makes a script module of: one that calls this one."""
        interface = vars(self).get("_interface")
        if interface is None:
            raise ValueError("a RemoteModule without an interface cannot be compiled")
        signature = inspect.signature(interface.forward)
        future: Any = torch.jit.Future  # at run time, when it is no matter of types
        later = signature.replace(return_annotation=future[signature.return_annotation])
        methods = {
            "forward": _ignored(self.forward, signature),
            "forward_async": _ignored(self.forward_async, later),
        }
        kind: type[_Scriptable] = type(_Scriptable.__name__, (_Scriptable,), methods)
        return kind()


class RemoteModule(_RemoteModule):
    """A module on another worker, called as if it were here.

    ``RemoteModule("worker1/cpu", nn.Linear, (20, 30))`` makes it there.  It travels in arguments
    and results.  Gradients flow through it; a `DistributedOptimizer` takes `remote_parameters`.
    """

    def __init__(
        self,
        remote_device: str,
        module_cls: Callable[..., Module],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Have the module made; what goes wrong with that, its first use raises.

        Args:
            remote_device: ``worker/device`` or ``rank:number/device``; the device is "cpu" by
                default.
            module_cls: makes the module: one of `torch.nn`'s layers, or a class or function that
                the worker has registered or whose module it has allowed.
            args: for `module_cls`.
            kwargs: for `module_cls`.

        Raises:
            RuntimeError: there is no such worker, or `init_rpc` has not been called.
        """
        super().__init__(remote_device, module_cls, args, kwargs)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: _RemoteModule, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"Method ``{name}`` not supported for RemoteModule")

    method.__name__ = name
    return method


for _name in _NOT_SUPPORTED:
    setattr(_RemoteModule, _name, _refusing(_name))


# --- under TorchScript ---------------------------------------------------------------------------


class _Scriptable(Module):
    """What a script module is made of; its other methods TorchScript leaves to Python."""

    @torch.jit.export
    def __getstate__(self) -> None:
        raise RuntimeError("RemoteModule can only be pickled when using RPC")

    @torch.jit.export
    def __setstate__(self, state: None) -> None:
        raise RuntimeError("RemoteModule can only be unpickled when using RPC")


def _ignored(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    def call(self: Module, *args: Any) -> Any:
        return method(*args)

    call.__signature__ = signature  # type: ignore[attr-defined]  # for `inspect`, and so for torch
    ignored: Callable[..., Any] = torch.jit.ignore(call)  # type: ignore[no-untyped-call]
    return ignored


def _refuse(module: torch.jit.ScriptModule) -> NoReturn:
    what = "RemoteModule" if module.original_name == _Scriptable.__name__ else "module"
    raise CannotTravel(f"Passing a script {what} over RPC is not supported.")


def _no_script(packed: object) -> NoReturn:
    raise NotAllowed("script modules do not travel")


# --- what runs where the module is ---------------------------------------------------------------


@state.names.register
def _create_module(
    module_cls: Callable[..., Module], args: tuple[Any, ...], kwargs: dict[str, Any], device: str
) -> Module:
    is_other_class = isinstance(module_cls, type) and not issubclass(module_cls, Module)
    module = None if is_other_class else module_cls(*args, **kwargs)
    if not isinstance(module, Module):
        raise ValueError(
            "Expect `module_cls(*args, **kwargs)` returns an instance of <class nn.Module>, but it "
            f"returns an instance of {module_cls if module is None else type(module)}."
        )
    return module.to(torch.device(device))


@state.names.register
def _forward(
    module_rref: PyRRef[Module], device: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    args, kwargs = tree_map(move, (args, kwargs))
    return module_rref.local_value()(*args, **kwargs)


@state.names.register
def _parameters(module_rref: PyRRef[Module], recurse: bool) -> list[RRef[nn.Parameter]]:
    return [RRef(parameter) for parameter in module_rref.local_value().parameters(recurse)]


@state.names.register
def _train(module_rref: PyRRef[Module], mode: bool) -> None:
    module_rref.local_value().train(mode)


for _class in (_RemoteModule, RemoteModule):
    state.names.register(_class)
state.values.codec(_RemoteModule, pack=_RemoteModule._pack, unpack=_RemoteModule._unpack)
state.values.codec(
    _Call,
    pack=lambda call: [call.module_rref, call.device, call.is_async],
    unpack=lambda packed: _Call(*packed),
)
state.values.codec(torch.jit.ScriptModule, pack=_refuse, unpack=_no_script)
