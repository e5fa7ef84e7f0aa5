"""How workers find each other: by a store of torch's, where each says who and where it is.

A group is static, everybody known from the start, or dynamic: workers come and go.  Owns the keys
in the store; nothing but names and endpoints goes there.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from torch.distributed import DistStoreError

from zmq_autograd.blocking.portal import current_portal
from zmq_autograd.compat.rpc import state
from zmq_autograd.compat.rpc.agent import Agent
from zmq_autograd.compat.rpc.options import TensorPipeRpcBackendOptions
from zmq_autograd.compat.rpc.worker_info import WorkerInfo
from zmq_autograd.errors import ZmqAutogradError
from zmq_autograd.transport import is_loopback
from zmq_autograd.worker import Worker

DRAIN_SECONDS: Final = 2.0
"""Seconds that functions which others called have to finish when this worker leaves."""

_KIND: Final = "kind"
_COUNT: Final = "count"


class Store(Protocol):
    """What is needed of a store of torch's."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Wait for a value and return it."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number and return it."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write a value if it is the expected one; return what it is then."""

    def check(self, keys: list[str]) -> bool:
        """Say whether all have values."""


@dataclass(frozen=True, slots=True)
class _Member:
    info: WorkerInfo
    endpoint: str
    number: int

    def encode(self) -> str:
        return json.dumps([self.info.name, self.info.id, self.endpoint])

    @classmethod
    def decode(cls, text: bytes, number: int) -> _Member:
        name, rank, endpoint = json.loads(text)
        return cls(WorkerInfo(name, rank), endpoint, number)


class Group:
    """Who takes part, and where they listen."""

    def __init__(self, store: Store, world_size: int | None) -> None:
        """Make an empty group.

        Args:
            store: where its members meet.
            world_size: how many there are; None for a group that workers come to and leave.

        Raises:
            RuntimeError: the store has a group of the other kind.
        """
        self._store = store
        self._world_size = world_size
        self._lock = threading.Lock()  # functions in several threads ask for others at once
        self._members: dict[str, _Member] = {}
        self._seen = 0
        self._number = 0  # this worker's own in a dynamic group, from 1
        kind = "static" if world_size else "dynamic"
        if store.compare_set(_KIND, "", kind) != kind.encode():
            raise RuntimeError(
                "RPC group mixes statically and dynamically initialized members which is not "
                "supported."
            )

    @property
    def is_static(self) -> bool:
        """Whether it was complete from the start."""
        return bool(self._world_size)

    def join(self, me: WorkerInfo, endpoint: str) -> None:
        """Take part; of a static group it returns when all do.

        Whoever it raises to has to `leave`, or would keep others from learning who came.

        Raises:
            RuntimeError: another worker has that name, or the others did not come in time.
        """
        if self._world_size:
            self._store.set(f"member/{me.id}", _Member(me, endpoint, me.id).encode())
            self._await_all(self._world_size)
            return
        self.refresh()
        self._check_unique(me)
        self._number = self._store.add(_COUNT, 1)
        member = _Member(me, endpoint, self._number)
        self._store.set(f"member/{self._number}", member.encode())
        self.refresh()
        self._check_unique(me)

    def _await_all(self, world_size: int) -> None:
        try:
            for rank in range(world_size):
                member = self._member(rank)
                other = self._members.setdefault(member.info.name, member)
                if other is not member:
                    raise _not_unique(other.info, member.info)
        except DistStoreError as error:
            ranks = [rank for rank in range(world_size) if not self._has_come(rank)]
            raise RuntimeError(
                f"of {world_size} workers, those of rank {ranks} did not come in time: {error}"
            ) from error

    def leave(self) -> None:
        """Take no part any more."""
        if self._number:
            self._store.set(f"left/{self._number}", "1")

    def drop(self, info: WorkerInfo) -> None:
        """Have a member of a dynamic group, which has died, take no part any more."""
        self._store.set(f"left/{self._members[info.name].number}", "1")

    def find(self, who: str | int) -> WorkerInfo:
        """Return a member by its name or id.

        Raises:
            RuntimeError: there is none.
        """
        found = self._find(who)
        if found is None and not self.is_static:
            self.refresh()
            found = self._find(who)
        if found is None:
            kind = "name" if isinstance(who, str) else "id"
            raise RuntimeError(f"{kind}:{who}, could not find destination")
        return found.info

    def infos(self) -> list[WorkerInfo]:
        """Return all members, by id."""
        if not self.is_static:
            self.refresh()
        return sorted((m.info for m in list(self._members.values())), key=lambda i: i.id)

    def endpoint(self, info: WorkerInfo) -> str:
        """Return where a member listens.

        Raises:
            RuntimeError: it is none.
        """
        member = self._members.get(info.name)
        if member is None or member.info != info:
            raise RuntimeError(f"{info} could not find destination")
        return member.endpoint

    def _find(self, who: str | int) -> _Member | None:
        if isinstance(who, str):
            return self._members.get(who)
        return next((m for m in list(self._members.values()) if m.info.id == who), None)

    def _member(self, number: int) -> _Member:
        return _Member.decode(self._store.get(f"member/{number}"), number)

    def _check_unique(self, info: WorkerInfo) -> None:
        """Raise RuntimeError if another member than number `self._number` has that name."""
        other = self._members.get(info.name)
        if other is not None and other.number != self._number:
            raise _not_unique(other.info, info)

    def refresh(self) -> None:
        """Learn who has come to a dynamic group, and who has left."""
        with self._lock:
            # First: one whose name another had comes after that one has left.
            count = self._store.add(_COUNT, 0)
            for name, member in list(self._members.items()):
                if self._has_left(member.number):
                    del self._members[name]
            for number in range(self._seen + 1, count + 1):
                if not self._has_left(number):
                    member = self._member(number)
                    # Of two of one name the later one will find that it may not stay.
                    self._members.setdefault(member.info.name, member)
                self._seen = number

    def _has_come(self, number: int) -> bool:
        return self._store.check([f"member/{number}"])

    def _has_left(self, number: int) -> bool:
        return self._store.check([f"left/{number}"])


