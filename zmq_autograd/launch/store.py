"""The rendezvous store: torch's TCPStore, hosted safely and used without blocking the event loop.

Owns the store's address, its hosting and the exchange of one entry per rank, after which nobody
needs it any more.  Values are JSON text, never pickle.  Knows nothing of workers beyond what an
entry says of them.  Hosted by `launch.local` or by rank 0, used by `launch.world`.

Every call of a TCPStore blocks, so each runs in a thread, and none is made that waits for another
rank: what is not there yet is asked for again.  A thread is thus busy for milliseconds, and never
longer than `CALL_SECONDS` where the store has frozen.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Final, TypeVar

# Both are public; torch does not list the second one.
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from zmq_autograd.errors import ConfigurationError, DeadlineExceeded, ProtocolError, WorkerLost
from zmq_autograd.launch.environment import Environment
from zmq_autograd.transport.endpoints import is_loopback, tcp_endpoint

__all__ = ["Entry", "exchange", "host_store", "open_store"]

CALL_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.05

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a rank tells all others of itself.

    Attributes:
        rank: its number.
        name: its worker's name.
        endpoints: where its worker can be dialled from the other ranks' machines.
        incarnation: which life of that worker.
    """

    rank: int
    name: str
    endpoints: tuple[str, ...]
    incarnation: str

    def encode(self) -> str:
        """Return the entry as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes, rank: int) -> Entry:
        """Read the entry of `rank`.

        Raises:
            ProtocolError: the text is no entry of that rank.
        """
        try:
            match json.loads(text):
                case {
                    "rank": int(found),
                    "name": str(name),
                    "endpoints": [str(), *_] as endpoints,
                    "incarnation": str(incarnation),
                } if found == rank and all(isinstance(end, str) for end in endpoints):
                    return cls(rank, name, tuple(endpoints), incarnation)
        except ValueError:
            pass  # not JSON, or not UTF-8: told below like every other nonsense
        raise ProtocolError(f"expected the entry of rank {rank} in the store, got {text[:80]!r}")


def host_store(host: str, port: int) -> TCPStore:
    """Host a store; it serves for as long as the returned object is referred to.

    On a loopback host it can be reached from this machine only; torch by itself listens on every
    address.

    Args:
        host: the address by which the others know this machine.
        port: TCP port; 0 takes a free one, which nobody else can take before it is known.

    Raises:
        ConfigurationError: the port cannot be listened on.
    """
    listener: int | None = None
    try:
        if is_loopback(tcp_endpoint(host, port)):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            bound = socket.create_server((host, port), family=family)
            port = bound.getsockname()[1]
            listener = bound.detach()
        # Several tenants: torch.distributed in this process may share the port that it was given.
        return TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=CALL_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener,
        )
    except (OSError, DistError) as error:
        raise ConfigurationError(
            f"expected to host the rendezvous store at {host}:{port}, got {_first_line(error)}"
        ) from error


async def open_store(environment: Environment, deadline: float) -> TCPStore:
    """Return this process's store: its own on rank 0, unless the launcher hosts it.

    Args:
        environment: where the store is.
        deadline: the event loop's time until which it may take to appear.

    Raises:
        ConfigurationError: rank 0 cannot listen on the port.
        DeadlineExceeded: nobody listened there in time.
        WorkerLost: somebody did, and then failed.

    Cancelling leaves nothing behind; a thread may be busy for `CALL_SECONDS` more.
    """
    host, port = environment.master_addr, environment.master_port
    if environment.hosts_store:
        return await asyncio.to_thread(host_store, host, port)
    await _await_listener(host, port, deadline)
    return await _call(
        environment,
        lambda: TCPStore(
            host,
            port,
            is_master=False,
            timeout=timedelta(seconds=CALL_SECONDS),
            wait_for_workers=False,
        ),
    )


async def exchange(
    store: TCPStore, environment: Environment, entry: Entry, deadline: float
) -> list[Entry]:
    """Tell all ranks one's entry, and return the entries of all ranks in their order.

    A process that joins a second time, after it left, meets the others' second time.

    Args:
        store: this process's store.
        environment: this process's place.
        entry: what to tell.
        deadline: the event loop's time until which the others may take to appear.

    Raises:
        DeadlineExceeded: some rank did not appear in time; the text says which.
        ProtocolError: a rank told nonsense.
        WorkerLost: the store is lost.

    Cancelling leaves one's own entry in the store.
    """
    run = f"zmq_autograd/{environment.run_id}/{environment.restart_count}"
    rank, world_size = environment.rank, environment.world_size
    life = await _call(environment, lambda: store.add(f"{run}/lives/{rank}", 1))
    keys = [f"{run}/{life}/{other}" for other in range(world_size)]
    await _call(environment, lambda: store.set(keys[rank], entry.encode()))
    loop = asyncio.get_running_loop()
    while not await _call(environment, lambda: store.check(keys)):
        if loop.time() > deadline:
            here = await _call(environment, lambda: [store.check([key]) for key in keys])
            absent = [f"rank {other}" for other in range(world_size) if not here[other]]
            raise DeadlineExceeded(
                f"expected {world_size} ranks, still waiting for {', '.join(absent)}",
                workers=absent,
            )
        await asyncio.sleep(POLL_SECONDS)
    texts = await _call(environment, lambda: store.multi_get(keys))
    readers = await _call(environment, lambda: store.add(f"{run}/{life}/readers", 1))
    # Who hosts the store must not leave before the last one has read it.
    while environment.hosts_store and readers < world_size and loop.time() < deadline:
        await asyncio.sleep(POLL_SECONDS)
        readers = await _call(environment, lambda: store.add(f"{run}/{life}/readers", 0))
    return [Entry.decode(text, other) for other, text in enumerate(texts)]


async def _await_listener(host: str, port: int, deadline: float) -> None:
    """Return when somebody listens: TCPStore's own retries block and print stack traces."""
    seen: OSError | None = None
    try:
        async with asyncio.timeout_at(deadline):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, port)
                except OSError as error:
                    seen = error
                    await asyncio.sleep(POLL_SECONDS)
                else:
                    writer.close()
                    return
    except TimeoutError:
        raise DeadlineExceeded(
            f"expected a rendezvous store at {host}:{port}, got {seen or 'no answer'}",
            workers=["rank 0"],
        ) from seen


async def _call(environment: Environment, function: Callable[[], Result]) -> Result:
    try:
        return await asyncio.to_thread(function)
    except DistError as error:
        raise WorkerLost(
            f"tcp://{environment.master_addr}:{environment.master_port}",
            reason=f"the rendezvous store failed: {_first_line(error)}",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
