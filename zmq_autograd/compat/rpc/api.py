"""What a program calls: calls of each kind, and the ways in which workers wait for each other.

The names, arguments and errors are those of `torch.distributed.rpc.api`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

import torch
from torch.futures import Future

from zmq_autograd.compat.rpc import futures, state
from zmq_autograd.compat.rpc.agent import Agent, Asked
from zmq_autograd.compat.rpc.constants import (
    DEFAULT_SHUTDOWN_TIMEOUT,
    UNSET_RPC_TIMEOUT,
    seconds_of,
)
from zmq_autograd.compat.rpc.gathering import AllGatherStates, Gatherings, wait
from zmq_autograd.compat.rpc.rref import RRef
from zmq_autograd.compat.rpc.worker_info import WorkerInfo

__all__ = [
    "AllGatherStates",
    "RRef",
    "allow_module",
    "codec",
    "get_worker_info",
    "register",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]

logger = logging.getLogger("zmq_autograd")

To = str | int | WorkerInfo

allow_module = state.names.allow_module
register = state.names.register
codec = state.values.codec

# Whether RRefs that this worker still holds when it leaves are passed over in silence.
_ignore_rref_leak = True

_thread_local_var: Final = futures.collecting
_gatherings: Final = Gatherings()


# --- who takes part ------------------------------------------------------------------------------


def _is_current_rpc_agent_set() -> bool:
    return state.is_initialized()


def _get_current_rpc_agent() -> Agent:
    return state.agent()


def _set_and_start_rpc_agent(agent: Any) -> None:
    state.set_agent(agent)


def _reset_current_rpc_agent() -> None:
    state.set_agent(None)


def _init_rpc_states(agent: Any) -> None:
    """Take part by `agent`, a backend's."""
    if not _is_current_rpc_agent_set():
        _set_and_start_rpc_agent(agent)


def get_worker_info(worker_name: str | int | None = None) -> WorkerInfo:
    """Return a worker's name and id.

    Args:
        worker_name: its name or id; by default this worker's.

    Raises:
        RuntimeError: there is no such worker, or `init_rpc` has not been called.
    """
    return state.agent().get_worker_info(worker_name)


def _to_worker_info(to: To) -> WorkerInfo:
    if isinstance(to, WorkerInfo):
        return to
    if isinstance(to, (str, int)):
        return get_worker_info(to)
    raise ValueError(f"Cannot get WorkerInfo from name {to}")


def get_rpc_timeout() -> float:
    """Return how many seconds a call may take by default; 0 for no limit."""
    return state.agent().rpc_timeout


def _set_rpc_timeout(seconds: float) -> None:
    state.agent().rpc_timeout = seconds


def enable_gil_profiling(flag: bool) -> None:
    """Have `_get_debug_info` tell, or no longer, how long requests wait for a thread to run."""
    state.agent().enable_gil_profiling(flag)


# --- calls ---------------------------------------------------------------------------------------