def _not_unique(one: WorkerInfo, other: WorkerInfo) -> RuntimeError:
    return RuntimeError(
        f"RPC worker name {one.name} is not unique. Workers {one.id} and {other.id} share the same "
        "name."
    )


def join(store: Any, name: str, rank: int, world_size: int | None, options: Any) -> Agent:
    """Start a worker, have it take part, and return its agent.

    Raises:
        TypeError: the options are another backend's.
        ValueError: the options cannot be.
        RuntimeError: the name is taken, or the others did not come in time.
    """
    if not isinstance(options, TensorPipeRpcBackendOptions):
        raise TypeError(f"`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`. {options}")
    if options.device_maps:
        raise ValueError("device maps are not supported: move tensors to the CPU before a call")
    me = WorkerInfo(name, rank)
    group = Group(store, world_size)
    worker = Worker(
        name,
        listen=endpoint_for(options),
        insecure=options.insecure,
        limits=options.limits,
        drain=DRAIN_SECONDS,
    )
    portal = current_portal()
    agent = Agent(me, worker, portal, group, options)
    portal.run(worker.start)
    state.set_agent(agent)  # before anybody knows where this worker is, and calls it
    try:
        if not group.is_static:
            _free_name(agent)
        group.join(me, worker.endpoints[0])
        agent.joined()
    except BaseException:
        state.set_agent(None)
        group.leave()
        portal.run(worker.close)
        raise
    return agent


def _free_name(agent: Agent) -> None:
    """Have a worker leave that had this one's name and died."""
    namesake = next((info for info in agent.group.infos() if info.name == agent.me.name), None)
    if namesake is None:
        return
    try:
        agent.portal.run(agent.reach, namesake)
    except ZmqAutogradError:
        agent.group.drop(namesake)
    except RuntimeError:
        return  # it has left meanwhile


def endpoint_for(options: TensorPipeRpcBackendOptions) -> str:
    """Return the endpoint to listen on.

    Raises:
        ValueError: the workers meet beyond this machine, and nobody said how to listen there.
    """
    if options.listen is not None:
        return options.listen
    url = urlsplit(options.init_method)
    host = os.environ.get("MASTER_ADDR") if url.scheme == "env" else url.hostname
    local = os.environ.get("LOCAL_WORLD_SIZE") if url.scheme == "env" else None
    is_one_machine = local is not None and local == os.environ.get("WORLD_SIZE")
    if host is not None and not is_one_machine and not is_loopback(f"tcp://{host}:0"):
        raise ValueError(
            f"the workers meet at {host}, beyond this machine: pass "
            "rpc_backend_options=TensorPipeRpcBackendOptions(listen='tcp://ADDRESS:0', "
            "insecure=True), with an address of this machine that the others reach, if the network "
            "is trusted"
        )
    return "tcp://127.0.0.1:0"
