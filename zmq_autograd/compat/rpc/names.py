"""Functions and classes by name: what this process lets others call, and what it calls things.

A name is ``module:qualified.name``.  It is looked up in closed tables alone: what was registered,
torch's tensor operators, and what the allowed modules define themselves.  Nothing is imported, and
no attribute is looked up by a name that arrived.
"""

from __future__ import annotations

import builtins
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn, optim

from zmq_autograd.compat.rpc import tensor_ops
from zmq_autograd.compat.rpc.errors import CannotTravel, NotAllowed

T = TypeVar("T")

_VALUE_TYPES: Final[tuple[type, ...]] = (
    *(bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, slice, range),
    *(type(None), Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device),
    nn.utils.rnn.PackedSequence,
)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where something was found: `value` is what ``namespace[key]`` was."""

    namespace: Mapping[str, Any]
    key: str
    value: Any
    owner: type | None

    def is_current(self) -> bool:
        """Tell whether it is there still: modules change, tests patch them."""
        return self.namespace.get(self.key) is self.value

    def bound(self) -> Any:
        """Return it as an attribute of its class or module is."""
        if isinstance(self.value, (staticmethod, classmethod)):
            return self.value.__get__(None, self.owner)
        return self.value


class Names:
    """The tables of one process."""

    def __init__(self) -> None:
        """Make tables with torch's operators alone."""
        self._registered: dict[str, Any] = {}
        self._allowed: dict[str, dict[str, _Place]] = {}

    # --- what may be called ----------------------------------------------------------------------

    def allow_module(self, module: str) -> None:
        """Let others call what the module `module` defines: functions, classes and their methods.

        What it only imports stays out.  The module may be imported later; nothing imports it here.

        Raises:
            ValueError: it is no module's name, or one of Python's or torch's own.
        """
        if not isinstance(module, str) or not all(map(str.isidentifier, module.split("."))):
            raise ValueError(f"allow_module: expected the name of a module, got {module!r}")
        if _is_others(module):
            raise ValueError(
                f"allow_module: {module!r} is not the program's own: register single functions"
            )
        self._allow(module)

    def _allow(self, module: str) -> None:
        """Allow a module, whosever it is: torch's own tests are in modules of torch's."""
        self._allowed.setdefault(program_module(module), {})

    def register(self, target: T) -> T:
        """Let others call one function or class, and a class's own methods; also a decorator.

        Raises:
            ValueError: it has no name of its own: a lambda, or defined inside a function.
        """
        try:
            name = self.name_of(target)
        except CannotTravel as error:
            raise ValueError(f"register: {error}") from error
        self._registered[name] = target
        if isinstance(target, type):
            module = program_module(target.__module__)
            for key, place in _walk(vars(target), module, f"{target.__qualname__}.", target):
                self._registered[f"{module}:{key}"] = place.bound()
        return target

    def find(self, name: str) -> Any:
        """Return the function or class of that name.

        Raises:
            NotAllowed: nothing of that name may be called here.
        """
        for table in (self._registered, tensor_ops.operators()):
            if name in table:
                return table[name]
        place = self._find_allowed(name)
        if place is not None:
            return place.bound()
        if name.startswith("torch.ops.aten:") and name in tensor_ops.aten_operators():
            return tensor_ops.aten_operators()[name]
        raise NotAllowed(
            f"no function {name!r} may be called here: {_remedy(name.partition(':')[0])}; as "
            "torch's default RPC pickler does not serialize function code, a name does not carry "
            "it either, so it must be defined on both caller and callee"
        )

    def _find_allowed(self, name: str) -> _Place | None:
        module, _, key = name.partition(":")
        if module not in self._allowed:
            return None
        place = self._allowed[module].get(key)
        if place is None or not place.is_current():
            loaded = sys.modules.get(module)
            members = {} if loaded is None else vars(loaded)
            self._allowed[module] = dict(_walk(members, module, "", None))
            place = self._allowed[module].get(key)
        return place

    def find_class(self, name: str) -> type:
        """Return the class of that name, as a value: one that may be called, or a plain type.

        Raises:
            NotAllowed: there is none.
        """
        found = _plain_types().get(name)
        if found is None:
            found = self.find(name)
        if not isinstance(found, type):
            raise NotAllowed(f"{name!r} is no class")
        return found

    def find_exception(self, name: str) -> type[Exception] | None:
        """Return the exception class of that name, None where it is unknown here."""
        module, _, key = name.partition(":")
        found = vars(builtins).get(key) if module == "builtins" else None
        if found is None:
            try:
                found = self.find(name)
            except NotAllowed:
                return None
        if not isinstance(found, type) or not issubclass(found, Exception):
            return None
        return None if issubclass(found, (StopIteration, StopAsyncIteration)) else found

    # --- methods of a value ----------------------------------------------------------------------

    def method_of(self, value: Any, name: str) -> Callable[..., Any]:
        """Return a method of `value` that may be called.

        Raises:
            AttributeError: its class has none of that name.
            NotAllowed: it may not be called.
        """
        kind = type(value)
        for klass in kind.__mro__:
            if name in vars(klass):
                member = vars(klass)[name]
                if not self._may_call(klass, name, member):
                    break
                return member.__get__(value, kind)  # type: ignore[no-any-return]
        else:
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        raise NotAllowed(
            f"method {name!r} of {klass.__module__}.{klass.__qualname__} may not be called here: "
            f"{_remedy(klass.__module__)}"
        )

    def _may_call(self, klass: type, name: str, member: Any) -> bool:
        if klass in (Tensor, torch._C.TensorBase):
            return name in tensor_ops.tensor_methods()
        if klass is nn.Module or klass.__module__.startswith("torch.nn.modules."):
            return name in tensor_ops.layer_methods()
        module = program_module(klass.__module__)
        is_ours = module in self._allowed or (
            self._registered.get(f"{module}:{klass.__qualname__}") is klass
        )
        return is_ours and isinstance(member, (FunctionType, staticmethod, classmethod))

    # --- names for what is here ------------------------------------------------------------------

    def name_of(self, target: Any) -> str:
        """Return the name of a function or class.

        Raises:
            CannotTravel: it has none that another process could know.
        """
        name = tensor_ops.names().get(id(target)) or tensor_ops.aten_name(target)
        if name is not None:
            return name
        if isinstance(target, torch.jit.ScriptFunction):
            module, _, key = target.qualified_name.removeprefix("__torch__.").rpartition(".")
            return _checked(module or "__main__", key)
        if isinstance(target, MethodType) and isinstance(target.__self__, type):
            owner = target.__self__
            return _checked(owner.__module__, f"{owner.__qualname__}.{target.__name__}")
        if isinstance(target, (BuiltinFunctionType, MethodDescriptorType)):
            raise CannotTravel(
                f"{target.__qualname__} cannot be called on another worker: of Python's and "
                "torch's built-in functions only torch's tensor operators and a few more can; call "
                "it in your own function, and that from elsewhere"
            )
        if isinstance(target, (FunctionType, type)):
            return _checked(target.__module__, target.__qualname__)
        raise CannotTravel(
            f"a {type(target).__module__}.{type(target).__qualname__} cannot be called on another "
            "worker: pass a function or a class by its name; objects stay with their owner, see "
            "RRef"
        )


