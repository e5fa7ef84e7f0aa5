"""Messages to frames and back: two pure functions and one visible table.

Frame 0 is the header, a msgpack map with string keys: ``type`` (the tag), the `Envelope`'s fields
where they are not 0, the message's own fields by name, and, where tensors follow, ``tensors`` with
one spec for each of the raw frames.  ``docs/protocol.md`` is the specification.

Whatever arrives, `decode` returns a message or raises `ProtocolError`, in time proportional to the
input, and checks every length before it allocates anything of that length.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgpack

from zmq_autograd.errors import ProtocolError, ResourceExhausted, SerializationError
from zmq_autograd.ids import MAX_ID
from zmq_autograd.wire import fields as f
from zmq_autograd.wire import messages as m
from zmq_autograd.wire.limits import DEFAULT_LIMITS, KIB, MAX_CONTAINERS, Limits, short
from zmq_autograd.wire.tensors import TensorReader, TensorWriter

# Anything with the buffer protocol; `collections.abc.Buffer` needs Python 3.12.
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a session writes on a message.

    Attributes:
        session_id: the session it belongs to, 0 before there is one.
        request_id: of a request, its own; of a reply, the request's; 0 on one-way messages.
        timeout: seconds that the receiver of a request has left to reply, None for no limit.
    """

    session_id: int = 0
    request_id: int = 0
    timeout: float | None = None


NO_ENVELOPE: Final = Envelope()


@dataclass(frozen=True, slots=True)
class Schema:
    """How one type of message stands in the header: its tag, and its fields in order."""

    tag: int
    fields: dict[str, f.Field]


# Tags below 0x40 are torch's own numbers for the same messages (`MessageType`).
SCHEMAS: Final[dict[type[m.Message], Schema]] = {
    m.RRefFetchRequest: Schema(
        0x08,
        {
            "rref_id": f.ID,
            "metadata": f.OPTIONAL_METADATA,
            "committed": f.ID,
            "from_owner": f.BOOL,
        },
    ),
    m.RRefFetchResponse: Schema(
        0x0A, {"value": f.VALUE, "metadata": f.OPTIONAL_METADATA, "committed": f.ID}
    ),
    m.RRefDeleteRequest: Schema(0x0B, {"rref_id": f.ID, "fork_id": f.ID}),
    m.RRefForkRequest: Schema(0x0C, {"rref_id": f.ID, "fork_id": f.ID}),
    m.RRefAcceptRequest: Schema(0x0D, {"rref_id": f.ID, "fork_id": f.ID}),
    m.ForwardRequest: Schema(
        0x0F,
        {
            "function": f.STRING,
            "args": f.ARGS,
            "kwargs": f.KWARGS,
            "metadata": f.OPTIONAL_METADATA,
            "modes": f.MODES,
            "profiler": f.VALUE,
            "committed": f.ID,
            "from_owner": f.BOOL,
            "target_id": f.ID,
            "keep": f.BOOL,
        },
    ),
    m.ForwardResponse: Schema(
        0x10,
        {
            "result": f.VALUE,
            "metadata": f.OPTIONAL_METADATA,
            "profiler_events": f.VALUE,
            "committed": f.ID,
        },
    ),
    m.PropagateGradientsRequest: Schema(
        0x11,
        {
            "metadata": f.METADATA,
            "retain_graph": f.BOOL,
            "pass_id": f.ID,
            "grads": f.GRADIENTS,
        },
    ),
    m.PropagateGradientsResponse: Schema(0x12, {}),
    m.CleanupContextRequest: Schema(
        0x13, {"context_id": f.ID, "committed": f.ID, "lost": f.STRING}
    ),
    m.CleanupContextResponse: Schema(0x14, {}),
    m.RRefBackwardRequest: Schema(
        0x17,
        {
            "rref_id": f.ID,
            "context_id": f.ID,
            "retain_graph": f.BOOL,
            "accumulate_grad": f.BOOL,
            "check_nan": f.OPTIONAL_BOOL,
        },
    ),
    m.RRefBackwardResponse: Schema(0x18, {"committed": f.ID}),
    m.ErrorResponse: Schema(
        0x37,
        {
            "code": f.STRING,
            "text": f.STRING,
            "origin": f.STRING,
            "type_name": f.STRING,
            "traceback": f.OPTIONAL_STRING,
            "path": f.STRINGS,
            "incarnation": f.STRING,
            "context_id": f.ID,
            "message_ids": f.IDS,
            "workers": f.STRINGS,
            "retryable": f.BOOL,
        },
    ),
    m.Hello: Schema(0x40, f.HANDSHAKE),
    m.Welcome: Schema(0x41, f.HANDSHAKE),
    m.Heartbeat: Schema(0x42, {}),
    m.Cancel: Schema(0x43, {"cancelled_id": f.ID}),
    m.StartPass: Schema(
        0x44,
        {
            "context_id": f.ID,
            "pass_id": f.ID,
            "message_ids": f.IDS,
            "awaited_ids": f.IDS,
            "retain_graph": f.BOOL,
            "inputs_only": f.BOOL,
            "accumulate_grad": f.BOOL,
            "committed": f.ID,
            "asked_id": f.ID,
            "check_nan": f.OPTIONAL_BOOL,
        },
    ),
    m.StartPassResponse: Schema(0x45, {"is_complete": f.BOOL, "takes_part": f.BOOL}),
    m.AbortPass: Schema(
        0x46,
        {
            "context_id": f.ID,
            "pass_id": f.ID,
            "code": f.STRING,
            "text": f.STRING,
            "origin": f.STRING,
            "type_name": f.STRING,
            "traceback": f.OPTIONAL_STRING,
            "path": f.STRINGS,
            "incarnation": f.STRING,
            "message_ids": f.IDS,
            "workers": f.STRINGS,
        },
    ),
    m.AbortPassResponse: Schema(0x47, {"message_ids": f.IDS, "workers": f.STRINGS}),
    m.Status: Schema(0x48, {}),
    m.StatusResponse: Schema(0x49, {"status": f.VALUE}),
    m.RRefDeleteResponse: Schema(0x4A, {}),
    m.RRefForkResponse: Schema(0x4B, {}),
    m.RRefAcceptResponse: Schema(0x4C, {}),
    m.CommitPass: Schema(0x4D, {"context_id": f.ID, "committed": f.ID}),
    m.CommitPassResponse: Schema(0x4E, {}),
    m.BackwardRequest: Schema(
        0x4F,
        {
            "context_id": f.ID,
            "asked_id": f.ID,
            "retain_graph": f.BOOL,
            "inputs_only": f.BOOL,
            "accumulate_grad": f.BOOL,
            "check_nan": f.OPTIONAL_BOOL,
        },
    ),
    m.BackwardResponse: Schema(0x50, {"pass_id": f.ID}),
}