def rpc_sync(
    to: To,
    func: Callable[..., Any],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> Any:
    """Call a function on a worker and wait for its result.

    Args:
        to: the worker's name, id or `WorkerInfo`; it may be this one.
        func: a tensor operator of torch's, or a function or class that the worker has registered
            or whose module it has allowed.
        args: tensors, numbers, str, bytes, None, lists, tuples, dicts, sets, RRefs, functions and
            classes as `func` is one, and what has a codec.
        kwargs: like `args`.
        timeout: seconds, 0 for no limit; by default the one that `init_rpc` was told.

    Raises:
        RuntimeError: the worker is lost, does not offer `func`, something cannot travel (nothing
            was sent then), or time ran out.
        Exception: what `func` raised there, by its type if that is known here, with its traceback
            as text.
    """
    return state.agent().call(_asked(to, func, args, kwargs, timeout))


def rpc_async(
    to: To,
    func: Callable[..., Any],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> Future[Any]:
    """Call a function on a worker and return the future of its result; see `rpc_sync`.

    Raises:
        RuntimeError: there is no such worker, or something cannot travel.
    """
    return state.agent().call_async(_asked(to, func, args, kwargs, timeout))


def remote(
    to: To,
    func: Callable[..., Any],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> RRef[Any]:
    """Call a function on a worker, keep the result there, and return an RRef to it at once.

    What the function raises, using the RRef raises.  See `rpc_sync`.

    Raises:
        RuntimeError: there is no such worker, or something cannot travel.
    """
    return state.agent().call_remote(_asked(to, func, args, kwargs, timeout))


def _asked(
    to: To,
    func: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any] | None,
    timeout: float,
    *,
    is_control: bool = False,
) -> Asked:
    agent, info = state.agent(), _to_worker_info(to)
    if not callable(func):
        raise TypeError("function should be callable.")
    return agent.asked(info, func, args or (), kwargs, timeout, is_control=is_control)


@contextlib.contextmanager
def _wait_all() -> Iterator[None]:
    """Wait, on leaving the block, for the futures of all calls that were made in it."""
    _thread_local_var.future_list = []
    try:
        yield
    finally:
        try:
            torch.futures.wait_all(_thread_local_var.future_list)
        finally:
            del _thread_local_var.future_list


# --- waiting for each other ----------------------------------------------------------------------


def _all_gather(
    obj: Any, worker_names: Collection[str] | None = None, timeout: float = UNSET_RPC_TIMEOUT
) -> dict[str, Any]:
    """Return what each worker passes here, by name; waits until all have.

    Args:
        obj: what this worker passes.
        worker_names: who takes part, by default all.
        timeout: seconds for each call and for the waiting; by default calls take as long as
            `init_rpc` was told, and the waiting as long as nobody is lost; 0 for no limit.

    Raises:
        RuntimeError: somebody is lost, or did not come in time.
    """
    agent = state.agent()
    names = set(worker_names or (info.name for info in agent.get_worker_infos()))
    leader = min(names)
    sequence_id = _gatherings.next_id(names)
    signal_seconds = None if timeout in (UNSET_RPC_TIMEOUT, 0) else timeout
    if agent.me.name == leader:
        _gatherings.take(sequence_id, leader, obj, names)
    else:
        told = (sequence_id, agent.me.name, obj, sorted(names))
        agent.call(_asked(leader, _gather_here, told, None, timeout, is_control=True))
    gathering = _gatherings.of(sequence_id)
    wait(gathering, leader, signal_seconds)
    if agent.me.name == leader:
        _tell_followers(agent, sequence_id, sorted(names - {leader}), timeout)
    return _gatherings.end(sequence_id).gathered_objects


def _tell_followers(agent: Agent, sequence_id: str, names: list[str], timeout: float) -> None:
    told = (sequence_id, _gatherings.of(sequence_id).gathered_objects)
    asked = {
        name: agent.call_async(_asked(name, _complete_here, told, None, timeout, is_control=True))
        for name in names
    }
    errors = []
    for name, future in asked.items():
        try:
            future.wait()
        except RuntimeError as error:
            errors.append((name, error))
    if errors:
        raise RuntimeError(
            f"Followers {[name for name, _ in errors]} timed out in _all_gather after "
            f"{agent.seconds(timeout) or 0:.2f} seconds. The first exception is {errors[0][1]}"
        )


@register
def _gather_here(sequence_id: str, name: str, obj: Any, names: list[str]) -> None:
    _gatherings.take(sequence_id, name, obj, names)


@register
def _complete_here(sequence_id: str, told: dict[str, Any]) -> None:
    _broadcast_to_followers(sequence_id, told)


def _broadcast_to_followers(sequence_id: str, objects_map: dict[str, Any]) -> None:
    _gatherings.complete(sequence_id, objects_map)


def _barrier(worker_names: Collection[str]) -> None:
    """Wait until these workers have come here; a failure is logged."""
    try:
        _all_gather(None, set(worker_names))
    except RuntimeError:
        logger.exception("Failed to complete barrier")


def _wait_all_workers(timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
    """Wait until all workers have come here, each with no call of its own under way.

    Raises:
        RuntimeError: somebody is lost, or did not come in time.
    """
    agent = state.agent()
    agent.portal.run(agent.idle, seconds_of(timeout))
    _all_gather(None, timeout=timeout)


def _wait_for_calls(timeout: float) -> None:
    """Wait, when all workers have come to leave, until no call is under way anywhere.

    From then on calls only come from others that are under way, so none is once two rounds in a row
    have counted the same.  Whoever cannot wait for it has left already: nothing is gained by
    staying.
    """
    agent = state.agent()
    before: dict[str, Any] | None = None
    counts: dict[str, Any] = {}
    try:
        while counts != before:
            before = counts
            count = agent.portal.run(agent.idle, seconds_of(timeout))
            counts = _all_gather(count, timeout=timeout)
    except RuntimeError:
        logger.warning("a worker left while others had calls under way", exc_info=True)


def _delete_all_user_and_unforked_owner_rrefs() -> None:
    """Let go of every RRef of this worker's to a value elsewhere."""
    state.agent().delete_rrefs()


def shutdown(graceful: bool = True, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
    """Take part no longer.

    Args:
        graceful: wait first until all workers are here and no call is under way; otherwise leave
            at once.
        timeout: seconds to wait, 0 for as long as nobody is lost.

    Raises:
        RuntimeError: somebody was lost or did not come in time; this worker has left all the same.
    """
    agent = state.agent()
    with contextlib.ExitStack() as leaving:  # the last comes first, and all of them do
        leaving.callback(_reset_current_rpc_agent)
        leaving.callback(_gatherings.clear)
        leaving.callback(agent.portal.run, agent.close)
        leaving.callback(agent.group.leave)
        if graceful and agent.is_static_group:
            _wait_all_workers(timeout)
            _wait_for_calls(timeout)
            _delete_all_user_and_unforked_owner_rrefs()
            _check_leaks(agent)
        elif graceful:
            agent.portal.run(agent.idle, seconds_of(timeout))
            _delete_all_user_and_unforked_owner_rrefs()


def _check_leaks(agent: Agent) -> None:
    if not _ignore_rref_leak and agent.held_rrefs():
        raise RuntimeError(f"Leaking RRef: {agent.held_rrefs()} to values of other workers")


# --- looking inside ------------------------------------------------------------------------------


def _rref_context_get_debug_info() -> dict[str, str]:
    """Return how many RRefs there are, as torch tells it."""
    agent = state.agent()
    counts = agent.portal.call(agent.worker.status)["rrefs"]
    return {
        "num_owner_rrefs": str(counts["owned"]),
        "num_forks": str(counts["forks"]),
        "num_pending_users": str(counts["pending"]),
        "num_pending_futures": str(agent.pending_rrefs()),
    }
