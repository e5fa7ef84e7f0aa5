"""Which handler takes a request, and what becomes of its outcome.

Owns the table of handlers by message type: the defaults, and those that the user put above them.
A handler is one coroutine function from ``(request, peer)`` to the reply; whatever it raises goes
to the sender as an `ErrorResponse`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from zmq_autograd.autograd.anomaly import of_the_call
from zmq_autograd.errors import ConfigurationError, WorkerLost
from zmq_autograd.node.current import Call, current_call
from zmq_autograd.node.registry import is_async
from zmq_autograd.node.stepping import Stepped
from zmq_autograd.session import HandleRequest, error_response
from zmq_autograd.wire.messages import (
    ErrorResponse,
    ForwardRequest,
    Hello,
    Modes,
    Reply,
    Request,
)

logger = logging.getLogger("zmq_autograd")

Handler = Callable[[Any, Any], Awaitable[Reply]]


class Replies(Protocol):
    """What the dispatcher needs of a channel."""

    peer: Any

    def reply(self, request_id: int, reply: Reply) -> None:
        """Answer the request."""

    async def reply_when_drained(self, request_id: int, reply: Reply) -> None:
        """Answer the request, once not too much waits to be sent to the peer."""


class Dispatcher:
    """The handlers of one worker."""

    def __init__(self, worker: str, *, send_tracebacks: bool) -> None:
        """Make a dispatcher without handlers.

        Args:
            worker: the worker's name.
            send_tracebacks: tell peers where in this worker's code a handler raised.
        """
        self.worker = worker
        self.send_tracebacks = send_tracebacks
        self._defaults: dict[type[Request], Handler] = {}
        self._handlers: dict[type[Request], Handler] = {}

    def add_default(self, kind: type[Request], handler: Handler) -> None:
        """Handle requests of type `kind` by `handler` where the user has none."""
        self._defaults[kind] = handler

    def add(self, kind: type[Request], handler: Handler) -> None:
        """Handle requests of type `kind` by `handler`, above the default.

        Raises:
            ConfigurationError: `kind` is no request, or has a handler already; or `handler` is
                no coroutine function.
        """
        if not (isinstance(kind, type) and issubclass(kind, Request)) or kind in (Request, Hello):
            raise ConfigurationError(
                f"handler: expected a request type of za.messages, got {kind!r}"
            )
        if not is_async(handler):
            raise ConfigurationError(
                f"handler of {kind.__name__}: expected a coroutine function, got {handler!r}"
            )
        if kind in self._handlers:
            raise ConfigurationError(
                f"worker {self.worker!r} has a handler for {kind.__name__} already"
            )
        self._handlers[kind] = handler

    async def default(self, request: Request, peer: Any) -> Reply:
        """Handle `request` as if the user had no handler for it."""
        handler = self._defaults.get(type(request))
        if handler is None:
            raise NotImplementedError(f"{type(request).__name__} has no default handler")
        return await handler(request, peer)

    async def run(self, request: HandleRequest, channel: Replies, worker: Any, node: Any) -> None:
        """Handle `request` and reply; never raises but when cancelled.

        When cancelled, the reply says that this worker is leaving: where it was the sender that
        cancelled, nobody awaits it, and it goes nowhere.
        """
        message, request_id = request.message, request.request_id
        modes = message.modes if isinstance(message, ForwardRequest) else Modes()
        call = Call(worker, channel.peer, node, request.deadline, modes)
        current_call.set(call)
        of_the_call.set(modes.check_nan)
        try:
            reply = await self._reply_to(message, call)
            call.is_over = True
            await channel.reply_when_drained(request_id, reply)
        except asyncio.CancelledError:
            leaving = WorkerLost(self.worker, node.me.incarnation, "it is leaving")
            channel.reply(request_id, error_response(leaving, self.worker))
            raise

    async def _reply_to(self, message: Request, call: Call) -> Reply:
        """Return what the handler of `message` replies, an `ErrorResponse` where it raised."""
        try:
            await call.node.rrefs.until_claimed(message)
            reply: Reply = await Stepped(self._handled(message, call.peer), call.modes)
        except BaseException as error:  # whatever it is, SystemExit too, it goes to the sender
            if _is_meant_for_us(error):
                raise
            logger.debug("handler of %s raised", type(message).__name__, exc_info=True)
            return error_response(error, self.worker, send_traceback=self.send_tracebacks)
        return reply

    async def _handled(self, message: Request, peer: Any) -> Reply:
        kind = type(message)
        handler: Handler = self._handlers.get(kind, self.default)
        reply = await handler(message, peer)
        if not isinstance(reply, (kind.reply, ErrorResponse)):
            raise TypeError(
                f"the handler of {kind.__name__}: expected {kind.reply.__name__}, "
                f"got {type(reply).__name__}"
            )
        return reply


def _is_meant_for_us(error: BaseException) -> bool:
    """Tell what ends the running task from what its handler raised or was handed."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, GeneratorExit)  # the loop is closed in the middle of the handler
