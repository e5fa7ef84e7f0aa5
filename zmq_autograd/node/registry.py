"""What a worker offers by name: a closed table of callables, filled by its owner alone.

Everything a name can reach is put here when it is registered, methods included, so that no
attribute is ever looked up by a name that arrived.  A name that is missing and a name that is not
for this peer give the same answer.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from torch.nn import Module

from zmq_autograd.errors import ConfigurationError, NotRegistered
from zmq_autograd.node.compute import ComputePool
from zmq_autograd.node.current import reading
from zmq_autograd.node.modules import ExposedModule

RESERVED_PREFIX: Final = "za."
"""Names that the library itself registers."""

Expose = Collection[str] | Literal["module"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One callable.

    Attributes:
        function: what runs.
        turns: lets so many run at once; None where all may.
        allow: names of the workers that may call it, None for all that are connected.
        idempotent: running it twice does no harm: it may be retried.
        reads: it may read parameters, and so waits for an optimizer's step that runs.
    """

    function: Callable[..., Any]
    turns: Turns | None = None
    allow: frozenset[str] | None = None
    idempotent: bool = False
    reads: bool = True

    def is_for(self, peer: str) -> bool:
        """Tell whether the worker of that name may call it."""
        return self.allow is None or peer in self.allow

    async def call(self, args: Iterable[Any], kwargs: dict[str, Any], pool: ComputePool) -> Any:
        """Run it: a coroutine function on the loop, any other in a compute thread.

        Cancelling it cancels a coroutine; a thread finishes, and keeps its turn until then.
        """
        call = functools.partial(self.function, *args, **kwargs)
        if self.turns is not None:
            return await self._in_turn(call, pool, self.turns.here())
        async with self._reading():
            if is_async(self.function):
                return await call()
            return await _handed_on(await pool.run(call))

    def _reading(self) -> AbstractAsyncContextManager[None]:
        return reading() if self.reads else nullcontext()

    async def _in_turn(
        self, call: Callable[[], Any], pool: ComputePool, turns: asyncio.Semaphore
    ) -> Any:
        """Run `call` in its turn, which ends no sooner than the caller goes on with the result.

        So a reply that shows what the next turn changes is read before that starts.
        """
        await turns.acquire()
        running: asyncio.Future[Any] | None = None
        try:
            async with self._reading():
                if is_async(self.function):
                    return await call()
                running = pool.start(call)
                return await _handed_on(await asyncio.shield(running))
        finally:
            if running is None or running.done():
                turns.release()
            else:
                running.add_done_callback(functools.partial(_end_turn, turns))
            del running  # an error that it ended with holds this frame, which must not hold it


def _end_turn(turns: asyncio.Semaphore, running: asyncio.Future[Any]) -> None:
    """Let the next one have its turn, after a call that nobody awaited to its end."""
    turns.release()
    if not running.cancelled():
        running.exception()  # heard: its caller was told another one, of its timeout say


