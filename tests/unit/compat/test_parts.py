"""Small parts of the door for programs on torch's RPC."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore

from zmq_autograd.compat.rpc import backend_registry, constants
from zmq_autograd.compat.rpc.gathering import Gatherings
from zmq_autograd.compat.rpc.joining import Group
from zmq_autograd.compat.rpc.options import RpcBackendOptions, TensorPipeRpcBackendOptions
from zmq_autograd.compat.rpc.worker_info import WorkerInfo

# --- worker infos --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        ("", 0, "must be non-empty"),
        (" ", 0, "must match"),
        ("a*", 0, "must match"),
        ("a" * 128, 0, "shorter than 128"),
        ("a", -1, "Worker id"),
        ("a", 2**15, "Worker id"),
    ],
)
def test_what_is_no_workers_name_or_id_is_refused(name: str, number: int, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        WorkerInfo(name, number)


def test_a_worker_info_is_a_value() -> None:
    assert WorkerInfo("a-b:c_1", 3) == WorkerInfo(name="a-b:c_1", id=3)
    assert {WorkerInfo("a", 1): 1}[WorkerInfo("a", 1)] == 1
    assert str(WorkerInfo("a", 1)) == "WorkerInfo(id=1, name=a)"


# --- options -------------------------------------------------------------------------------------


def test_device_maps_are_one_to_one() -> None:
    options = TensorPipeRpcBackendOptions(device_maps={"a": {"cuda:0": "cuda:1"}})
    options.set_device_map("a", {"cuda:1": "cuda:0"})
    cuda = [torch.device("cuda", number) for number in range(2)]
    assert options.device_maps == {"a": {cuda[0]: cuda[1], cuda[1]: cuda[0]}}
    with pytest.raises(ValueError, match="1-to-1"):
        options.set_device_map("a", {"cuda:0": "cuda:0"})
    with pytest.raises(ValueError, match="1-to-1"):
        options.set_device_map("b", {"cuda:0": "cuda:0", "cuda:1": "cuda:0"})
    with pytest.raises(ValueError, match="CUDA devices"):
        options.set_devices(["cpu"])


@pytest.mark.parametrize("arguments", [{"rpc_timeout": timedelta()}, {"init_method": 3}])
def test_options_of_another_type_are_refused(arguments: Any) -> None:
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        RpcBackendOptions(**arguments)


def test_backends_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_registry, "BackendType", backend_registry.BackendType)
    tensorpipe = backend_registry.BackendType.TENSORPIPE
    assert repr(tensorpipe) == "BackendType.TENSORPIPE"
    options = backend_registry.construct_rpc_backend_options(tensorpipe, num_worker_threads=3)
    assert options.num_worker_threads == 3
    assert options.rpc_timeout == constants.DEFAULT_RPC_TIMEOUT_SEC
    added = backend_registry.register_backend("MINE", lambda **_: "options", lambda **_: "agent")
    assert added is backend_registry.BackendType.MINE
    assert backend_registry.construct_rpc_backend_options(added) == "options"
    assert backend_registry.init_backend(added) == "agent"
    with pytest.raises(RuntimeError, match="already registered"):
        backend_registry.register_backend("MINE", lambda **_: None, lambda **_: None)


# --- gathering -----------------------------------------------------------------------------------


def test_a_gathering_is_complete_when_all_have_told() -> None:
    leader = Gatherings()
    number = leader.next_id({"b", "a"})
    assert number == Gatherings().next_id(["a", "b"])
    assert leader.next_id({"b", "a"}) != number
    leader.take(number, "b", 2, ["a", "b"])
    assert not leader.of(number).proceed_signal.is_set()
    assert set(leader.of(number).missing()) == {"a"}
    leader.take(number, "a", 1, ["a", "b"])
    assert leader.of(number).proceed_signal.is_set()
    assert leader.end(number).gathered_objects == {"a": 1, "b": 2}
    assert not leader.of(number).gathered_objects


def test_who_takes_no_part_or_comes_twice_is_refused() -> None:
    leader = Gatherings()
    leader.take("1", "a", 1, ["a", "b"])
    for name in ("a", "c"):
        with pytest.raises(RuntimeError, match="not expected"):
            leader.take("1", name, 1, ["a", "b"])


# --- who takes part ------------------------------------------------------------------------------


def test_a_static_group_knows_everybody() -> None:
    store = HashStore()
    second = Group(store, 2)
    store.set("member/0", '["first", 0, "tcp://127.0.0.1:1"]')
    second.join(WorkerInfo("second", 1), "tcp://127.0.0.1:2")
    assert [info.name for info in second.infos()] == ["first", "second"]
    assert second.find("first") == second.find(0) == WorkerInfo("first", 0)
    assert second.endpoint(WorkerInfo("first", 0)) == "tcp://127.0.0.1:1"
    for unknown in ("third", 2, -1):
        with pytest.raises(RuntimeError, match="could not find destination"):
            second.find(unknown)
    with pytest.raises(RuntimeError, match="could not find destination"):
        second.endpoint(WorkerInfo("first", 1))


def test_names_are_unique() -> None:
    store = HashStore()
    store.set("member/0", '["same", 0, "tcp://127.0.0.1:1"]')
    with pytest.raises(RuntimeError, match="is not unique"):
        Group(store, 2).join(WorkerInfo("same", 1), "tcp://127.0.0.1:2")


def test_workers_come_to_a_dynamic_group_and_leave_it() -> None:
    store = HashStore()
    first, second = Group(store, None), Group(store, None)
    first.join(WorkerInfo("first", 0), "tcp://127.0.0.1:1")
    second.join(WorkerInfo("second", 1), "tcp://127.0.0.1:2")
    assert [info.name for info in first.infos()] == ["first", "second"]
    with pytest.raises(RuntimeError, match="is not unique"):
        Group(store, None).join(WorkerInfo("first", 2), "tcp://127.0.0.1:3")
    second.leave()
    assert [info.name for info in first.infos()] == ["first"]
    again = Group(store, None)
    again.join(WorkerInfo("second", 1), "tcp://127.0.0.1:4")
    assert first.endpoint(first.find("second")) == "tcp://127.0.0.1:4"


def test_a_group_is_of_one_kind() -> None:
    store = PrefixStore("a", HashStore())
    Group(store, 2)
    with pytest.raises(RuntimeError, match="mixes statically and dynamically"):
        Group(store, None)
