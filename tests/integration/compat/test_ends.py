"""What is left of a worker of the drop-in modules when something ends in an unusual way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import DEADLINE
from tests.integration import compat_functions as program
from zmq_autograd import blocking
from zmq_autograd.compat import autograd, rpc
from zmq_autograd.compat.rpc import state

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def options(tmp_path: Path) -> Iterator[rpc.TensorPipeRpcBackendOptions]:
    """Where to meet; whoever takes part leaves in the end."""
    program.released.clear()
    yield rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{tmp_path}/store", rpc_timeout=DEADLINE
    )
    program.released.set()
    if rpc._is_current_rpc_agent_set():
        rpc.shutdown(graceful=False)
    blocking.current_portal().close()


def take_part(options: rpc.TensorPipeRpcBackendOptions) -> None:
    rpc.allow_module(program.__name__)
    rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)


def test_taking_part_twice_is_refused_and_changes_nothing(
    options: rpc.TensorPipeRpcBackendOptions,
) -> None:
    take_part(options)
    with autograd.context() as first:
        pass
    with pytest.raises(RuntimeError, match="already initialized"):
        take_part(options)
    with autograd.context() as second:
        assert second != first  # which has ended, and cannot be again
        assert rpc.rpc_sync("me", torch.add, args=(torch.ones(()), 1)) == 2


def test_releasing_another_context_leaves_this_thread_in_its_own(
    options: rpc.TensorPipeRpcBackendOptions,
) -> None:
    take_part(options)
    opened: list[Any] = []
    with autograd.context() as mine:
        other = threading.Thread(target=lambda: opened.append(autograd._new_context()))
        other.start()
        other.join(DEADLINE)
        autograd._release_context(opened[0]._context_id())
        assert autograd._current_context()._context_id() == mine
        with pytest.raises(RuntimeError, match="Could not find"):
            autograd._retrieve_context(opened[0]._context_id())
        autograd._is_valid_context(mine)


def test_a_worker_has_left_even_where_its_store_is_gone(
    options: rpc.TensorPipeRpcBackendOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_part(options)
    agent = state.agent()

    def lost() -> None:
        raise RuntimeError("the store is gone")

    monkeypatch.setattr(agent.group, "leave", lost)
    with pytest.raises(RuntimeError, match="the store is gone"):
        rpc.shutdown(graceful=False)
    assert not rpc._is_current_rpc_agent_set()
    assert agent.worker.endpoints == []


def test_a_future_is_done_even_where_the_event_loop_ends(
    options: rpc.TensorPipeRpcBackendOptions,
) -> None:
    take_part(options)
    agent = state.agent()
    future = rpc.rpc_async("me", program.wait)

    async def end() -> None:
        for task in list(agent._futures._settling):
            task.cancel()

    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    agent.portal.run(end)
    assert done.wait(DEADLINE)
    with pytest.raises(RuntimeError, match="takes part no longer"):
        future.wait()
