"""Exceptions to `ErrorResponse` and back: an error keeps its type and facts from worker to worker.

A typed error of this package travels as itself, whatever it crosses, so that a caller learns of a
lost or slow worker three hops away by its name.  Anything else that a handler raises becomes a
`RemoteError` with its type's name, its text and its traceback, never the exception object.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from zmq_autograd.errors import (
    AuthenticationError,
    ContextError,
    DeadlineExceeded,
    NotRegistered,
    ProtocolError,
    RemoteError,
    ResourceExhausted,
    WorkerLost,
    ZmqAutogradError,
)
from zmq_autograd.wire.messages import ErrorResponse

MAX_TEXT: Final = 4 * 1024
"""Characters of an error's text that travel."""

MAX_TRACEBACK: Final = 32 * 1024
"""Characters of a traceback that travel: its end, where the error is."""

_REMOTE: Final = "remote_error"

_PACKAGE: Final = str(Path(__file__).parents[1])

_CODES: Final[dict[type[ZmqAutogradError], str]] = {
    NotRegistered: "not_registered",
    RemoteError: _REMOTE,
    ProtocolError: "protocol_error",
    WorkerLost: "worker_lost",
    DeadlineExceeded: "deadline_exceeded",
    ContextError: "context_error",
    AuthenticationError: "authentication_error",
    ResourceExhausted: "resource_exhausted",
}
"""The errors that keep their type on the wire.  The others say something of this side only."""


def error_response(
    error: BaseException, worker: str, *, send_traceback: bool = False
) -> ErrorResponse:
    """Return what `worker` tells the sender of a request that ended with `error`.

    Args:
        error: what the handler raised.
        worker: the name of this worker, which joins the error's path.
        send_traceback: tell where in the code it happened, if it happened here.
    """
    code = _CODES.get(type(error)) if isinstance(error, ZmqAutogradError) else None
    if code is None or not isinstance(error, ZmqAutogradError):
        return ErrorResponse(
            code=_REMOTE,
            text=_text(error),
            origin=worker,
            type_name=type(error).__name__,
            traceback=_traceback(error) if send_traceback else None,
            path=(worker,),
        )
    path = (worker, *error.path)
    if isinstance(error, RemoteError):
        return ErrorResponse(
            code=code,
            text=_text(error.message),
            origin=error.worker or worker,
            type_name=error.type_name,
            traceback=None if error.traceback is None else _end(error.traceback),
            path=path,
        )
    if isinstance(error, WorkerLost):
        return ErrorResponse(
            code, _text(error.reason), error.name, path=path, incarnation=error.incarnation
        )
    return ErrorResponse(
        code=code,
        text=_text(error.args[0] if error.args else ""),
        origin=error.worker or worker,
        type_name=type(error).__name__,
        path=path,
        context_id=error.context_id if isinstance(error, ContextError) else 0,
        message_ids=error.message_ids if isinstance(error, DeadlineExceeded) else (),
        workers=error.workers if isinstance(error, DeadlineExceeded) else (),
        retryable=isinstance(error, ResourceExhausted),
    )


def exception_from(response: ErrorResponse, peer: str) -> ZmqAutogradError:
    """Return the exception that `response`, sent by the worker named `peer`, stands for."""
    text, origin, path = response.text, response.origin or peer, tuple(response.path)
    match response.code:
        case "worker_lost":
            return WorkerLost(origin, response.incarnation, text, path=path)
        case "deadline_exceeded":
            return DeadlineExceeded(
                _named(text, origin),
                workers=response.workers or (origin,),
                message_ids=response.message_ids,
                path=path,
            )
        case "protocol_error":
            return ProtocolError(_named(text, origin), worker=origin, path=path)
        case "context_error":
            return ContextError(
                _named(text, origin), worker=origin, context_id=response.context_id, path=path
            )
        case "authentication_error":
            return AuthenticationError(_named(text, origin), worker=origin, path=path)
        case "resource_exhausted":
            return ResourceExhausted(_named(text, origin), worker=origin, path=path)
    kind = NotRegistered if response.code == "not_registered" else RemoteError
    return kind(
        text,
        type_name=response.type_name or response.code,
        worker=origin,
        traceback=response.traceback,
        path=path,
    )


def _named(text: str, worker: str) -> str:
    """Make sure that `text` names the worker it is about."""
    return text if repr(worker) in text else f"worker {worker!r}: {text}"


def _text(said: object) -> str:
    """Return what `said`, an exception or its text, says, as far as it travels."""
    return _clean(_guarded(lambda: str(said))[:MAX_TEXT])


def _traceback(error: BaseException) -> str:
    """Format where `error` was raised, from the first frame that is not this package's own."""
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        frames = frames.tb_next
    lines = _guarded(lambda: "".join(traceback.format_exception(type(error), error, frames)))
    return _end(lines)


def _guarded(describe: Callable[[], str]) -> str:
    """Call `describe`, which runs code of a user's exception, that may raise in its turn."""
    try:
        return describe()
    except Exception as error:  # noqa: BLE001  # the sender must get an answer
        return f"<its description raised {type(error).__name__}>"


def _end(text: str) -> str:
    return _clean(text[-MAX_TRACEBACK:])


def _clean(text: str) -> str:
    """Replace lone surrogates (file names hold them), which UTF-8 and so the wire cannot hold."""
    return text.encode("utf-8", "replace").decode()
