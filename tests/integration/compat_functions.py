"""A program on torch's RPC: the functions and classes that its workers call on each other."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future

from zmq_autograd.compat import autograd, rpc

ran: list[str] = []
"""Which functions have run in this process, of those that say so."""

released = threading.Event()
"""What `wait` waits for."""

WEIGHT = torch.full((3, 3), 0.5, requires_grad=True)


def add(x: Any, y: Any) -> Any:
    """Return a sum."""
    return x + y


def weighted(x: Tensor) -> Tensor:
    """Return what depends on a leaf of this worker's."""
    return torch.tanh(x @ WEIGHT)


def nested(to: str, x: Tensor) -> Tensor:
    """Call on to another worker."""
    y: Tensor = rpc.rpc_sync(to, weighted, args=(x,))
    return y * x


def fail(text: str) -> None:
    """Raise."""
    raise ValueError(text)


class Unlucky(Exception):
    """What cannot be made of a text alone."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def fail_unluckily() -> None:
    """Raise what the caller cannot make again."""
    raise Unlucky(1, "bad luck")


def wait(seconds: float = 20.0) -> bool:
    """Wait until it is released."""
    return released.wait(seconds)


@rpc.functions.async_execution
def add_later(to: str, x: Tensor, y: Tensor) -> Future[Tensor]:
    """Return a sum when another worker has made it, and twice as much."""
    return rpc.rpc_async(to, add, args=(x, y)).then(lambda done: 2 * done.wait())


@rpc.functions.async_execution
def no_future() -> Any:
    """Break a promise."""
    return 3


def gradients_here(context_id: int) -> list[Tensor]:
    """Return the gradient of this worker's own leaf."""
    return [autograd.get_gradients(context_id)[WEIGHT]]


def value_of(rref: rpc.RRef[Any]) -> Any:
    """Return what an RRef refers to."""
    return rref.to_here()


def owner_of(rref: rpc.RRef[Any]) -> str:
    """Return who has the value that an RRef refers to."""
    return rref.owner_name()


def squares(rref: rpc.RRef[Tensor]) -> Tensor:
    """Return the sum of a tensor's squares."""
    return (rref.local_value() ** 2).sum()


def chain(to: list[str], left: int) -> None:
    """Have other workers call on, without waiting for them."""
    ran.append(f"chain {left}")
    time.sleep(0.01)
    if left:
        rpc.rpc_async(to[left % len(to)], chain, args=(to, left - 1))


def how_often(what: str) -> int:
    """Return how many of the functions that have run here are called so."""
    return sum(name.startswith(what) for name in ran)


class Counter:
    """An object with state."""

    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, n: int) -> int:
        """Count on."""
        self.count += n
        return self.count

    @staticmethod
    def half(x: float) -> float:
        """Return a half."""
        return x / 2

    @rpc.functions.async_execution
    def add_later(self, to: str, n: int) -> Future[int]:
        """Count on when another worker has answered."""
        return rpc.rpc_async(to, add, args=(self.count, n)).then(lambda done: self.add(done.wait()))


class Net(nn.Module):
    """A module of the program's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return what it makes of `x`."""
        return torch.sigmoid(x @ self.weight)


class Halving(torch.optim.SGD):
    """An optimizer of the program's own: half of SGD's steps."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr / 2)


class Broken(torch.optim.SGD):
    """An optimizer that cannot step."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Raise."""
        raise ValueError("cannot step")


class Unfinished(torch.optim.SGD):
    """An optimizer that raises when it has stepped."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step, and raise."""
        super().step(closure)
        raise ValueError("cannot finish")
