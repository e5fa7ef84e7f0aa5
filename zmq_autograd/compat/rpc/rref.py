"""RRefs as torch's programs hold them: made at once, whatever becomes of the call that fills them.

Knows the agent, which reaches the owner; who counts which holder is `zmq_autograd`'s own RRefs',
one of which each of these stands on once it is there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.futures import Future

from zmq_autograd import rref as za
from zmq_autograd.compat.rpc import state
from zmq_autograd.compat.rpc.constants import UNSET_RPC_TIMEOUT
from zmq_autograd.compat.rpc.errors import RpcTimeout, timed_out
from zmq_autograd.compat.rpc.functions import async_execution, is_async_execution, value_of
from zmq_autograd.compat.rpc.worker_info import WorkerInfo

if TYPE_CHECKING:
    from zmq_autograd.compat.rpc.agent import Agent, Asked

T = TypeVar("T")

_NO_CONTEXT = -1


class PyRRef(Generic[T]):
    """A reference to a value on its owner, a worker; it travels in arguments and results."""

    def __init__(self, value: T, type_hint: Any = None) -> None:
        """Refer to a value of this worker's own.

        Args:
            value: any object.
            type_hint: ignored; TorchScript asks for it in torch.

        Raises:
            RuntimeError: `init_rpc` has not been called.
        """
        agent = state.agent()
        self._begin(agent, agent.me, (agent.me.id, agent.next_local_id()))
        self._value: Any = value
        self._is_local = True

    def _begin(self, agent: Agent, owner: WorkerInfo, rref_id: tuple[int, int]) -> None:
        self._agent = agent
        self._owner = owner
        self._rref_id = rref_id
        self._fork_id = (agent.me.id, agent.next_local_id()) if owner != agent.me else None
        self._value = None
        self._is_local = False
        self._is_deleted = False
        self._held: concurrent.futures.Future[za.RRef] | None = None
        self._kept: concurrent.futures.Future[za.RRef] | None = None
        self._shared: weakref.ref[za.RRef] | None = None
        self._type: Future[type] | None = None

    @classmethod
    def _made(
        cls,
        agent: Agent,
        owner: WorkerInfo,
        held: concurrent.futures.Future[za.RRef],
        made: concurrent.futures.Future[za.RRef],
    ) -> PyRRef[T]:
        """Return the RRef to what a call makes: `made`, and `held` for those that wait for it."""
        rref = cls.__new__(cls)
        rref._begin(agent, owner, (agent.me.id, agent.next_local_id()))
        rref._held, rref._kept = held, made
        agent.hold(rref)
        return rref

    @classmethod
    def _received(
        cls, agent: Agent, held: za.RRef, owner: WorkerInfo, rref_id: tuple[int, int]
    ) -> PyRRef[T]:
        """Return the RRef that arrived in a message."""
        rref = cls.__new__(cls)
        rref._begin(agent, owner, rref_id)
        rref._held = concurrent.futures.Future()
        rref._held.set_result(held)
        agent.hold(rref)
        return rref

    # --- whose it is -----------------------------------------------------------------------------

    def owner(self) -> WorkerInfo:
        """Return who has the value."""
        return self._owner

    def owner_name(self) -> str:
        """Return the name of the worker that has the value."""
        return self._owner.name

    def is_owner(self) -> bool:
        """Say whether the value is on this worker."""
        return self._owner == self._agent.me

    def confirmed_by_owner(self) -> bool:
        """Say whether the owner is known to count this reference."""
        if self._held is None:
            return self._is_local
        return self._held.done() and self._held.exception() is None

    def __str__(self) -> str:
        if self._fork_id is None:
            return f"OwnerRRef({_global_id(self._rref_id)})"
        return (
            f"UserRRef(RRefId = {_global_id(self._rref_id)}, ForkId = {_global_id(self._fork_id)})"
        )

    __repr__ = __str__

    def __reduce__(self) -> NoReturn:
        raise RuntimeError(
            "Can not pickle rref in python pickler, rref can only be pickled when using RPC"
        )

    # --- its value -------------------------------------------------------------------------------

    def local_value(self) -> T:
        """Return the value itself, waiting until it is there.

        Raises:
            RuntimeError: this worker is not the owner.
            Exception: what the call raised that was to make it.
        """
        if not self.is_owner():
            fork_id = self._fork_id or self._rref_id
            raise RuntimeError(
                f"For UserRRef(rref_id={_global_id(self._rref_id)}, "
                f"fork_id={_global_id(fork_id)}), can't call localValue() on user "
                f"{self._agent.me}. Call it on owner {self._owner}"
            )
        value: T = self._value if self._is_local else self._taken(None).local_value()
        return value

    def to_here(self, timeout: float = UNSET_RPC_TIMEOUT) -> T:
        """Return a copy of the value; on its owner the value itself.

        Args:
            timeout: seconds, 0 for no limit; by default the one that `init_rpc` was told.

        Raises:
            RuntimeError: the RRef was deleted or its creation timed out, the owner is lost, the
                value cannot travel, or time ran out.
            Exception: what the call raised that was to make it.
        """
        if self.is_owner():
            return self.local_value()
        self._check_not_deleted("call to_here() on it")
        seconds = self._agent.seconds(timeout)
        began = time.monotonic()
        self._taken(seconds)
        left = 0.0 if seconds is None else seconds - (time.monotonic() - began)
        if left <= 0 and seconds is not None:
            raise timed_out(seconds)
        value: T = self._agent.call(self._asked(_fetch, timeout=left))
        return value

    def _taken(self, seconds: float | None) -> za.RRef:
        """Wait for what it stands on."""
        held = self._held
        if held is None:
            self._check_not_deleted("use it")
            raise RuntimeError(f"{self} stands on nothing")
        concurrent.futures.wait([held], seconds)
        if not held.done():
            raise timed_out(seconds)
        if isinstance(held.exception(), RpcTimeout):
            raise RuntimeError(
                f"RRef creation via rpc.remote() to {self._owner.name} timed out, and it is "
                "possible that the RRef on the owner node does not exist"
            ) from held.exception()
        return held.result()

    def _check_not_deleted(self, use: str) -> None:
        if self._is_deleted:
            raise RuntimeError(f"{self} has been deleted. Cannot {use} after deletion.")

    def _delete(self) -> None:
        """Let go of the value, whoever still has this object."""
        self._is_deleted = True
        self._held = self._kept = None

    # --- travelling ------------------------------------------------------------------------------

    def _pack_rref(self) -> list[Any]:
        """Return what travels beside the reference itself."""
        if self._is_deleted:
            raise RuntimeError(
                f"{self} has been deleted. Cannot call fork an UserRRef after deletion."
            )
        return [self._owner.name, self._owner.id, *self._rref_id]

    async def _fork(self) -> za.RRef:
        """Return what travels itself, once it is there; on the agent's event loop."""
        if self._held is not None:
            # Not awaited if it is there: what is sent has been read when a call first suspends.
            return self._held.result() if self._held.done() else await _done(self._held)
        shared = self._shared() if self._shared is not None else None
        if shared is None:
            # Whoever gets it keeps the value; this object must not, or nobody could let go.
            shared = self._agent.worker.rref(self._value)
            self._shared = weakref.ref(shared)
        return shared

    # --- calling its methods ---------------------------------------------------------------------

    def rpc_sync(self, timeout: float = UNSET_RPC_TIMEOUT) -> RRefProxy:
        """Return a proxy: ``rref.rpc_sync().method(...)`` calls it there, and waits."""
        return RRefProxy(self, "sync", timeout)

    def rpc_async(self, timeout: float = UNSET_RPC_TIMEOUT) -> RRefProxy:
        """Return a proxy: ``rref.rpc_async().method(...)`` returns a `torch.futures.Future`."""
        return RRefProxy(self, "async", timeout)

    def remote(self, timeout: float = UNSET_RPC_TIMEOUT) -> RRefProxy:
        """Return a proxy: ``rref.remote().method(...)`` returns an RRef to the result."""
        return RRefProxy(self, "remote", timeout)

    def _get_type(self, timeout: float = UNSET_RPC_TIMEOUT, blocking: bool = True) -> Any:
        """Return the type of the value, or a future of it; asked for once."""
        if self._type is None:
            if self.is_owner():
                self._type = Future()
                self._type.set_result(type(self.local_value()))
            else:
                asked = self._asked(_rref_typeof_on_owner, timeout=timeout)
                self._type = self._agent.call_async(asked)
                self._type.add_done_callback(self._forget_failed_type)
        return self._type.wait() if blocking else self._type

    def _asked(
        self, function: Callable[..., Any], *args: Any, timeout: float = UNSET_RPC_TIMEOUT
    ) -> Asked:
        """Return the call, on the owner, of a function of this module."""
        return self._agent.asked(self._owner, function, (self, *args), timeout=timeout)

    def _forget_failed_type(self, kind: Future[type]) -> None:
        try:
            kind.wait()
        except Exception:  # noqa: BLE001  # who asked hears it; the next one asks again
            self._type = None

    def _is_pending(self) -> bool:
        """Say whether the call that makes the value has neither ended nor been given up."""
        return self._held is not None and not self._held.done()

    def _get_future(self) -> Future[Any]:
        """Return the future of the call that makes the value."""
        if self._held is None:
            made: Future[Any] = Future()
            made.set_result(None)
            return made
        return self._agent.future_of(_done, self._held)

    def _get_profiling_future(self) -> Future[Any]:
        """Return the future of the event that a profiler records of the call."""
        return self._get_future()

    # --- differentiating -------------------------------------------------------------------------

    def backward(self, dist_autograd_ctx_id: int = _NO_CONTEXT, retain_graph: bool = False) -> None:
        """Run a backward pass from the value, a tensor of one element, on its owner.

        Args:
            dist_autograd_ctx_id: the context; on the owner none is a plain local backward.
            retain_graph: keep the graph for another pass.

        Raises:
            RuntimeError: the value is no such tensor, there is no such context, or the pass failed.
        """
        if self.is_owner():
            _rref_backward(self, dist_autograd_ctx_id, retain_graph)
        elif dist_autograd_ctx_id == _NO_CONTEXT:
            raise RuntimeError("User RRefs require 'dist_autograd_ctx_id' to be specified")
        else:
            self._agent.call(self._asked(_rref_backward, dist_autograd_ctx_id, retain_graph))


