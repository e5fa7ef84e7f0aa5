"""The agent: one worker of this package, as a program on torch's RPC takes part by it.

Owns the calls of both directions.  Everything that others may ask of it goes through one registered
function, to which the caller tells a function's name and the arguments; what that may be is
`names`', what may travel `values`'.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import torch
from torch.futures import Future

from zmq_autograd import rref as za
from zmq_autograd.compat.rpc import constants, replies, state
from zmq_autograd.compat.rpc.errors import CannotTravel, timed_out
from zmq_autograd.compat.rpc.functions import value_of
from zmq_autograd.compat.rpc.futures import Futures
from zmq_autograd.compat.rpc.profiling import profiled
from zmq_autograd.compat.rpc.rref import PyRRef, RRef
from zmq_autograd.compat.rpc.values import Packed
from zmq_autograd.compat.rpc.worker_info import WorkerInfo
from zmq_autograd.engine import Contexts, local_context
from zmq_autograd.errors import (
    DeadlineExceeded,
    SerializationError,
    WorkerLost,
    ZmqAutogradError,
)
from zmq_autograd.node.compute import compute
from zmq_autograd.node.torch_events import number_workers

if TYPE_CHECKING:
    from zmq_autograd.blocking.portal import Portal
    from zmq_autograd.compat.rpc.joining import Group
    from zmq_autograd.compat.rpc.options import TensorPipeRpcBackendOptions
    from zmq_autograd.remote import RemoteWorker
    from zmq_autograd.worker import Worker

CONNECT_SECONDS: Final = 5.0
"""Seconds to reach a worker for the first time: it listens since it joined, but may be busy."""

RECONNECT_SECONDS: Final = 1.0
"""Seconds to reach one that was lost or could not be reached: it listens there, or is no more."""

_ENTRY: Final = "rpc.call"


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that is to be made.

    Attributes:
        to: the worker that is called.
        function: what is called.
        name: what that is called there.
        packed: the arguments.
        seconds: how long it may take, None for no limit.
        is_control: it is the group's own: workers do not wait for it before they leave.
    """

    to: WorkerInfo
    function: Callable[..., Any]
    name: str
    packed: Packed
    seconds: float | None
    is_control: bool


