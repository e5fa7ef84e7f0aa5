"""Makes a class without ``async`` of one with: what `zmq_autograd.blocking` consists of.

An object of such a class stands for an async object on its event loop, reached by a portal.
Coroutine methods block, plain ones run in the loop's thread, async context managers are plain ones;
what is returned is wrapped likewise, and what is passed is unwrapped.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, ClassVar, Final, NoReturn, Self, SupportsIndex

from zmq_autograd.blocking.portal import Portal, current_portal
from zmq_autograd.node.registry import is_async

GENERATED: Final = frozenset({"__init__", "__call__"})
"""Private names that are generated, besides all public ones."""


class Surface:
    """Base of the generated classes; ``class RRef(Surface, of=AsyncRRef)`` is all that one takes.

    Two objects are equal if they stand for the same one.
    """

    _classes: ClassVar[dict[type, type[Surface]]] = {}
    _async_class: ClassVar[type]
    # Names that a class or its bases define themselves, and that are not generated.
    _written: ClassVar[frozenset[str]] = frozenset({"__init__"})

    _object: Any
    _portal: Portal

    def __init_subclass__(cls, *, of: type | None = None) -> None:
        super().__init_subclass__()
        cls._written = cls._written | vars(cls).keys()
        if of is None:
            return
        Surface._classes[of] = cls
        cls._async_class = of
        cls.__doc__ = _text(of.__doc__)
        for name, member in _members(of).items():
            if name not in cls._written:
                setattr(cls, name, _generated(name, member, of))
            elif name in vars(cls):
                described(getattr(cls, name), getattr(of, name))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._portal = current_portal()
        self._object = self._async_class(*unwrapped(args), **unwrapped(kwargs))

    @classmethod
    def _standing_for(cls, target: Any, portal: Portal) -> Self:
        """Return an object that stands for `target`, which lives on the loop of `portal`."""
        made = cls.__new__(cls)
        made._portal, made._object = portal, target
        return made

    def __getattr__(self, name: str) -> Any:
        # Attributes that the class does not know, since its `__init__` sets them.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What `__getattr__` finds there is set there.  Not so a method, which schedulers replace:
        # that of the object has to stay one that is awaited.
        target = vars(self).get("_object")
        if not name.startswith("_") and name in getattr(target, "__dict__", ()):
            setattr(target, name, unwrapped(value))
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        own = getattr(self._object, "__dict__", {})
        return sorted({*super().__dir__(), *(name for name in own if not name.startswith("_"))})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surface) and self._object is other._object

    def __hash__(self) -> int:
        return hash(self._object)

    def __repr__(self) -> str:
        return repr(self._object)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self._object.__reduce_ex__(protocol)  # an RRef says what to do instead
        raise TypeError(
            f"a blocking {type(self).__name__} cannot be copied or pickled: what it stands for "
            "lives on an event loop of this process"
        )

    def _wait_for(self, function: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """Run a coroutine function of the object, and return what it returns, wrapped."""
        result = self._portal.run(function, *unwrapped(args), **unwrapped(kwargs))
        return self._seen(result)

    def _have_called(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a plain function of the object, and return what it returns, wrapped."""
        return self._seen(self._portal.call(function, *unwrapped(args), **unwrapped(kwargs)))

    def _seen(self, result: Any) -> Any:
        return self if result is self._object else wrapped(result, self._portal)


class Entered(Surface):
    """Base of those that stand for an async context manager: ``with`` enters it."""

    _opened_in: int | None = None  # the process

    def __enter__(self) -> Self:
        entered: Self = self._wait_for(self._object.__aenter__)
        # As by an exception: at the end of the program nobody is waited for.
        self._opened(lambda: self._object.__aexit__(SystemExit, None, None))
        return entered

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if self._is_forked:
            return None
        # If this is interrupted, it stays open until the portal closes.
        suppressed: bool | None = self._portal.run(self._object.__aexit__, exc_type, exc, traceback)
        self._portal.let_go(self._object)
        return suppressed

    def _opened(self, close: Callable[[], Awaitable[Any]]) -> None:
        """Take in that it is open now, and has to be closed at the end."""
        self._opened_in = os.getpid()
        self._portal.keep(self._object, close)

    @property
    def _is_forked(self) -> bool:
        """Whether this is a forked child of the process that opened it: it is not open here."""
        return self._opened_in not in (None, os.getpid())