class RRef(PyRRef[T]):
    """A reference to a value on its owner, a worker; ``RRef(value)`` refers to one of its own."""


class RRefProxy:
    """Calls methods of an RRef's value where it is."""

    def __init__(self, rref: PyRRef[Any], mode: str, timeout: float) -> None:
        """Call methods of `rref`'s value: ``"sync"``, ``"async"`` or ``"remote"``."""
        self._rref = rref
        self._mode = mode
        self._timeout = timeout

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            return self._invoke(name, args, kwargs)

        return method

    def __enter__(self) -> Any:
        return self._invoke("__enter__", (), {})

    def __exit__(self, *exception: Any) -> Any:
        return self._invoke("__exit__", exception, {})

    def _invoke(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rref, agent = self._rref, self._rref._agent
        if self._mode == "async":
            kind = rref._get_type(self._timeout, blocking=False)
            return agent.future_of(self._invoke_later, kind, name, args, kwargs)
        call = agent.call if self._mode == "sync" else agent.call_remote
        return call(self._asked(rref._get_type(self._timeout), name, args, kwargs))

    async def _invoke_later(
        self, kind: Future[type], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Wait for the type without holding up whoever called."""
        asked = self._asked(await value_of(kind), name, args, kwargs)
        return await self._rref._agent.exchange(asked)

    def _asked(self, kind: type, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Asked:
        """Return the call of a method of a value of type `kind`.

        Raises:
            AttributeError: the type has no such method.
        """
        is_async = is_async_execution(getattr(kind, name))
        invoke = _local_invoke_async if is_async else _local_invoke
        return self._rref._asked(invoke, name, args, kwargs, timeout=self._timeout)


# --- what runs on the owner ----------------------------------------------------------------------


def _fetch(rref: PyRRef[Any]) -> Any:
    return rref.local_value()


def _rref_typeof_on_owner(rref: PyRRef[Any]) -> type:
    return type(rref.local_value())


def _local_invoke(
    rref: PyRRef[Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return state.names.method_of(rref.local_value(), name)(*args, **kwargs)


@async_execution
def _local_invoke_async(
    rref: PyRRef[Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return state.names.method_of(rref.local_value(), name)(*args, **kwargs)


def _rref_backward(rref: PyRRef[Any], context_id: int, retain_graph: bool) -> None:
    from zmq_autograd.compat import autograd  # it looks at what this package has

    value = rref.local_value()
    if not isinstance(value, Tensor):
        raise RuntimeError(f"RRef should contain a tensor for .backward(), got {type(value)}")
    if context_id == _NO_CONTEXT:
        torch.autograd.backward([value], retain_graph=retain_graph)
    else:
        autograd.backward(context_id, [value], retain_graph)


for _function in (
    _fetch,
    _rref_typeof_on_owner,
    _local_invoke,
    _local_invoke_async,
    _rref_backward,
):
    state.names.register(_function)


def _global_id(number: tuple[int, int]) -> str:
    return f"GloballyUniqueId(created_on={number[0]}, local_id={number[1]})"


async def _done(held: concurrent.futures.Future[za.RRef]) -> za.RRef:
    # Shielded: whoever waits for a value gives up alone, the call that makes it goes on.
    return await asyncio.shield(asyncio.wrap_future(held))