_LARGE_HEADER: Final = 16 * KIB

_TYPES: Final = {schema.tag: (cls, schema) for cls, schema in SCHEMAS.items()}


def encode(message: m.Message, envelope: Envelope = NO_ENVELOPE) -> list[Buffer]:
    """Return the frames of `message`: the header and one raw frame per defined tensor.

    A frame that is a read-only buffer is private: nobody can write to it any more.  A writable one
    is the tensor's own memory, seen without a copy: send or copy it before the tensor is written.

    Raises:
        SerializationError: a field holds what its type does not allow, or what cannot travel.
    """
    schema = SCHEMAS.get(type(message))
    if schema is None:
        raise SerializationError(
            f"expected a message of zmq_autograd.messages, got {type(message).__name__}"
        )
    tensors = TensorWriter()
    header: dict[str, Any] = {"type": schema.tag}
    if envelope.session_id:
        header["session_id"] = envelope.session_id
    if envelope.request_id:
        header["request_id"] = envelope.request_id
    if envelope.timeout is not None:
        header["timeout"] = envelope.timeout
    for name, field in schema.fields.items():
        field.pack(header, name, getattr(message, name), tensors)
    if tensors.specs:
        header["tensors"] = tensors.specs
    try:
        frame = msgpack.packb(header)
    except (ValueError, OverflowError) as error:  # a lone surrogate, an id that is too large
        raise SerializationError(f"{type(message).__name__} cannot travel: {error}") from error
    return [frame, *tensors.frames]


def decode(
    frames: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS, *, adopt: bool = False
) -> m.Message:
    """Return the message in `frames`; see `open_envelope`."""
    return open_envelope(frames, limits, adopt=adopt)[1]


def open_envelope(
    frames: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS, *, adopt: bool = False
) -> tuple[Envelope, m.Message]:
    """Return the message in `frames` and what the session wrote on it.

    Its tensors are writable, aligned, contiguous CPU tensors that own their memory.

    Args:
        frames: the header, then one raw frame per tensor, as bytes-like objects.
        limits: what to refuse; nothing larger is allocated.
        adopt: the caller gives the frames away: large writable ones become tensors' memory
            without a copy.

    Raises:
        ProtocolError: the frames are no message of this protocol, or pass the limits.  Its
            `request_id` and `is_reply` are set where the header could be read that far.
    """
    views = [memoryview(frame).cast("B") for frame in frames]
    check_sizes([view.nbytes for view in views], limits)
    if views[0].nbytes < _LARGE_HEADER:
        return _open(views, limits, adopt=adopt)
    with _collection_paused():
        return _open(views, limits, adopt=adopt)


