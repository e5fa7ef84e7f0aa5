"""Who takes part in a group that workers come to and leave, as each of them learns it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from tests.helpers import DEADLINE
from zmq_autograd.compat.rpc.gathering import Gatherings
from zmq_autograd.compat.rpc.joining import Group, _free_name
from zmq_autograd.compat.rpc.worker_info import WorkerInfo

ALICE, BOB, CAROL = WorkerInfo("alice", 0), WorkerInfo("bob", 1), WorkerInfo("carol", 2)


class Together:
    """A store that answers `get` once two have asked, or a moment later."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._both = threading.Barrier(2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str) -> bytes:
        try:
            self._both.wait(0.1)
        except threading.BrokenBarrierError:  # nobody else asks
            self._both.reset()
        found: bytes = self._store.get(key)
        return found


def test_several_threads_may_ask_for_a_worker_that_has_just_come() -> None:
    store = HashStore()
    group = Group(Together(store), None)
    group.join(ALICE, "tcp://127.0.0.1:1")
    Group(store, None).join(BOB, "tcp://127.0.0.1:2")
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(group.find, ["bob", "bob"], timeout=DEADLINE))
    assert found == [BOB, BOB]


def test_who_did_not_come_is_told_by_rank() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.01))
    with pytest.raises(RuntimeError, match=r"of 3 workers, those of rank \[0, 2\] did not come"):
        Group(store, 3).join(BOB, "tcp://127.0.0.1:1")


class Outrun:
    """A store where another worker of the same name comes just before this one."""

    def __init__(self, store: Any, other: WorkerInfo) -> None:
        self._store = store
        self._other: WorkerInfo | None = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def add(self, key: str, amount: int) -> int:
        if amount and self._other is not None:
            other, self._other = self._other, None
            Group(self._store, None).join(other, "tcp://127.0.0.1:2")
        found: int = self._store.add(key, amount)
        return found


def test_who_did_not_get_in_keeps_nobody_from_learning_who_did() -> None:
    store = HashStore()
    group = Group(store, None)
    group.join(ALICE, "tcp://127.0.0.1:1")
    with pytest.raises(RuntimeError, match="bob is not unique"):
        Group(Outrun(store, BOB), None).join(WorkerInfo("bob", 5), "tcp://127.0.0.1:3")
    Group(store, None).join(CAROL, "tcp://127.0.0.1:4")
    assert group.infos() == [ALICE, BOB, CAROL]


def test_who_was_taken_for_dead_does_not_make_its_successor_leave() -> None:
    store = HashStore()
    group, sleeper, successor = (Group(store, None) for _ in range(3))
    sleeper.join(BOB, "tcp://127.0.0.1:1")
    group.join(ALICE, "tcp://127.0.0.1:2")
    group.drop(BOB)
    successor.join(BOB, "tcp://127.0.0.1:3")
    assert sleeper.find("alice") == ALICE  # it is awake again, and looks around
    sleeper.leave()
    assert group.infos() == [ALICE, BOB]
    assert group.endpoint(BOB) == "tcp://127.0.0.1:3"


class Changing:
    """A store in which a worker of bob's name takes his place when somebody looks for who left."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_armed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def check(self, keys: list[str]) -> bool:
        found: bool = self._store.check(keys)
        if self.is_armed:
            self.is_armed = False
            group = Group(self._store, None)
            group.refresh()
            group.drop(BOB)
            group.join(BOB, "tcp://127.0.0.1:3")
        return found


def test_a_name_that_changes_hands_is_never_seen_twice() -> None:
    store = Changing(HashStore())
    Group(store, None).join(BOB, "tcp://127.0.0.1:1")
    group = Group(store, None)
    group.join(ALICE, "tcp://127.0.0.1:2")
    store.is_armed = True
    group.refresh()
    group.refresh()
    assert group.endpoint(BOB) == "tcp://127.0.0.1:3"


def test_one_that_has_not_said_yet_who_it_is_does_not_spoil_the_next_look() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.01))
    Group(store, None).join(ALICE, "tcp://127.0.0.1:1")
    group = Group(store, None)
    number = store.add("count", 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Wait timeout"):
            group.refresh()
    store.set(f"member/{number}", '["bob", 1, "tcp://127.0.0.1:2"]')
    assert group.infos() == [ALICE, BOB]


def test_a_namesake_that_will_be_refused_is_nobody_elses_business() -> None:
    store = HashStore()
    Group(store, None).join(BOB, "tcp://127.0.0.1:1")
    number = store.add("count", 1)
    store.set(f"member/{number}", '["bob", 5, "tcp://127.0.0.1:2"]')  # it has not looked yet
    group = Group(store, None)
    assert group.infos() == [BOB]
    store.set(f"left/{number}", "1")
    assert group.infos() == [BOB]


def test_a_namesake_may_leave_while_it_is_looked_for() -> None:
    store = HashStore()
    Group(store, None).join(BOB, "tcp://127.0.0.1:1")
    group = Group(store, None)

    def reach(of: Any, info: WorkerInfo) -> None:
        group.drop(info)
        group.refresh()
        group.endpoint(info)

    agent: Any = SimpleNamespace(group=group, me=BOB, reach=None, portal=SimpleNamespace(run=reach))
    _free_name(agent)
    group.join(BOB, "tcp://127.0.0.1:2")
    assert group.endpoint(BOB) == "tcp://127.0.0.1:2"


def test_gatherings_of_other_workers_have_other_ids() -> None:
    gatherings = Gatherings()
    first = {gatherings.next_id(["a", "b"]) for _ in range(20)}
    second = {gatherings.next_id(["a", "b1"]) for _ in range(20)}
    assert len(first | second) == 40