def wrapped(value: Any, portal: Portal) -> Any:
    """Return `value` with blocking objects for the async ones in it, which live on that loop.

    Looks into lists, tuples and dicts; coroutine functions become plain ones.
    """
    return _mapped(value, lambda leaf: _wrapped_one(leaf, portal))


def unwrapped(value: Any) -> Any:
    """Return `value` with async objects for the blocking ones in it; undoes `wrapped`."""
    return _mapped(value, lambda value: value._object if isinstance(value, Surface) else value)


def without_async(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` without ``async``: it takes and returns blocking objects."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        portal = current_portal()
        args, kwargs = unwrapped(args), unwrapped(kwargs)
        if inspect.iscoroutinefunction(function):
            return wrapped(portal.run(function, *args, **kwargs), portal)
        return wrapped(function(*args, **kwargs), portal)

    call.__doc__ = _text(function.__doc__)
    return call


def in_threads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which knows blocking objects, as its caller, who knows async ones, has it.

    It is called in compute threads.  A coroutine function is returned as it is.
    """
    if is_async(function):
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        portal = current_portal()
        return unwrapped(function(*wrapped(args, portal), **wrapped(kwargs, portal)))

    return call


def _wrapped_one(value: Any, portal: Portal) -> Any:
    for kind in type(value).__mro__:
        if kind in Surface._classes:
            return Surface._classes[kind]._standing_for(value, portal)
    if inspect.iscoroutinefunction(value):
        return _waiting(value, portal)
    if isinstance(value, AbstractAsyncContextManager):
        return Entered._standing_for(value, portal)
    return value


def _attribute(surface: Surface, name: str) -> Any:
    # A list or dict stays the one that the object has: a scheduler writes to an optimizer's.
    return _wrapped_one(getattr(surface._object, name), surface._portal)


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return `value` with its leaves replaced; what has none that changes is left as it is."""
    kind = type(value)
    if kind is list or kind is tuple:
        items = [_mapped(item, leaf) for item in value]
        is_same = all(new is old for new, old in zip(items, value, strict=True))
        return value if is_same else kind(items)
    if kind is dict:
        entries = {key: _mapped(item, leaf) for key, item in value.items()}
        return value if all(new is value[key] for key, new in entries.items()) else entries
    return leaf(value)


# --- generating --------------------------------------------------------------------------------


def _members(of: type) -> dict[str, Any]:
    """Return what a class defines or inherits, by name."""
    kinds = reversed(of.__mro__)
    found = {name: member for kind in kinds for name, member in vars(kind).items()}
    return {
        name: member
        for name, member in found.items()
        if not name.startswith("_") or name in GENERATED
    }


def _generated(name: str, member: Any, of: type) -> Any:
    if isinstance(member, (classmethod, staticmethod)):
        return staticmethod(without_async(getattr(of, name)))
    if inspect.isfunction(member):
        return _method(name, member)
    if inspect.isdatadescriptor(member):
        return _property(name, member)
    return member


def _method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        def method(self: Surface, *args: Any, **kwargs: Any) -> Any:
            return self._wait_for(getattr(self._object, name), *args, **kwargs)
    else:

        def method(self: Surface, *args: Any, **kwargs: Any) -> Any:
            return self._have_called(getattr(self._object, name), *args, **kwargs)

    described(method, function)
    return method


def _property(name: str, member: Any) -> property:
    return property(lambda surface: _attribute(surface, name), doc=_text(member.__doc__))


def _waiting(function: Callable[..., Awaitable[Any]], portal: Portal) -> Callable[..., Any]:
    """Return a coroutine function that was returned, as a plain one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapped(portal.run(function, *unwrapped(args), **unwrapped(kwargs)), portal)

    return call


def described(function: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Give `function` the name, signature and text of what it stands for."""
    functools.update_wrapper(function, original)
    function.__doc__ = _text(original.__doc__)


def _text(doc: str | None) -> str | None:
    """Return a docstring of something async as one of the same without."""
    if doc is None:
        return None
    for old, new in (("async with", "with"), ("await ", ""), ("Cancelling it", "Interrupting it")):
        doc = doc.replace(old, new)
    return doc
