"""The classes and functions of `zmq_autograd.blocking`: a line each, but where threads differ."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch

from zmq_autograd import engine, module, optimizer, rref, worker
from zmq_autograd import remote as remotes
from zmq_autograd.blocking.portal import Portal, current_portal
from zmq_autograd.blocking.surface import (
    Entered,
    Surface,
    described,
    in_threads,
    without_async,
    wrapped,
)
from zmq_autograd.launch import world
from zmq_autograd.node import compute
from zmq_autograd.node.registry import is_async
from zmq_autograd.node.signals import signals_heard

T = TypeVar("T")


class RemoteWorker(Surface, of=remotes.RemoteWorker):
    pass


class Context(Entered, of=engine.Context):
    pass


class RRef(Surface, of=rref.RRef):
    pass


class RemoteModule(Surface, of=module.RemoteModule):
    pass


class RemoteParameter(Surface, of=module.RemoteParameter):
    pass


class DistributedOptimizer(Surface, torch.optim.Optimizer, of=optimizer.DistributedOptimizer):
    @staticmethod
    def create(optimizer_class: Any, params: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        # What an iterator yields is unwrapped only here: anywhere else it is a value like others.
        params = list(params) if isinstance(params, Iterator) else params
        return _create(optimizer_class, params, *args, **kwargs)


class Worker(Entered, of=worker.Worker):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _offers_to_threads(self._object)

    def codec(
        self,
        kind: type[T],
        name: str | None = None,
        *,
        pack: Callable[[T], Any],
        unpack: Callable[[Any], T],
    ) -> None:
        self._object.codec(kind, name, pack=in_threads(pack), unpack=in_threads(unpack))

    def handler(self, kind: Any) -> Callable[[T], T]:
        def add(handler: T) -> T:
            self._object.handler(kind)(_in_compute_thread(cast(Any, handler)))
            return handler

        return add

    def start(self) -> None:
        self._wait_for(self._object.start)
        self._opened(self._object.close)

    def close(self) -> None:
        if not self._is_forked:
            self._wait_for(self._object.close)
            self._portal.let_go(self._object)

    def serve_forever(self) -> None:
        with signals_heard():
            self._wait_for(self._object.serve_forever)


class WorldWorker(Worker, of=world.WorldWorker):
    pass


_create = without_async(optimizer.DistributedOptimizer.create)
connect = without_async(worker.connect)
current_context = without_async(worker.current_context)
current_worker = without_async(worker.current_worker)
current_peer = without_async(worker.current_peer)


def init(**options: Any) -> WorldWorker:
    made = world.init(**options)
    _offers_to_threads(made)
    return cast(WorldWorker, wrapped(made, current_portal()))


described(init, world.init)


def of(value: Any, loop: asyncio.AbstractEventLoop | None = None) -> Any:
    """Return a blocking object that stands for an async one; or of several, in a list, say.

    Args:
        value: a worker, a remote worker, a context, ...
        loop: where it lives; in a compute thread by default that of the worker that it computes
            for, elsewhere the one that all blocking objects share.
    """
    return wrapped(value, current_portal() if loop is None else Portal(loop))


def _offers_to_threads(made: worker.Worker) -> None:
    """Have plain functions that are registered with a worker see blocking objects."""
    made._registry.adapt = in_threads


def _in_compute_thread(handler: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    """Return a handler as the worker takes it: plain ones run in compute threads."""
    if is_async(handler):
        return handler
    function = in_threads(handler)

    async def handle(request: Any, peer: Any) -> Any:
        return await compute(function, request, peer)

    return handle