class Turns:
    """Lets so many calls run at once, in whichever loop their worker lives now."""

    def __init__(self, slots: int) -> None:
        """Let `slots` calls run at once."""
        self._slots = slots
        self._loop: asyncio.AbstractEventLoop | None = None
        self._semaphore = asyncio.Semaphore(slots)

    def here(self) -> asyncio.Semaphore:
        """Return what the running loop's calls take their turns at."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._semaphore = loop, asyncio.Semaphore(self._slots)
        return self._semaphore


@dataclass(frozen=True, slots=True)
class Offer:
    """What a registered class offers of its instances.

    Attributes:
        expose: names of their methods, or ``"module"``.
        concurrency: how many methods of one instance may run at once.
        allow: as in `Entry`.
        idempotent: as in `Entry`.
    """

    expose: Expose
    concurrency: int
    allow: frozenset[str] | None
    idempotent: bool


class Instance(Protocol):
    """A value that is kept for others.

    Attributes:
        value: it.
        turns: lets its methods run in turn; None before one is asked for.
        methods: those that its class offers, by name; None likewise.
    """

    value: Any
    turns: Turns | None
    methods: dict[str, Entry] | None


class Registry:
    """The table of one worker."""

    def __init__(self, worker: str) -> None:
        """Make an empty table for the worker named `worker`."""
        self.worker = worker
        # How its plain functions are called: as they are, unless they know blocking objects.
        self.adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
        self._entries: dict[str, Entry] = {}
        self._offers: dict[type, Offer] = {}
        self._classes: dict[str, type] = {}

    def find(self, name: str, peer: str) -> Entry:
        """Return what `peer` may call by `name`.

        Raises:
            NotRegistered: nothing of that name, or not for this peer.
        """
        entry = self._entries.get(name)
        if entry is None or not entry.is_for(peer):
            raise NotRegistered(
                f"nothing is registered as {name[:200]!r} for worker {peer!r}",
                type_name=NotRegistered.__name__,
                worker=self.worker,
            )
        return entry

    def find_class(self, name: str, peer: str) -> type | None:
        """Return the class that `peer` may make instances of by `name`, None if it is no class.

        Raises:
            NotRegistered: nothing of that name, or not for this peer.
        """
        self.find(name, peer)
        return self._classes.get(name)

    def method(self, instance: Instance, name: str, peer: str | None) -> Entry:
        """Return the method of a kept value that may be called by `name`.

        Args:
            instance: the value.
            name: of the method.
            peer: who calls, None for this worker itself.

        Raises:
            NotRegistered: its class is not registered, offers nothing of that name, or not to it.
        """
        kind = type(instance.value)
        if instance.methods is None:
            offer = next((self._offers[k] for k in kind.__mro__ if k in self._offers), None)
            if offer is not None:
                self._offer(instance, offer)
        entry = None if instance.methods is None else instance.methods.get(name)
        if entry is not None and (peer is None or entry.is_for(peer)):
            return entry
        raise NotRegistered(
            f"no method {name[:200]!r} of a {kind.__qualname__} is exposed to worker "
            f"{peer or self.worker!r}",
            type_name=NotRegistered.__name__,
            worker=self.worker,
        )

    def _offer(self, instance: Instance, offer: Offer) -> None:
        # Once: what a module keeps for its peers is bounded for all of its methods together.
        instance.turns = turns = Turns(offer.concurrency)
        instance.methods = {
            key.removeprefix("."): Entry(self.adapt(method), turns, offer.allow, offer.idempotent)
            for key, method in _methods(instance.value, "", offer.expose).items()
        }

    def register(
        self,
        target: Any,
        name: str | None = None,
        *,
        expose: Expose = (),
        allow: Collection[str] | None = None,
        concurrency: int | None = None,
        idempotent: bool = False,
        internal: bool = False,
    ) -> None:
        """Offer `target`, and those of its methods that are named.

        Args:
            target: a function, a class, a module or any other object.
            name: what peers call it; by default a function's or class's own name.
            expose: names of methods that peers may call, as ``name.method``; or ``"module"``
                for all that a remote module needs.
            allow: names of the workers that may call it; None for all that are connected.
            concurrency: how many may run at once; by default all of a function's calls, one of
                an object's.
            idempotent: running it twice does no harm: it may be retried.
            internal: the library itself registers it, under a reserved name.

        Raises:
            ConfigurationError: the name is missing, malformed or taken, or a method is not there.
        """
        name = _checked_name(target, name, internal=internal)
        if concurrency is not None and (type(concurrency) is not int or concurrency < 1):
            raise ConfigurationError(f"concurrency: expected an int above 0, got {concurrency!r}")
        if isinstance(allow, str):
            raise ConfigurationError(f"allow: expected a collection of names, got {allow!r}")
        is_function = inspect.isroutine(target) or isinstance(target, functools.partial)
        slots = concurrency or (None if is_function or inspect.isclass(target) else 1)
        turns = None if slots is None else Turns(slots)
        functions = _methods(target, name, expose)
        if callable(target):
            functions[name] = target
        for taken in functions.keys() & self._entries.keys():
            raise ConfigurationError(f"worker {self.worker!r} has registered {taken!r} already")
        if not functions:
            raise ConfigurationError(
                f"{name!r} is not callable and exposes no method: there is nothing to offer"
            )
        allowed = None if allow is None else frozenset(allow)
        for key, function in functions.items():
            adapted = function if internal else self.adapt(function)
            self._entries[key] = Entry(adapted, turns, allowed, idempotent, reads=not internal)
        if inspect.isclass(target):
            exposed = expose if isinstance(expose, str) else frozenset(expose)
            self._offers[target] = Offer(exposed, concurrency or 1, allowed, idempotent)
            self._classes[name] = target


def is_async(function: Callable[..., Any]) -> bool:
    """Say whether calling `function` makes a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or (
        not inspect.isclass(function)
        and not inspect.isroutine(function)
        and inspect.iscoroutinefunction(type(function).__call__)
    )


async def _handed_on(result: Any) -> Any:
    """Return `result`, or what it is awaited for: a plain function may hand on a call it made.

    ``lambda x: bob.call("stage", x)``, say.
    """
    return await result if inspect.isawaitable(result) else result


def _checked_name(target: Any, name: str | None, *, internal: bool) -> str:
    if name is None:
        name = getattr(target, "__name__", None)
        if name is None or name == "<lambda>":
            raise ConfigurationError(f"{type(target).__name__} has no name: register it with name=")
    if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable():
        raise ConfigurationError(f"name: expected up to 200 printable characters, got {name!r}")
    if name.startswith(RESERVED_PREFIX) and not internal:
        raise ConfigurationError(f"name {name!r}: names that begin with 'za.' are reserved")
    return name


def _methods(target: Any, name: str, expose: Expose) -> dict[str, Callable[..., Any]]:
    if expose == "module":
        if inspect.isclass(target) and issubclass(target, Module):
            return {}
        if not isinstance(target, Module):
            raise ConfigurationError(
                f"expose='module': expected an nn.Module, got {type(target).__name__}"
            )
        return {f"{name}.{key}": method for key, method in ExposedModule(target).methods().items()}
    if isinstance(expose, str):
        raise ConfigurationError(f"expose: expected names of methods or 'module', got {expose!r}")
    methods: dict[str, Callable[..., Any]] = {}
    for key in expose:
        method = getattr(target, key, None) if isinstance(key, str) else None
        if not callable(method):
            raise ConfigurationError(f"expose: {name!r} has no method {key!r}")
        methods[f"{name}.{key}"] = method
    # A class has no methods to call, only its instances have.
    return {} if inspect.isclass(target) else methods
