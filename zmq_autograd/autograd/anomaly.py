"""Anomaly mode across workers: where in the forward code a failing backward comes from.

Torch's anomaly mode is one switch for the whole process.  A call that was made under it would turn
it on for all that runs beside it, and have another one's NaN raise.  So here it is on in parts
only: while a call's forward runs, nodes take down where they are made, which harms nobody; and a
pass looks for NaN, and for the node that raises, by hooks on just the nodes that it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import Node

_PACKAGE: Final = str(Path(__file__).parents[1])

of_the_call: Final[ContextVar[bool | None]] = ContextVar("zmq_autograd_check_nan", default=None)
"""What `check_nan` was at the caller of the call that is served."""

_lock: Final = threading.Lock()

_recordings = 0
"""How many are under way; while there are any, torch's switch is theirs."""

_users: bool | None = None
"""What the process's user had set when the first of them began."""


def check_nan() -> bool | None:
    """Tell whether anomaly mode here looks for NaN; None where anomaly mode is off.

    It is on where the process has turned it on, or the call that is served was made under it.
    """
    with _lock:
        users = _users if _recordings else _of_process()
    return of_the_call.get() if users is None else users


def _of_process() -> bool | None:
    return torch.is_anomaly_check_nan_enabled() if torch.is_anomaly_enabled() else None


@contextmanager
def recording() -> Iterator[None]:
    """Have nodes take down where they are made, in whatever thread, until the block ends."""
    global _recordings, _users
    with _lock:
        if not _recordings:
            _users = _of_process()
            torch.set_anomaly_enabled(True, bool(_users))
        _recordings += 1
    try:
        yield
    finally:
        with _lock:
            _recordings -= 1
            if not _recordings:
                torch.set_anomaly_enabled(_users is not None, _users is not False)


@contextmanager
def watched(nodes: Iterable[Node], *, look_for_nan: bool) -> Iterator[None]:
    """Run `nodes` in the block; an exception out of one gets a note that says where it was made.

    Args:
        nodes: of this worker's graph.
        look_for_nan: raise RuntimeError, as torch does, where one of them makes NaN.
    """
    running: list[Node] = []
    handles: list[Any] = []
    try:
        for node in nodes:
            handles.append(node.register_prehook(partial(_begin, running, node)))
            handles.append(node.register_hook(partial(_end, running, node, look_for_nan)))
        yield
    except Exception as error:
        if running:
            error.add_note(_note_on(running[-1]))
        raise
    finally:
        for handle in handles:
            handle.remove()


def _begin(running: list[Node], node: Node, _: Any) -> None:
    running.append(node)


def _end(
    running: list[Node], node: Node, look_for_nan: bool, passed_on: Sequence[Tensor | None], _: Any
) -> None:
    for index, grad in enumerate(passed_on if look_for_nan else ()):
        if grad is not None and _has_nan(grad):
            raise RuntimeError(
                f"Function '{node.name()}' returned nan values in its {index}th output."
            )
    running.remove(node)


def _has_nan(grad: Tensor) -> bool:
    values = grad._values() if grad.is_sparse else grad
    return bool(values.isnan().any())


def _note_on(node: Node) -> str:
    # Torch keeps it there, as lines for people.
    lines: Sequence[str] = node.metadata.get("traceback_", ())  # type: ignore[attr-defined]
    found = f"Error detected in {node.name()}."
    if not lines:
        return (
            f"{found} It is not known where it was made: have anomaly mode on in the forward, too"
        )
    # What led to the user's code is this package's and the interpreter's.
    ours = max((n for n, line in enumerate(lines, start=1) if _PACKAGE in line), default=0)
    text = "".join(lines[ours:] or lines)
    return f"{found} Traceback of forward call that caused the error:\n{text}"