class Agent:
    """See the module.

    Attributes:
        me: who this worker is.
        worker: the worker itself.
        portal: the way to its event loop.
        group: who takes part.
        rpc_timeout: seconds that a call may take by default; 0 for no limit.
        offered: classes of optimizers that may be made here, beside torch's own.
    """

    def __init__(
        self,
        me: WorkerInfo,
        worker: Worker,
        portal: Portal,
        group: Group,
        options: TensorPipeRpcBackendOptions,
    ) -> None:
        """Make the agent of a worker that runs on `portal`'s event loop."""
        self.me = me
        self.worker = worker
        self.portal = portal
        self.group = group
        self.rpc_timeout = options.rpc_timeout
        self.offered: set[type] = set()
        self._options = options
        self._peers: dict[str, RemoteWorker] = {}
        self._unreachable: set[str] = set()
        self._local_ids = itertools.count()
        self._rrefs: WeakSet[PyRRef[Any]] = WeakSet()
        self._rrefs_lock = threading.RLock()  # they come and go in any thread
        self._active = 0  # calls made that have not ended, but for those that control the group
        self._started = 0
        self._serving = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._joined = asyncio.Event()
        self._waits = replies.Waits()
        self._futures = Futures(portal, me.name)
        worker.register(self._serve, _ENTRY)

    # --- who takes part --------------------------------------------------------------------------

    @functools.cached_property
    def contexts(self) -> Contexts:
        """The contexts that have reached this worker."""
        return local_context(self.worker.context()).table

    def joined(self) -> None:
        """Serve others from now on, even those that came before: everybody is known."""
        number_workers({"": self.me.id} | {info.name: info.id for info in self.group.infos()})
        self.portal.call(self._joined.set)

    @property
    def is_static_group(self) -> bool:
        """Whether the group was complete from the start."""
        return self.group.is_static

    def get_worker_info(self, who: str | int | None = None) -> WorkerInfo:
        """Return a worker by its name or id; this one by default.

        Raises:
            RuntimeError: there is none.
        """
        return self.me if who is None else self.group.find(who)

    def get_worker_infos(self) -> list[WorkerInfo]:
        """Return all workers."""
        return self.group.infos()

    def _get_device_map(self, to: WorkerInfo) -> dict[torch.device, torch.device]:
        return {}  # `join` refuses options with others

    def get_debug_info(self) -> dict[str, str]:
        """Return what it is doing, as torch's agent tells it."""
        return {
            "agent.num_pending_requests": str(self._active),
            "agent.thread_pool_size": str(self._options.num_worker_threads),
            "agent.client_active_calls": str(self._active),
            "agent.server_active_calls": str(self._serving),
            **self._waits.info(),
        }

    def enable_gil_profiling(self, flag: bool) -> None:
        """Measure, or no longer, how long requests wait for a thread to run them."""
        self._waits.is_measuring = flag

    # --- RRefs -----------------------------------------------------------------------------------

    def next_local_id(self) -> int:
        """Return a number for an RRef or a reference to one."""
        return next(self._local_ids)

    def hold(self, rref: PyRRef[Any]) -> None:
        """Remember what this worker holds of others."""
        if not rref.is_owner():
            with self._rrefs_lock:
                self._rrefs.add(rref)

    def delete_rrefs(self) -> None:
        """Let go of what this worker holds of others."""
        for rref in self._held_rrefs():
            rref._delete()
        with self._rrefs_lock:
            self._rrefs.clear()

    def held_rrefs(self) -> int:
        """Return how many RRefs this worker holds of others."""
        return len(self._held_rrefs())

    def pending_rrefs(self) -> int:
        """Return how many RRefs this worker holds of others whose calls have not ended."""
        return sum(rref._is_pending() for rref in self._held_rrefs())

    def _held_rrefs(self) -> list[PyRRef[Any]]:
        with self._rrefs_lock:
            return list(self._rrefs)

    # --- calling ---------------------------------------------------------------------------------

    def seconds(self, timeout: float) -> float | None:
        """Return a timeout in seconds, None for no limit."""
        if timeout == constants.UNSET_RPC_TIMEOUT:
            timeout = self.rpc_timeout
        return constants.seconds_of(timeout)

    def asked(
        self,
        to: WorkerInfo,
        function: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = constants.UNSET_RPC_TIMEOUT,
        *,
        is_control: bool = False,
    ) -> Asked:
        """Return the call of a function, packed and not yet sent; on `to`, or on this worker.

        Raises:
            CannotTravel: the function or an argument cannot.
        """
        target: Any = function
        if isinstance(target, MethodType) and not isinstance(target.__self__, type):
            target, args = target.__func__, (target.__self__, *args)
        name = state.names.name_of(target)
        packed = state.values.pack((tuple(args), dict(kwargs or {})))
        return Asked(to, function, name, packed, self.seconds(timeout), is_control)

    def call(self, asked: Asked) -> Any:
        """Make a call and wait for its result.

        Raises:
            CannotTravel: an argument cannot; nothing was sent.
            RpcTimeout: it took too long.
            RuntimeError: the worker is lost, or does not offer the function.
            Exception: what the function raised, by its type where that is known here.
        """
        with profiled("sync", asked.function, self.me, asked.to):
            return self.portal.run(self.exchange, asked)

    def call_async(self, asked: Asked) -> Future[Any]:
        """Make a call as `call` does, and return the future of its result."""
        self._meet(asked.to)
        with profiled("async", asked.function, self.me, asked.to):
            return self.future_of(self.exchange, asked)

    def call_remote(self, asked: Asked) -> RRef[Any]:
        """Make a call as `call` does, keep the result there, and return the RRef at once."""
        self._meet(asked.to)
        # Whoever asks for the value waits no longer than the call may take; it itself is not ended,
        # so that the value stays as long as the RRef does.
        endless = dataclasses.replace(asked, seconds=None)
        with profiled("remote", asked.function, self.me, asked.to):
            made: concurrent.futures.Future[za.RRef] = self.portal.start(
                self.exchange, endless, keep=True
            )
        held = made if asked.seconds is None else self.portal.start(_within, made, asked.seconds)
        return RRef._made(self, asked.to, held, made)  # type: ignore[return-value]

    def future_of(
        self, function: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
    ) -> Future[Any]:
        """Call a coroutine function on the event loop and return the future of its result."""
        return self._futures.of(function, *args, **kwargs)

    def _meet(self, to: WorkerInfo) -> None:
        """Connect to `to`, so that a call to it has read its tensors when it first suspends."""
        if to.name not in self._peers:
            with contextlib.suppress(RuntimeError, ZmqAutogradError):  # the call tells
                self.portal.run(self.reach, to)

    async def reach(self, to: WorkerInfo) -> RemoteWorker:
        """Return the worker `to`, connecting if need be.

        Raises:
            ZmqAutogradError: it cannot be reached.
            RuntimeError: it has left.
        """
        peer = self._peers.get(to.name)
        if peer is None or not peer.is_connected:
            is_known = peer is not None or to.name in self._unreachable
            seconds = RECONNECT_SECONDS if is_known else CONNECT_SECONDS
            if not self.group.is_static:
                # It may have come back, and then listens elsewhere; a store may take its time.
                await asyncio.to_thread(self.group.refresh)
            try:
                peer = await self.worker.connect(self.group.endpoint(to), timeout=seconds)
            except ZmqAutogradError:
                self._unreachable.add(to.name)
                raise
            if peer.name != to.name:
                raise WorkerLost(to.name, reason=f"{peer.name!r} listens where it did")
            self._peers[to.name] = peer
            self._unreachable.discard(to.name)
        return peer

    async def exchange(self, asked: Asked, *, keep: bool = False) -> Any:
        """Make a call as `call` does, on the event loop; ``keep`` the result there as an RRef."""
        if not asked.is_control:
            self._begin()
        packed, seconds = asked.packed, asked.seconds
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(seconds):
                rrefs = [await rref._fork() for rref in packed.rrefs]
                peer = await self.reach(asked.to)
            left = None if seconds is None else max(0.0, seconds - (loop.time() - began))
            parts = (packed.skeleton, packed.tensors, rrefs)
            reply = await peer.call(_ENTRY, asked.name, *parts, keep, timeout=left)
        except (TimeoutError, DeadlineExceeded) as error:
            raise timed_out(seconds) from error
        except SerializationError as error:
            raise CannotTravel(str(error)) from error
        except ZmqAutogradError as error:
            raise RuntimeError(str(error)) from error
        finally:
            if not asked.is_control:
                self._end()
        return self._result(reply)

    def _result(self, reply: list[Any]) -> Any:
        kind, *parts = reply
        if kind == "error":
            raise replies.remade(*parts)
        if kind == "rref":
            return parts[0]
        return self._unpacked(*parts)

    def _unpacked(self, skeleton: Any, tensors: list[torch.Tensor], rrefs: list[za.RRef]) -> Any:
        def received(held: za.RRef, name: str, number: int, *rref_id: int) -> PyRRef[Any]:
            created_on, local_id = rref_id
            return RRef._received(self, held, WorkerInfo(name, number), (created_on, local_id))

        return state.values.unpack(skeleton, tensors, rrefs, received)

    # --- being called ----------------------------------------------------------------------------

    async def _serve(
        self,
        name: str,
        skeleton: Any,
        tensors: list[torch.Tensor],
        rrefs: list[za.RRef],
        keep: bool,
    ) -> list[Any]:
        """Run a function for another worker; what it raises is a reply like any other."""
        self._serving += 1
        try:
            await self._joined.wait()  # what is called may call others
            run = self._waits.measured(self._run)
            result = await compute(run, name, skeleton, tensors, rrefs)
            if isinstance(result, replies.Later):
                result = await value_of(result.future)
            if keep:
                return ["rref", self.worker.rref(result)]
            packed = state.values.pack(result)
            forks = [await rref._fork() for rref in packed.rrefs]
            return ["value", packed.skeleton, packed.tensors, forks]
        except Exception as error:  # noqa: BLE001  # it is the function's
            return replies.failure(self.me, error)
        finally:
            self._serving -= 1

    def _run(
        self, name: str, skeleton: Any, tensors: list[torch.Tensor], rrefs: list[za.RRef]
    ) -> Any:
        function = state.names.find(name)
        args, kwargs = self._unpacked(skeleton, tensors, rrefs)
        return replies.called(name, function, args, kwargs)

    # --- leaving ---------------------------------------------------------------------------------

    async def idle(self, seconds: float | None) -> int:
        """Wait until no call of this worker's is under way; return how many there have been.

        Raises:
            RuntimeError: `seconds` were not enough.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            raise RuntimeError(f"{self._active} calls are under way after {seconds} s") from None
        return self._started

    async def close(self) -> None:
        """Close the worker; what waits for a reply hears that there will be none."""
        await self.worker.close()
        await self._futures.close()
        number_workers({})

    def _begin(self) -> None:
        self._started += 1
        self._active += 1
        self._idle.clear()

    def _end(self) -> None:
        self._active -= 1
        if not self._active:
            self._idle.set()


async def _within(made: concurrent.futures.Future[za.RRef], seconds: float) -> za.RRef:
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.shield(asyncio.wrap_future(made))
    except TimeoutError as error:
        raise timed_out(seconds) from error
