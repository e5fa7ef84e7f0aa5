"""Calls of registered functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zmq_autograd.wire.messages.base import Reply, Request
from zmq_autograd.wire.messages.passes import AutogradMetadata


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes of torch under which a call was made, and so runs.

    Attributes:
        grad_enabled: as ``torch.is_grad_enabled()``.
        inference_mode: as ``torch.is_inference_mode_enabled()``.
        autocast: pairs of device type and dtype name for which autocast was on.
        check_nan: as ``torch.is_anomaly_check_nan_enabled()``, None where anomaly mode was off.
    """

    grad_enabled: bool = True
    inference_mode: bool = False
    autocast: tuple[tuple[str, str], ...] = ()
    check_nan: bool | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ForwardResponse(Reply):
    """The result of a call (torch: ``RpcWithAutograd`` response).

    Attributes:
        result: what the function returned; an RRef to it where the request said `keep`.
        metadata: the message that carried it back, where it is on the autograd graph.
        profiler_events: what the profiler saw, where the request asked for it.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
    """

    result: Any = None
    metadata: AutogradMetadata | None = None
    profiler_events: Any = None
    committed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ForwardRequest(Request):
    """A call of a registered function (torch: ``RpcWithAutograd`` request).

    Attributes:
        function: the registered name, with ``.method`` for a method of a registered object; or the
            name of the method, where there is a `target_id`.
        args: positional arguments.
        kwargs: keyword arguments.
        metadata: the context and message, None outside a context.
        modes: the caller's modes of torch.
        profiler: configuration of the caller's profiler, None where none runs.
        committed: the context's last pass that the sender knows to be complete, 0 for none.
        from_owner: the sender opened the context.
        target_id: the RRef whose value's method is called, 0 for a registered function.
        keep: keep the result, and reply an RRef to it (torch: ``PYTHON_REMOTE_CALL``).
    """

    reply: ClassVar = ForwardResponse

    function: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    metadata: AutogradMetadata | None = None
    modes: Modes = Modes()
    profiler: Any = None
    committed: int = 0
    from_owner: bool = False
    target_id: int = 0
    keep: bool = False