def _open(
    views: Sequence[memoryview], limits: Limits, *, adopt: bool
) -> tuple[Envelope, m.Message]:
    header = _open_header(views[0])
    envelope = NO_ENVELOPE
    is_reply = False
    try:
        envelope = _take_envelope(header)
        tag = header.pop("type", None)
        cls, schema = _TYPES.get(tag, (None, None)) if type(tag) is int else (None, None)
        if cls is None or schema is None:
            raise ProtocolError(f"unknown message type {short(tag)}")
        is_reply = issubclass(cls, m.Reply)
        tensors = TensorReader(header.pop("tensors", []), views[1:], limits, adopt=adopt)
        values = [field.unpack(header, name, tensors) for name, field in schema.fields.items()]
        if header:
            raise ProtocolError(f"{cls.__name__}: unknown field {short(next(iter(header)))}")
        tensors.check_all_taken()
    except ProtocolError as error:
        error.request_id = error.request_id or envelope.request_id
        error.is_reply = is_reply
        raise
    return envelope, cls(**dict(zip(schema.fields, values, strict=True)))


def check_sizes(sizes: Sequence[int], limits: Limits) -> None:
    """Raise ProtocolError if frames of these `sizes`, in bytes, are no message within `limits`."""
    if not sizes:
        raise ProtocolError("expected a header frame, got no frame")
    if sizes[0] > limits.header_bytes:
        raise ProtocolError(f"header of {sizes[0]} bytes passes the limit of {limits.header_bytes}")
    if len(sizes) - 1 > limits.frames:
        raise ProtocolError(f"{len(sizes) - 1} tensor frames pass the limit of {limits.frames}")
    if max(sizes[1:], default=0) > limits.frame_bytes:
        raise ProtocolError(
            f"frame of {max(sizes[1:])} bytes passes the limit of {limits.frame_bytes}"
        )
    if sum(sizes) > limits.message_bytes:
        raise ProtocolError(
            f"message of {sum(sizes)} bytes passes the limit of {limits.message_bytes}"
        )


def check_fits(frames: Sequence[Buffer], limits: Limits, worker: str) -> None:
    """Raise ResourceExhausted if `worker`, whose limits these are, would refuse `frames`."""
    try:
        check_sizes([memoryview(frame).nbytes for frame in frames], limits)
    except ProtocolError as error:
        raise ResourceExhausted(
            f"worker {worker!r} would refuse this message: {error}", worker=worker
        ) from None


def _open_header(frame: memoryview) -> dict[str, Any]:
    try:
        _check_complete(frame)
        header = msgpack.unpackb(frame, object_pairs_hook=partial(_unique, itertools.count(1)))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"header is no msgpack map with string keys: {error}") from error
    if type(header) is not dict:
        raise ProtocolError(f"header: expected a map, got {type(header).__name__}")
    return header


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Keep the garbage collector from running meanwhile.

    Thousands of new lists would have it walk through every object of the process, again and again:
    with torch loaded, seconds of the event loop for a header of 1 MiB.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_complete(frame: memoryview) -> None:
    """Raise what msgpack raises if lengths in `frame` claim more than follows, making nothing.

    `unpackb` allocates by the claim, once for each list inside another: megabytes for kilobytes.
    """
    scanner = msgpack.Unpacker(max_buffer_size=frame.nbytes, read_size=frame.nbytes)
    scanner.feed(frame)
    scanner.skip()


def _unique(maps: Iterator[int], pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs of a msgpack map, which must have string keys, each once.

    `maps` counts them: they are what `values` bounds and a few more.
    """
    if next(maps) > 2 * MAX_CONTAINERS:
        raise ProtocolError(f"header has more than {2 * MAX_CONTAINERS} maps")
    if any(type(key) is not str for key, _ in pairs):
        raise ProtocolError("header has a key that is no string")
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ProtocolError("header has the same key twice")
    return made


def _take_envelope(header: dict[str, Any]) -> Envelope:
    session_id = header.pop("session_id", 0)
    request_id = header.pop("request_id", 0)
    timeout = header.pop("timeout", None)
    for name, value in (("session_id", session_id), ("request_id", request_id)):
        if type(value) is not int or not 0 <= value <= MAX_ID:
            raise ProtocolError(f"field {name!r}: expected an unsigned 64-bit int")
    if timeout is not None and not (
        type(timeout) in (int, float) and math.isfinite(timeout) and timeout >= 0
    ):
        problem = f"field 'timeout': expected seconds >= 0, got {short(timeout)}"
        raise ProtocolError(problem, request_id=request_id)
    return Envelope(session_id, request_id, timeout)
