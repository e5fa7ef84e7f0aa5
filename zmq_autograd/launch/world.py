"""`za.init`: a worker that knows the whole program's other workers by rank and by name.

Owns what a user sees of a world: a `Worker` that joins it on starting and waits for the others on
leaving.  Members find each other through `launch.store`, at the place that `launch.environment`
reads; from then on they talk to each other, as `launch.member` has it.  This module must not know
how sessions work, nor who is lost when.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final

from zmq_autograd.errors import ConfigurationError, ProtocolError, WorkerLost, ZmqAutogradError
from zmq_autograd.launch.environment import Environment, read_environment
from zmq_autograd.launch.member import BARRIER, JOIN, LEAVE, LOST, WATCH, Member
from zmq_autograd.launch.membership import Membership
from zmq_autograd.launch.store import Entry, exchange, open_store
from zmq_autograd.remote import RemoteWorker
from zmq_autograd.transport.endpoints import is_loopback, parse_endpoint, tcp_endpoint
from zmq_autograd.worker import CONNECT_TIMEOUT, Worker, current_peer

__all__ = ["WorldWorker", "init"]

logger = logging.getLogger("zmq_autograd")

WORLD_TIMEOUT: Final = 60.0
"""Seconds that members wait for each other, unless told otherwise."""

WILDCARDS: Final = ("*", "0.0.0.0", "::")


def init(
    *,
    name: str | None = None,
    listen: str | Sequence[str] | None = None,
    insecure: bool = False,
    timeout: float = WORLD_TIMEOUT,
) -> WorldWorker:
    """Return this process's worker, with rank and world size from a launcher's environment.

    It is not started: register functions, then ``async with worker:``, which returns when the whole
    world is there.  Run the script by ``zmq-autograd launch -n N script.py`` or by ``torchrun``.

    Args:
        name: what others call it; by default ``worker{rank}``.  Every member's is another.
        listen: endpoints to listen on; by default a free port of 127.0.0.1 where the whole world
            runs on this machine, and of this machine's address towards the others elsewhere.
        insecure: listen beyond this machine although nothing is encrypted and nobody has to prove
            who he is: says that the network is trusted.
        timeout: seconds that this member waits for the others: to join, to leave, and, unless told
            otherwise, at each barrier.

    Raises:
        ConfigurationError: the environment is not a launcher's, or the worker would listen beyond
            this machine.
    """
    environment = read_environment(os.environ)
    return WorldWorker(environment, name=name, listen=listen, insecure=insecure, timeout=timeout)


class WorldWorker(Worker):
    """A worker that is a member of a world; `init` makes it.

    ``async with worker:`` returns when all members are there.  Leaving that block in the ordinary
    way waits until all members leave or are lost, for `timeout` seconds at most; leaving it by an
    exception waits for nobody.

    Attributes:
        rank: this member's number, from 0.
        world_size: number of members.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        name: str | None = None,
        listen: str | Sequence[str] | None = None,
        insecure: bool = False,
        timeout: float = WORLD_TIMEOUT,
    ) -> None:
        """Make the worker of the process at that place; for the other arguments see `init`."""
        if not timeout > 0:
            raise ConfigurationError(f"timeout: expected seconds above 0, got {timeout!r}")
        super().__init__(
            name or f"worker{environment.rank}",
            listen=_default_listen(environment) if listen is None else listen,
            insecure=insecure,
        )
        self.rank = environment.rank
        self.world_size = environment.world_size
        self._environment = environment
        self._timeout = timeout
        # Pending from starting until all members are known; None while not running.
        self._member: asyncio.Future[Member] | None = None
        # Whether leaving the block still has to wait for the others.
        self._awaits_others = True
        # Set when this worker begins to close.
        self._closing = asyncio.Event()
        self._offer_services()

    # --- what a user sees ------------------------------------------------------------------------

    async def peer(
        self, who: int | str, *, timeout: float | None = CONNECT_TIMEOUT
    ) -> RemoteWorker:
        """Return the member of that rank or name, always the same one.

        Args:
            who: rank, or name.
            timeout: seconds for connecting, the first time; None for ever.

        Raises:
            ConfigurationError: there is no such member, it is this one, or this worker is not
                running.
            WorkerLost: nobody answers where it should be, or somebody else does.
        """
        return await self._running().peer(who, timeout)

    async def barrier(self, *, timeout: float | None = None) -> None:
        """Wait until every member has called this as often as this one.

        Members in `serve_forever` take no part.  After a failure or a cancellation the next call
        waits at the same barrier, at which this member has already arrived.

        Args:
            timeout: seconds; None means the world's `timeout`.

        Raises:
            DeadlineExceeded: some did not come in time; it names them.
            WorkerLost: one is lost or has left, and will never come; or rank 0 is lost.
            ConfigurationError: this worker is not running.
        """
        await self._running().barrier(self._timeout if timeout is None else timeout)

    async def serve_forever(self) -> None:
        """Serve the others until they need it no more: until all of them leave, serve or are lost.

        SIGINT, SIGTERM and `close` end it too, and then leaving waits for nobody.

        Raises:
            WorkerLost: rank 0 is lost, so that nobody can tell how the others are.
            ConfigurationError: this worker is not running.
        """
        member = self._running()
        stopped = asyncio.create_task(super().serve_forever())
        over = asyncio.create_task(member.leave(None, serving=True))
        try:
            await asyncio.wait([stopped, over], return_when=asyncio.FIRST_COMPLETED)
            self._awaits_others = False
            if not stopped.done() and not self._closing.is_set():
                over.result()
        finally:
            stopped.cancel()
            over.cancel()
            await asyncio.gather(stopped, over, return_exceptions=True)

    # --- coming and going ------------------------------------------------------------------------

    async def start(self) -> None:
        """Open everything and join the world; ``async with`` does it.

        Raises:
            DeadlineExceeded: some members did not come in time; it names them by rank.
            WorkerLost: a member came and was lost, or the rendezvous store was.
            ConfigurationError: two members have the same name, or this worker cannot listen.

        On any failure, cancellation included, it is closed again.
        """
        await super().start()
        self._member = asyncio.get_running_loop().create_future()
        self._awaits_others = True
        self._closing.clear()
        try:
            await self._join(self._member)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let requests under way finish, then close everything, waiting for no member; idempotent.

        As `Worker.close`.
        """
        self._closing.set()
        member, self._member = self._member, None
        if member is not None and not member.cancel():
            await member.result().close()
        await super().close()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None and self._awaits_others and self._member is not None:
                await self._leave()
        finally:
            await super().__aexit__(exc_type, exc, traceback)

    async def _join(self, known: asyncio.Future[Member]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        store = await open_store(self._environment, deadline)
        entries = await exchange(store, self._environment, await self._entry(), deadline)
        member = Member(self, self.rank, entries)
        known.set_result(member)
        await member.join(max(0.0, deadline - loop.time()))

    async def _leave(self) -> None:
        try:
            await self._running().leave(self._timeout, serving=False)
        except ZmqAutogradError as error:
            logger.warning("worker %r leaves before the others: %s", self.name, error)

    async def _entry(self) -> Entry:
        """Return what the others have to know of this worker."""
        endpoints = self.endpoints
        if not endpoints:
            raise ConfigurationError(f"worker {self.name!r}: a member of a world has to listen")
        if any(_is_wildcard(endpoint) for endpoint in endpoints):
            # In a thread, since a name may have to be resolved.
            host = await asyncio.to_thread(_own_address, self._environment)
            endpoints = [
                tcp_endpoint(host, parse_endpoint(end).port) if _is_wildcard(end) else end
                for end in endpoints
            ]
        return Entry(self.rank, self.name, tuple(endpoints), self.incarnation)

    def _running(self) -> Member:
        if self._member is None or not self._member.done():
            raise ConfigurationError(f"worker {self.name!r} is not running")
        return self._member.result()

    # --- what members ask of each other ----------------------------------------------------------

    def _offer_services(self) -> None:
        async def watch() -> None:
            await self._closing.wait()

        async def lost(name: str, incarnation: str, reason: str) -> None:
            member, peer = await self._asked()
            member.hear_of_loss(peer, name, incarnation, reason)

        async def join(timeout: float) -> None:
            member, peer = await self._asked()
            await member.admit(peer, _books(member), timeout)

        async def barrier(number: int, timeout: float) -> None:
            member, peer = await self._asked()
            await _books(member).barrier(member.rank_of(peer), number, timeout)

        async def leave(timeout: float | None, serving: bool) -> None:
            member, peer = await self._asked()
            await _books(member).leave(member.rank_of(peer), timeout, serving=serving)

        services: dict[str, Callable[..., Awaitable[None]]]
        if self.rank == 0:
            services = {JOIN: join, BARRIER: barrier, LEAVE: leave}
        else:
            services = {WATCH: watch, LOST: lost}
        for name, service in services.items():
            self._registry.register(service, name, internal=True)

    async def _asked(self) -> tuple[Member, RemoteWorker]:
        """Return this member and who asks it for a service.

        Others may ask before this member knows of them, and then wait until it does.
        """
        peer = current_peer()
        if self._member is None or peer is None:
            raise WorkerLost(self.name, self.incarnation, "it is leaving")
        return await asyncio.shield(self._member), peer


def _books(member: Member) -> Membership:
    if member.membership is None:
        raise ProtocolError(f"expected rank 0, got rank {member.rank}")
    return member.membership


def _default_listen(environment: Environment) -> str:
    if environment.one_machine or is_loopback(
        tcp_endpoint(environment.master_addr, environment.master_port)
    ):
        return "tcp://127.0.0.1:0"
    return tcp_endpoint(_own_address(environment), 0)


def _own_address(environment: Environment) -> str:
    """Return the address by which this machine reaches the rendezvous, and others reach it.

    Raises:
        ConfigurationError: there is no way to the rendezvous.
    """
    host, port = environment.master_addr, environment.master_port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # finds the way; nothing is sent
            own: str = probe.getsockname()[0]
    except OSError as error:
        raise ConfigurationError(
            f"environment variable MASTER_ADDR: expected a host in reach, got {host!r}: {error}"
        ) from error
    return own


def _is_wildcard(endpoint: str) -> bool:
    return parse_endpoint(endpoint).host in WILDCARDS
