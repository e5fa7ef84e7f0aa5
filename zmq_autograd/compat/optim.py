"""`torch.distributed.optim.DistributedOptimizer`, on `zmq_autograd`'s own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from zmq_autograd.compat import autograd
from zmq_autograd.compat.rpc import state
from zmq_autograd.compat.rpc.errors import PartialStep
from zmq_autograd.compat.rpc.rref import PyRRef
from zmq_autograd.errors import PartialStepError, ZmqAutogradError
from zmq_autograd.optimizer import DistributedOptimizer as _Optimizer

__all__ = ["DistributedOptimizer"]


class DistributedOptimizer:
    """One optimizer over parameters of several workers; each owner has one of the same class."""

    def __init__(
        self,
        optimizer_class: type[Optimizer],
        params_rref: Sequence[PyRRef[Any]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make the optimizers.

        Args:
            optimizer_class: one of ``torch.optim``, or one that every owner has registered or
                whose module it has allowed.
            params_rref: RRefs to the parameters.
            args: for the class.
            kwargs: for the class.

        Raises:
            TypeError: something in `params_rref` is no RRef.
            RuntimeError: an owner does not offer the class, or is lost, or the class raised there.
            Exception: what the class raised on this worker.
        """
        agent = state.agent()
        params = list(params_rref)
        for rref in params:
            if not isinstance(rref, PyRRef):
                raise TypeError(f"params_rref: expected RRefs, got a {type(rref).__name__}")
        if not optimizer_class.__module__.startswith("torch.optim."):
            for owner in dict.fromkeys(rref.owner() for rref in params):
                agent.call(agent.asked(owner, _offer, (optimizer_class,)))

        async def create() -> _Optimizer:
            forks = [await rref._fork() for rref in params]
            return await _Optimizer.create(optimizer_class, forks, *args, **kwargs)

        try:
            self._optimizer = agent.portal.run(create)
        except ZmqAutogradError as error:
            raise RuntimeError(str(error)) from error

    def step(self, context_id: int) -> None:
        """Step all parameters that have a gradient in the context.

        Raises:
            PartialStep: a RuntimeError and a `PartialStepError`: some workers have stepped, or may
                have, and some have not.
            RuntimeError: there is no such context, or nobody has stepped.
            Exception: what the optimizer raised on this worker, where nobody has stepped.
        """
        context = autograd._find(context_id)
        try:
            state.agent().portal.run(self._optimizer.step, context.user)
        except PartialStepError as error:
            raise PartialStep(
                applied=error.applied,
                not_applied=error.not_applied,
                unknown=error.unknown,
                causes=error.causes,
            ) from error
        except ZmqAutogradError as error:
            raise RuntimeError(str(error)) from error


@state.names.register
def _offer(optimizer_class: type[Optimizer]) -> None:
    """Let optimizers of this class be made here: its name has been looked up in the tables."""
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        raise TypeError(f"expected a class of optimizers, got {optimizer_class}")
    agent = state.agent()
    if optimizer_class not in agent.offered:
        agent.offered.add(optimizer_class)
        agent.portal.call(agent.worker.register, optimizer_class)
