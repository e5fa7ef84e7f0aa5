"""Every error that this package raises on purpose: one tree under `ZmqAutogradError`.

::

    ZmqAutogradError
    ├── ConfigurationError      a setting that cannot work, or is unsafe       (also ValueError)
    ├── SerializationError      a value that cannot travel; nothing was sent   (also TypeError)
    ├── ProtocolError           the peer broke the wire format
    ├── RemoteError             the peer's code raised
    │   └── NotRegistered       the peer offers nothing under that name        (also LookupError)
    ├── WorkerLost              a worker died, froze, left or could not be reached
    ├── DeadlineExceeded        time ran out                                   (also TimeoutError)
    ├── PartialStepError        an optimizer's step that not all workers applied
    ├── ContextError            a context that does not exist, or no longer
    ├── AuthenticationError     the peer's key was refused
    └── ResourceExhausted       a limit or a budget would be passed

Each names the worker that it is about in ``str(e)`` and carries its facts as attributes.  Ground
floor: imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "ZmqAutogradError",
    "ConfigurationError",
    "SerializationError",
    "ProtocolError",
    "RemoteError",
    "NotRegistered",
    "WorkerLost",
    "DeadlineExceeded",
    "PartialStepError",
    "ContextError",
    "AuthenticationError",
    "ResourceExhausted",
]


class ZmqAutogradError(Exception):
    """Base of all errors of this package.

    Attributes:
        worker: name of the worker that the error is about, None if it is about none.
        path: the workers that the error crossed on its way here, nearest first.
    """

    def __init__(
        self, message: str, *, worker: str | None = None, path: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.worker = worker
        self.path = tuple(path)

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} (by way of {' -> '.join(self.path)})" if self.path else text


class ConfigurationError(ZmqAutogradError, ValueError):
    """A setting that cannot work or is unsafe: said before anything is started."""


class SerializationError(ZmqAutogradError, TypeError):
    """A value that cannot travel, found before anything was sent."""


class ProtocolError(ZmqAutogradError):
    """The peer broke the wire format or the order of messages.

    Attributes:
        request_id: the request in which it happened, 0 if that could not be read.
        is_reply: it happened in the reply to that request.
    """

    def __init__(
        self,
        message: str,
        *,
        worker: str | None = None,
        path: Sequence[str] = (),
        request_id: int = 0,
    ) -> None:
        super().__init__(message, worker=worker, path=path)
        self.request_id = request_id
        self.is_reply = False


class RemoteError(ZmqAutogradError):
    """The peer's code raised, in a call or in backward.

    Attributes:
        type_name: name of the exception's type where it was raised, like ``ValueError``.
        message: its text.
        traceback: the remote traceback, None where that worker keeps it to itself.
    """

    def __init__(
        self,
        message: str,
        *,
        type_name: str,
        worker: str,
        traceback: str | None = None,
        path: Sequence[str] = (),
    ) -> None:
        super().__init__(message, worker=worker, path=path)
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        text = f"{self.type_name} on worker {self.worker!r}: {self.message}"
        if len(self.path) > 1:
            text += f" (by way of {' -> '.join(self.path)})"
        if self.traceback:
            text += f"\n\nRemote traceback, worker {self.worker!r}:\n{self.traceback.rstrip()}"
        return text


class NotRegistered(RemoteError, LookupError):
    """The peer offers no function, object or method under that name, or not to us."""


class WorkerLost(ZmqAutogradError):
    """A worker died, froze, left, or could not be reached.

    Attributes:
        name: the worker's name; its endpoint where no handshake told the name.
        incarnation: which life of that worker; empty where no handshake told it.
        reason: what was seen.
    """

    def __init__(
        self, name: str, incarnation: str = "", reason: str = "", *, path: Sequence[str] = ()
    ) -> None:
        life = f" (incarnation {incarnation[:8]})" if incarnation else ""
        super().__init__(f"worker {name!r}{life} is lost: {reason}", worker=name, path=path)
        self.name = name
        self.incarnation = incarnation
        self.reason = reason


class DeadlineExceeded(ZmqAutogradError, TimeoutError):
    """Time ran out.

    Attributes:
        message_ids: ids of the messages still awaited.
        workers: names of the workers still awaited.
    """

    def __init__(
        self,
        message: str,
        *,
        workers: Sequence[str] = (),
        message_ids: Sequence[int] = (),
        path: Sequence[str] = (),
    ) -> None:
        super().__init__(message, worker=workers[0] if workers else None, path=path)
        self.workers = tuple(workers)
        self.message_ids = tuple(message_ids)


class PartialStepError(ZmqAutogradError):
    """An optimizer's step that some workers applied, or may have applied, and others did not.

    Attributes:
        applied: names of the workers whose parameters have been stepped.
        not_applied: of those whose parameters are as they were.
        unknown: of those of which neither is certain: lost or silent meanwhile, or their optimizer
            raised after it had changed something.
        causes: by name, what went wrong on each worker of the last two.
    """

    def __init__(
        self,
        *,
        applied: Sequence[str] = (),
        not_applied: Sequence[str] = (),
        unknown: Sequence[str] = (),
        causes: Mapping[str, BaseException] | None = None,
    ) -> None:
        self.applied = tuple(applied)
        self.not_applied = tuple(not_applied)
        self.unknown = tuple(unknown)
        self.causes = dict(causes or {})
        says = [
            f"{what}: {', '.join(map(self._described, names))}"
            for what, names in (
                ("applied", self.applied),
                ("not applied", self.not_applied),
                ("not known whether it was applied", self.unknown),
            )
            if names
        ]
        first = (*self.not_applied, *self.unknown)[:1]
        super().__init__(
            f"the step did not succeed on every worker; {'; '.join(says)}",
            worker=first[0] if first else None,
        )

    def _described(self, name: str) -> str:
        cause = self.causes.get(name)
        if cause is None:
            return repr(name)
        says = str(cause).partition("\n")[0]  # the rest, a remote traceback say, is the cause's
        return f"{name!r} ({type(cause).__name__}: {says})"


class ContextError(ZmqAutogradError):
    """An autograd context that does not exist here, or can no longer be used.

    Attributes:
        context_id: the context's id, 0 if none was given.
    """

    def __init__(
        self,
        message: str,
        *,
        context_id: int = 0,
        worker: str | None = None,
        path: Sequence[str] = (),
    ) -> None:
        super().__init__(message, worker=worker, path=path)
        self.context_id = context_id


class AuthenticationError(ZmqAutogradError):
    """The peer's key was refused, or ours was."""


class ResourceExhausted(ZmqAutogradError):
    """A limit on size, number or memory would be passed; nothing was lost or half done."""
