"""`encode` and `decode`: round trips of every type, the envelope, and what each refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from dataclasses import fields as dataclass_fields
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings

from tests.unit.wire.wire_samples import ENVELOPES, MESSAGES, messages_of, same
from zmq_autograd.errors import ProtocolError, ResourceExhausted, SerializationError
from zmq_autograd.wire import (
    DEFAULT_LIMITS,
    Buffer,
    Envelope,
    Limits,
    check_fits,
    decode,
    encode,
    open_envelope,
)
from zmq_autograd.wire import messages as m
from zmq_autograd.wire.codec import SCHEMAS

METADATA = m.AutogradMetadata(1, 2)
GRADIENTS = m.PropagateGradientsRequest(METADATA, [torch.tensor([1.0, 2.0]), None])


def header_of(message: m.Message, envelope: Envelope | None = None) -> dict[str, Any]:
    header: dict[str, Any] = msgpack.unpackb(encode(message, envelope or Envelope())[0])
    return header


def refused(header: object, *frames: Buffer, limits: Limits = DEFAULT_LIMITS) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode([msgpack.packb(header), *frames], limits)
    return str(caught.value)


# --- every type ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SCHEMAS, ids=lambda cls: cls.__name__)
def test_every_type_arrives_as_it_was_sent(cls: type[m.Message]) -> None:
    @settings(max_examples=30, deadline=None)
    @given(messages_of(cls))
    def arrives(message: m.Message) -> None:
        assert same(decode(encode(message)), message)

    arrives()


@settings(max_examples=200, deadline=None)
@given(MESSAGES, ENVELOPES)
def test_the_envelope_arrives_as_it_was_written(message: m.Message, envelope: Envelope) -> None:
    frames = encode(message, envelope)
    opened, received = open_envelope([bytes(frame) for frame in frames])
    assert opened == envelope
    assert same(received, message)


def test_the_table_has_every_message_once() -> None:
    named = {value for value in vars(m).values() if isinstance(value, type)}
    types = {cls for cls in named if issubclass(cls, m.Message)}
    assert set(SCHEMAS) == types - {m.Message, m.Request, m.Reply}
    tags = [schema.tag for schema in SCHEMAS.values()]
    assert len(set(tags)) == len(tags)
    for cls, schema in SCHEMAS.items():
        assert {field.name for field in dataclass_fields(cls)} == set(schema.fields)  # type: ignore[arg-type]


def test_every_request_names_a_reply_and_every_reply_is_named() -> None:
    replies = {cls.reply for cls in SCHEMAS if issubclass(cls, m.Request)}
    assert replies | {m.ErrorResponse} == {cls for cls in SCHEMAS if issubclass(cls, m.Reply)}


def test_an_aborted_pass_has_the_whole_cause_that_an_error_response_has() -> None:
    cause = dict(SCHEMAS[m.ErrorResponse].fields)
    del cause["context_id"]  # its own field, of the same name
    del cause["retryable"]  # a pass is not repeated
    fields = dict(SCHEMAS[m.AbortPass].fields)
    del fields["context_id"], fields["pass_id"]
    assert fields == cause


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        m.Cancel(1).cancelled_id = 2  # type: ignore[misc]


def test_ids_and_retain_flag_stand_at_the_top_of_the_header() -> None:
    header = header_of(GRADIENTS)
    assert (header["context_id"], header["message_id"], header["retain_graph"]) == (1, 2, False)


# --- what encode refuses -------------------------------------------------------------------------


class NotAMessage(m.Message):
    pass


HELLO = ("a", "0" * 32)
WRONG_FIELDS: dict[str, Callable[[], m.Message]] = {
    "no message": NotAMessage,
    "negative id": lambda: m.Cancel(-1),
    "id of 65 bits": lambda: m.Cancel(2**64),
    "id of too many digits to print": lambda: m.Cancel(10**5000),
    "bool as id": lambda: m.Cancel(True),
    "float as id": lambda: m.Cancel(1.0),  # type: ignore[arg-type]
    "int as bool": lambda: m.StartPass(1, 2, (), 1),  # type: ignore[arg-type]
    "nil as bool": lambda: m.StartPassResponse(None),  # type: ignore[arg-type]
    "nil as last complete pass": lambda: m.ForwardResponse(committed=None),  # type: ignore[arg-type]
    "int as traceback": lambda: m.AbortPass(1, 2, "c", "t", "o", traceback=5),  # type: ignore[arg-type]
    "a set of ids": lambda: m.AbortPassResponse({1}),  # type: ignore[arg-type]
    "a string as worker": lambda: m.AbortPassResponse((), "bob"),
    "ids that are no list": lambda: m.StartPass(1, 2, 5),  # type: ignore[arg-type]
    "a string as list of strings": lambda: m.Hello(*HELLO, features="abc"),
    "lone surrogate": lambda: m.ForwardRequest("\ud800"),
    "lone surrogate in a value": lambda: m.StatusResponse(["\ud800"]),
    "bytes as name": lambda: m.ForwardRequest(b"f"),  # type: ignore[arg-type]
    "metadata missing": lambda: m.PropagateGradientsRequest(None, []),  # type: ignore[arg-type]
    "metadata of no context": lambda: m.RRefFetchRequest(1, m.AutogradMetadata(0, 5)),
    "gradients that are no list": lambda: m.PropagateGradientsRequest(METADATA, torch.ones(2)),  # type: ignore[arg-type]
    "a number as gradient": lambda: m.PropagateGradientsRequest(METADATA, [0.0]),  # type: ignore[list-item]
    "args missing": lambda: m.ForwardRequest("f", None),  # type: ignore[arg-type]
    "a string as args": lambda: m.ForwardRequest("f", "abc"),
    "kwargs missing": lambda: m.ForwardRequest("f", (), None),  # type: ignore[arg-type]
    "kwargs that are a list": lambda: m.ForwardRequest("f", (), ["a"]),  # type: ignore[arg-type]
    "kwargs with numbers": lambda: m.ForwardRequest("f", (), {1: 2}),  # type: ignore[dict-item]
    "modes missing": lambda: m.ForwardRequest("f", modes=None),  # type: ignore[arg-type]
    "autocast that is no list": lambda: m.ForwardRequest("f", modes=m.Modes(autocast=5)),  # type: ignore[arg-type]
    "limits missing": lambda: m.Hello(*HELLO, limits=None),  # type: ignore[arg-type]
    "heartbeat of 0": lambda: m.Hello(*HELLO, heartbeat=0.0),
    "endless heartbeat": lambda: m.Hello(*HELLO, heartbeat=float("inf")),
    "incarnation of 31 digits": lambda: m.Hello("a", "0" * 31),
    "incarnation in capitals": lambda: m.Hello("a", "A" * 32),
    "version 0": lambda: m.Hello(*HELLO, version=0),
}


@pytest.mark.parametrize("make", WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_field_is_refused_before_anything_is_sent(make: Callable[[], m.Message]) -> None:
    message = make()
    with pytest.raises(SerializationError):
        encode(message)


# --- what decode refuses -------------------------------------------------------------------------


def test_no_frames_are_no_message() -> None:
    with pytest.raises(ProtocolError, match="expected a header frame, got no frame"):
        decode([])


HEADERS_THAT_ARE_NONE = {
    "nothing": b"",
    "a list": b"\x90",
    "two maps": b"\x80\x80",
    "cut off": b"\x81\xa4type",
    "never used byte": b"\xc1",
    "a key twice": b"\x82\xa4type\x42\xa4type\x42",
    "an int as key": b"\x81\x01\x42",
    "bytes as key": b"\x81\xc4\x04type\x42",
    "a list as key": b"\x81\x90\x42",
    "no UTF-8 in a key": b"\x81\xa4typ\xff\x42",
    "no UTF-8 in a string": b"\x82\xa4type\x42\xa1a\xa1\xff",
    "a surrogate in UTF-8": b"\x82\xa4type\x42\xa1a\xa3\xed\xa0\x80",
    "a list of 2^32 - 1": b"\xdd\xff\xff\xff\xff",
    "a map of 2^32 - 1": b"\xdf\xff\xff\xff\xff",
    "a string of 2^32 - 1": b"\xdb\xff\xff\xff\xff",
    "too deep": b"\x91" * 3000,
}


@pytest.mark.parametrize("frame", HEADERS_THAT_ARE_NONE.values(), ids=HEADERS_THAT_ARE_NONE)
def test_a_header_must_be_one_msgpack_map_with_strings_as_keys(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^header"):
        decode([frame])


@pytest.mark.parametrize("tag", [None, 0, -1, 0xFF, 2**64 - 1, "17", 17.0, True, [17], {}])
def test_an_unknown_type_is_refused(tag: object) -> None:
    assert "unknown message type" in refused({"type": tag})


def test_a_missing_type_is_refused() -> None:
    assert "unknown message type" in refused({})


@pytest.mark.parametrize("cls", SCHEMAS, ids=lambda cls: cls.__name__)
def test_an_unknown_or_missing_field_or_an_extra_frame_is_refused(cls: type[m.Message]) -> None:
    @settings(max_examples=3, deadline=None)
    @given(messages_of(cls))
    def refuses(message: m.Message) -> None:
        header, *frames = encode(message)
        fields = msgpack.unpackb(header)
        assert "unknown field 'extra'" in refused({**fields, "extra": 1}, *frames)
        assert "tensor frames" in refused(fields, *frames, b"")
        for name in fields.keys() - {"tensors"}:
            without = {key: value for key, value in fields.items() if key != name}
            assert refused(without, *frames)

    refuses()


@pytest.mark.parametrize("name", ["session_id", "request_id"])
@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, [1]])
def test_the_ids_of_the_envelope_are_checked(name: str, value: object) -> None:
    assert f"field {name!r}" in refused({"type": 0x42, name: value})


@pytest.mark.parametrize(
    "timeout", [float("nan"), float("inf"), -float("inf"), -1, -0.5, True, "1", [1]]
)
def test_a_timeout_must_be_seconds(timeout: object) -> None:
    assert "field 'timeout'" in refused({"type": 0x48, "timeout": timeout})


def test_a_timeout_may_be_none_zero_or_an_int() -> None:
    for timeout in (None, 0, 3, 0.25):
        frame = msgpack.packb({"type": 0x48, "timeout": timeout})
        assert open_envelope([frame])[0].timeout == timeout


def test_an_error_tells_the_request_where_that_could_be_read() -> None:
    for header, request_id, is_reply in [
        ({"type": 0x12, "request_id": 7, "extra": 1}, 7, True),
        ({"type": 0x48, "request_id": 7, "extra": 1}, 7, False),
        ({"type": 0xFF, "request_id": 7}, 7, False),
        ({"type": 0x12, "request_id": -7}, 0, False),
    ]:
        with pytest.raises(ProtocolError) as caught:
            decode([msgpack.packb(header)])
        assert (caught.value.request_id, caught.value.is_reply) == (request_id, is_reply)


def test_metadata_of_no_context_is_refused_where_it_may_be_absent() -> None:
    header = {"type": 0x08, "rref_id": 1, "context_id": 0, "message_id": 2}
    assert "no context" in refused(header)


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [1], [-1], [0, True], [0, 1.0], "0", {}, [[]]])
def test_gradients_must_be_the_tensors_in_order(indices: object) -> None:
    header = header_of(m.PropagateGradientsRequest(METADATA, [torch.ones(1), torch.ones(1)]))
    assert refused({**header, "grads": indices}, b"\0" * 4, b"\0" * 4)


def test_gradients_must_not_require_grad() -> None:
    header = header_of(GRADIENTS)
    header["tensors"] = [["float32", [2], True]]
    assert "require grad" in refused(header, b"\0" * 8)


# --- limits --------------------------------------------------------------------------------------


def test_each_limit_is_refused_at_one_above_and_kept_at_the_limit() -> None:
    frames = encode(m.PropagateGradientsRequest(METADATA, [torch.ones(2), torch.ones(3)]))
    header, total = len(frames[0]), sum(memoryview(frame).nbytes for frame in frames)
    decode(frames, Limits(header, 2, 12, total, 1))
    for limits, text in [
        (Limits(header_bytes=header - 1), f"header of {header} bytes"),
        (Limits(frames=1), "2 tensor frames"),
        (Limits(frame_bytes=11), "frame of 12 bytes"),
        (Limits(message_bytes=total - 1), f"message of {total} bytes"),
    ]:
        with pytest.raises(ProtocolError, match=text):
            decode(frames, limits)
        with pytest.raises(ResourceExhausted, match=f"'bob' would refuse this message: {text}"):
            check_fits(frames, limits, "bob")


def calls_of(frames: list[Buffer]) -> int:
    """Count the calls, of Python and of C functions, that decoding takes."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        decode(frames)
    except ProtocolError:
        pass
    finally:
        sys.setprofile(None)
    return count