def program_module(name: str) -> str:
    """Return the name of a module, the same in all processes of a program.

    In those that `multiprocessing` spawns the script is ``__mp_main__``, and ``__main__``, too.
    """
    return "__main__" if name == "__mp_main__" else name


def _is_others(module: str) -> bool:
    """Say whether a module is one of Python's or torch's own, of which only some may be called."""
    return module.partition(".")[0] in sys.stdlib_module_names - {"__main__"} | {"torch"}


def _remedy(module: str) -> str:
    if _is_others(module):
        return "call it in your own function, and that from elsewhere"
    return "have this process register it (rpc.register) or allow its module (rpc.allow_module)"


def _checked(module: str | None, qualname: str) -> str:
    if not module or "<" in qualname:
        raise CannotTravel(
            f"{qualname!r} cannot be called on another worker: it has no name there; define it at "
            "the top level of a module"
        )
    return f"{program_module(module)}:{qualname}"


def _walk(
    members: Mapping[str, Any], module: str, prefix: str, owner: type | None
) -> Iterator[tuple[str, _Place]]:
    """Yield what a module, or a class in it, defines itself, by qualified name."""
    for key, value in list(members.items()):
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if _is_defined_in(module, key, function):
            yield prefix + key, _Place(members, key, value, owner)
        elif isinstance(value, type) and program_module(value.__module__) == module:
            yield prefix + key, _Place(members, key, value, owner)
            if value.__qualname__ == prefix + key:  # not an alias, which could lead in circles
                yield from _walk(vars(value), module, f"{prefix}{key}.", value)


def _is_defined_in(module: str, key: str, function: Any) -> bool:
    if isinstance(function, torch.jit.ScriptFunction):
        return function.qualified_name.removeprefix("__torch__.") in (f"{module}.{key}", key)
    if not isinstance(function, FunctionType):
        return False
    return program_module(function.__module__ or "") == module


@functools.cache
def _plain_types() -> dict[str, type]:
    optimizers = [
        kind
        for kind in vars(optim).values()
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
    ]
    return {f"{kind.__module__}:{kind.__qualname__}": kind for kind in (*_VALUE_TYPES, *optimizers)}
