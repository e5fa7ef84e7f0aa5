"""RRefs: what a user holds of a value that lives on another worker.

Who counts which holder is `zmq_autograd.node.rrefs`'; here is what one can do with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from zmq_autograd.autograd.anomaly import check_nan
from zmq_autograd.engine import BACKWARD_TIMEOUT, Context, Contexts, local_context
from zmq_autograd.errors import ConfigurationError
from zmq_autograd.node import Fork, Held, call_owned
from zmq_autograd.remote import DEFAULT_TIMEOUT, RemoteWorker, caller_of, named
from zmq_autograd.session import checked_timeout
from zmq_autograd.wire.messages import RRefBackwardRequest, RRefBackwardResponse

if TYPE_CHECKING:
    from zmq_autograd.node import Node


class RRef(Held):
    """A reference to a value that lives on one worker, its owner (torch: ``RRef``).

    Got from `RemoteWorker.remote`, `Worker.rref`, or from whoever passed it on: RRefs travel in
    arguments and results.  The owner keeps the value until the last one that refers to it, on any
    worker, has been collected, or its worker is lost.
    """

    __slots__ = ("_node",)

    def __init__(self, fork: Fork, node: Node) -> None:
        """Refer to a value by `fork`, on `node`; the node does."""
        super().__init__(fork)
        self._node = node

    @property
    def rref_id(self) -> int:
        """The value, the same for all that refer to it."""
        return self.fork.rref_id

    @property
    def owner(self) -> Any:
        """The worker where the value lives: a `RemoteWorker`, or there the `Worker` itself."""
        return self._node.worker if self.is_owner else self.fork.peer

    @property
    def is_owner(self) -> bool:
        """Whether the value lives on this worker (torch: ``is_owner()``)."""
        return self._node.rrefs.is_mine(self.fork.reference)

    def __repr__(self) -> str:
        return f"<RRef {self.rref_id} to a value on {self.fork.reference.owner!r}>"

    def local_value(self) -> Any:
        """Return the value itself, on its owner.

        Raises:
            ConfigurationError: this worker is not the owner.
        """
        if not self.is_owner:
            raise ConfigurationError(
                f"the value lives on worker {self.fork.reference.owner!r}: use `await to_here()`"
            )
        return self._node.rrefs.owned(self.rref_id).value

    async def to_here(self, *, timeout: float | None = DEFAULT_TIMEOUT) -> Any:
        """Return a copy of the value; on its owner the value itself.

        Within a context it is on the graph: gradients go back to the owner.

        Args:
            timeout: seconds, None for ever.

        Raises:
            RemoteError: the value cannot travel.
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        timeout = checked_timeout(timeout)
        if self.is_owner:
            return self.local_value()
        return await caller_of(self._peer).fetch(self.rref_id, timeout)

    async def call(
        self, method: str, /, *args: Any, timeout: float | None = DEFAULT_TIMEOUT, **kwargs: Any
    ) -> Any:
        """Call a method of the value, one that its class was registered to expose.

        Args:
            method: its name.
            args: as for `RemoteWorker.call`.
            timeout: seconds, None for ever.
            kwargs: as for `RemoteWorker.call`.

        Raises:
            NotRegistered: the value's class is not registered there, or exposes no such method.
            ZmqAutogradError: as for `RemoteWorker.call`.
        """
        return await self._at_owner(method, args, kwargs, timeout)

    async def remote(
        self, method: str, /, *args: Any, timeout: float | None = DEFAULT_TIMEOUT, **kwargs: Any
    ) -> RRef:
        """Call a method as `call` does, and keep its result on the owner.

        Raises:
            ZmqAutogradError: as for `call`.
        """
        return cast(RRef, await self._at_owner(method, args, kwargs, timeout, keep=True))

    def method(
        self, method: str, /, *, timeout: float | None = DEFAULT_TIMEOUT
    ) -> Callable[..., Any]:
        """Return a coroutine function that calls `method`; every keyword is the callee's.

        Args:
            method: its name.
            timeout: seconds for each call, as for `call`.
        """
        return named(method, partial(self._at_owner, method, timeout=timeout))

    async def run_backward(
        self,
        context: Context,
        *,
        retain_graph: bool = False,
        accumulate_grad: bool = False,
        timeout: float | None = BACKWARD_TIMEOUT,
    ) -> None:
        """Have the owner run a backward pass from the value; `Context.backward` calls it."""
        local = local_context(context)
        if local.table is not home_of(self):
            raise local.error(f"{self!r} is held by worker {self._node.name!r}, not by this one")
        if self.is_owner:
            await context.backward(
                self.local_value(),
                retain_graph=retain_graph,
                accumulate_grad=accumulate_grad,
                timeout=timeout,
            )
            return
        request = RRefBackwardRequest(
            self.rref_id, context.context_id, retain_graph, accumulate_grad, check_nan()
        )
        reply = await self._peer.request(request, timeout=timeout)
        passes = local.passes
        passes.learn_committed(cast(RRefBackwardResponse, reply).committed)
        await passes.until_committed()

    async def _at_owner(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        *,
        keep: bool = False,
    ) -> Any:
        if self.is_owner:
            return await call_owned(
                self._node, self.rref_id, method, args, kwargs, timeout, keep=keep
            )
        caller = caller_of(self._peer)
        return await caller.call(method, args, kwargs, timeout, target_id=self.rref_id, keep=keep)

    @property
    def _peer(self) -> RemoteWorker:
        return cast(RemoteWorker, self.fork.peer)


def home_of(rref: RRef) -> Contexts:
    """Return the contexts of the worker that holds `rref`."""
    return rref._node.contexts