def repeated_header(size: int, item: bytes) -> list[Buffer]:
    return [b"\x82\xa4type\x49\xa6status\xdd" + size.to_bytes(4, "big") + item * size]


SHAPES_OF_WORK: dict[str, Callable[[int], list[Buffer]]] = {
    "gradients": lambda n: encode(
        m.PropagateGradientsRequest(METADATA, [torch.ones(1) for _ in range(n)])
    ),
    "undefined": lambda n: encode(m.PropagateGradientsRequest(METADATA, [None] * n)),
    "args": lambda n: encode(m.ForwardRequest("f", [(1, {"a": [2.0]})] * n)),
    "one tensor often": lambda n: encode(m.ForwardRequest("f", [torch.ones(1)] * n)),
    "empty lists": lambda n: repeated_header(n, b"\x90"),
    "empty maps": lambda n: repeated_header(n, b"\x80"),
    "extensions": lambda n: repeated_header(n, b"\xd4\x05\x00"),
    "a big int": lambda n: repeated_header(1, msgpack.packb({"int": b"\x7f" * 100 * n})),
}


@pytest.mark.parametrize("make", SHAPES_OF_WORK.values(), ids=SHAPES_OF_WORK)
def test_work_is_proportional_to_the_input(make: Callable[[int], list[Buffer]]) -> None:
    calls_of(make(10))  # what is done once in a process is no part of it
    small, large = calls_of(make(200)), calls_of(make(800))
    assert large <= 4 * small + 50
