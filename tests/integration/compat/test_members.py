"""How a worker of a program on torch's RPC, moved over, takes part and leaves."""

from __future__ import annotations

import copy
import logging

import pytest
from torch._C._distributed_c10d import HashStore

from tests.integration import compat_functions as program
from zmq_autograd.compat import rpc
from zmq_autograd.compat.rpc.joining import endpoint_for
from zmq_autograd.wire import Limits


def test_a_worker_may_leave_and_come_again(
    me: str, options: rpc.TensorPipeRpcBackendOptions
) -> None:
    with pytest.raises(RuntimeError, match="already initialized"):
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=copy.copy(options))
    rref = rpc.remote(me, program.add, args=(1, 2))
    rpc.shutdown()
    for use in (lambda: rpc.rpc_sync(me, program.add), lambda: rpc.get_worker_info()):
        with pytest.raises(RuntimeError, match=r"^RPC has not been initialized"):
            use()
    with pytest.raises(RuntimeError, match="RPC agent is not set"):
        rpc.RRef(1)
    del rref
    rpc.init_rpc("me2", rank=0, world_size=1, rpc_backend_options=options)
    assert rpc.rpc_sync("me2", program.add, args=(1, 2)) == 3
    rpc.shutdown()


def test_a_group_that_workers_come_to(options: rpc.TensorPipeRpcBackendOptions) -> None:
    rpc.allow_module(program.__name__)
    rpc.init_rpc("me", rank=0, rpc_backend_options=options)
    assert rpc.rpc_sync("me", program.add, args=(1, 2)) == 3
    assert [info.name for info in rpc._get_current_rpc_agent().get_worker_infos()] == ["me"]
    rpc.shutdown()


def test_calls_that_nobody_waits_for_are_done_before_a_worker_leaves(me: str) -> None:
    program.ran.clear()
    rpc.rpc_async(me, program.chain, args=([me], 10))
    rpc.shutdown()
    assert program.how_often("chain") == 11


def test_leaving_at_once_ends_what_is_under_way(me: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    future = rpc.rpc_async(me, program.wait, timeout=0)
    rpc.shutdown(graceful=False)
    with pytest.raises(RuntimeError):
        future.wait()
    assert not caplog.records


def test_a_worker_listens_on_this_machine_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, options: rpc.TensorPipeRpcBackendOptions
) -> None:
    assert endpoint_for(options) == "tcp://127.0.0.1:0"
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert endpoint_for(rpc.TensorPipeRpcBackendOptions()) == "tcp://127.0.0.1:0"
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(ValueError, match="beyond this machine"):
        endpoint_for(rpc.TensorPipeRpcBackendOptions())
    with pytest.raises(ValueError, match="beyond this machine"):
        endpoint_for(rpc.TensorPipeRpcBackendOptions(init_method="tcp://192.0.2.1:29500"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # a launcher says that it is one machine
    assert endpoint_for(rpc.TensorPipeRpcBackendOptions()) == "tcp://127.0.0.1:0"
    there = "tcp://192.0.2.7:0"
    assert endpoint_for(rpc.TensorPipeRpcBackendOptions(listen=there, insecure=True)) == there


def test_a_worker_takes_in_as_much_as_its_options_say(
    options: rpc.TensorPipeRpcBackendOptions,
) -> None:
    rpc.allow_module(program.__name__)
    large = bytes(Limits().header_bytes)
    for limits, is_enough in ((Limits(), False), (Limits(header_bytes=3 * len(large)), True)):
        options.limits = limits
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
        if is_enough:
            assert rpc.rpc_sync("me", program.add, args=(large, b"!")) == large + b"!"
        else:
            with pytest.raises(RuntimeError, match="would refuse this message"):
                rpc.rpc_sync("me", program.add, args=(large, b"!"))
        rpc.shutdown()


def test_nothing_is_left_of_a_worker_whose_name_is_taken(
    options: rpc.TensorPipeRpcBackendOptions,
) -> None:
    store = HashStore()
    store.set("member/1", '["me", 1, "tcp://127.0.0.1:1"]')
    with pytest.raises(RuntimeError, match="is not unique"):
        rpc._init_rpc_backend(rpc.BackendType.TENSORPIPE, store, "me", 0, 2, options)
    with pytest.raises(RuntimeError, match="has not been initialized"):
        rpc.get_worker_info()


def test_options_that_cannot_be(options: rpc.TensorPipeRpcBackendOptions) -> None:
    with pytest.raises(TypeError, match="member of BackendType"):
        rpc.init_rpc("me", backend="TENSORPIPE", rank=0, world_size=1)
    with pytest.raises(TypeError, match="instance of RpcBackendOptions"):
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options={})
    with pytest.raises(RuntimeError, match="Worker name must match"):
        rpc.init_rpc("not a name", rank=0, world_size=1, rpc_backend_options=options)
    options.listen = "tcp://192.0.2.7:0"
    with pytest.raises(ValueError, match="anybody could call it"):
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
    assert not rpc._is_current_rpc_agent_set()
