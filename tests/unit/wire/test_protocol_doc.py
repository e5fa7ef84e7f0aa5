"""``docs/protocol.md`` says what the code does: its tables, and the bytes of every example.

The examples in the document are the pinned bytes of the wire: each must be what `encode` makes, and
`decode` must make the message of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from tests.unit.wire.wire_samples import same
from zmq_autograd import wire
from zmq_autograd.session import failures
from zmq_autograd.wire import Envelope, Limits, encode, limits, messages, open_envelope
from zmq_autograd.wire import fields as f
from zmq_autograd.wire.codec import SCHEMAS
from zmq_autograd.wire.tensors import DTYPES

DOCUMENT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")

TYPES_OF_FIELDS = {
    f.ID: "id",
    f.BOOL: "bool",
    f.OPTIONAL_BOOL: "bool or nil",
    f.STRING: "string",
    f.OPTIONAL_STRING: "string or nil",
    f.STRINGS: "strings",
    f.IDS: "ids",
    f.VALUE: "value",
    f.ARGS: "values",
    f.KWARGS: "named values",
    f.GRADIENTS: "gradients",
    f.MODES: "modes",
    f.HANDSHAKE["version"]: "version",
    f.HANDSHAKE["incarnation"]: "incarnation",
    f.HANDSHAKE["limits"]: "limits",
    f.HANDSHAKE["heartbeat"]: "seconds",
}


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in `text`, without the heads."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    cells = [[cell.strip().strip("`") for cell in line.split("|")] for line in lines]
    heads = {i for i, row in enumerate(cells[1:]) if set(row[0]) == {"-"}}
    return [row for i, row in enumerate(cells) if i not in heads and i - 1 not in heads]


def section(title: str) -> str:
    """Return what stands between a heading and the next one of any level."""
    found = re.search(
        rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL
    )
    assert found, f"no section {title!r}"
    return found[1]


@dataclass(frozen=True)
class Described:
    """What the document says of one type of message."""

    tag: int
    kind: str
    reply: str | None
    fields: list[list[str]]
    python: list[str]
    pinned: str


def described(name: str) -> Described:
    tag, text = re.search(
        rf"^#### 0x(..) {name}\n(.*?)(?=^#+ |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL
    ).groups()  # type: ignore[union-attr]
    kind = re.search(r"\*(Request|Reply|One way)\*", text)
    reply = re.search(r"[Ee]nded by `(\w+)`", text)
    python = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    pinned = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert kind
    assert python
    assert pinned
    return Described(
        int(tag, 16),
        kind[1],
        reply and reply[1],
        rows(text),
        python[1].splitlines(),
        pinned[1],
    )


def frames_in(text: str) -> list[bytes]:
    """Return the frames in a block: lines of hex after ``frame N``, with comments after #."""
    frames = []
    for number, part in enumerate(re.split(r"^frame \d+\n", text, flags=re.MULTILINE)[1:]):
        assert f"frame {number}\n" in text
        frames.append(bytes.fromhex("".join(line.split("#")[0] for line in part.splitlines())))
    return frames


def spelled(value: Any) -> str:
    """Return `value` as the comments in the examples write it."""
    match value:
        case None:
            return "nil"
        case bytes():
            return f'"bytes {value.hex()}"'
        case list():
            return f"[{', '.join(map(spelled, value))}]"
        case dict():
            return f"{{{', '.join(f'{spelled(key)}: {spelled(value[key])}' for key in value)}}}"
    return json.dumps(value)


def test_every_type_is_described_once_and_nothing_else_is() -> None:
    headings = re.findall(r"^#### 0x\w\w (\w+)$", DOCUMENT, re.MULTILINE)
    assert sorted(headings) == sorted(cls.__name__ for cls in SCHEMAS)


@pytest.mark.parametrize("cls", SCHEMAS, ids=lambda cls: cls.__name__)
def test_the_example_of_each_type_is_what_travels_both_ways(cls: type[messages.Message]) -> None:
    written = described(cls.__name__)
    names = {**vars(messages), "torch": torch, "Envelope": Envelope}
    message, *envelopes = (eval(line, names) for line in written.python)  # noqa: S307  # our own text
    envelope = envelopes[0] if envelopes else Envelope()
    frames = frames_in(written.pinned)
    assert type(message) is cls
    assert [bytes(frame).hex() for frame in encode(message, envelope)] == [
        frame.hex() for frame in frames
    ]
    opened, received = open_envelope(frames)
    assert opened == envelope
    assert same(received, message)


@pytest.mark.parametrize("cls", SCHEMAS, ids=lambda cls: cls.__name__)
def test_the_comments_in_the_example_of_each_type_are_true(cls: type[messages.Message]) -> None:
    header = described(cls.__name__).pinned.split("frame 1\n")[0]
    for line in header.removeprefix("frame 0\n").splitlines():
        data, comment = line.split("  # ")
        if found := re.fullmatch(r"a map of (\d+)", comment):
            assert bytes.fromhex(data) == bytes([0x80 + int(found[1])])
            continue
        unpacker = msgpack.Unpacker()
        unpacker.feed(bytes.fromhex(data))
        name, *value = unpacker
        # A map that is split into lines of its own follows its name.
        assert comment == " ".join([f"{spelled(name)}:", *map(spelled, value)])


@pytest.mark.parametrize("cls", SCHEMAS, ids=lambda cls: cls.__name__)
def test_the_table_of_each_type_is_the_codecs(cls: type[messages.Message]) -> None:
    written = described(cls.__name__)
    expected = []
    for name, field in SCHEMAS[cls].fields.items():
        if field in (f.METADATA, f.OPTIONAL_METADATA):
            expected += [["context_id", "id"], ["message_id", "id"]]
        else:
            expected.append([name, TYPES_OF_FIELDS[field]])
    assert written.tag == SCHEMAS[cls].tag
    assert [row[:2] for row in written.fields] == expected
    assert all(len(row) == 3 and row[2] for row in written.fields)
    if issubclass(cls, messages.Request):
        assert (written.kind, written.reply) == ("Request", cls.reply.__name__)
    else:
        assert written.kind == ("Reply" if issubclass(cls, messages.Reply) else "One way")
        assert written.reply is None


def test_every_type_of_field_is_explained() -> None:
    explained = {row[0] for row in rows(section("Types of fields"))}
    assert explained == set(TYPES_OF_FIELDS.values())


def test_dtypes_and_their_sizes() -> None:
    written = {name: int(size) for name, size in rows(section("Tensors"))}
    known = {name: size for name, size in written.items() if hasattr(torch, name)}
    assert known == {name: dtype.itemsize for name, dtype in DTYPES.items()}


def test_limits_and_their_defaults() -> None:
    bounds = {row[0]: int(row[1]) for row in rows(section("Limits"))}
    for field in fields(Limits):
        assert bounds.pop(field.name) == field.default
    assert bounds == {
        name: value for name, value in vars(limits).items() if name.startswith("MAX_")
    }


def test_the_example_of_a_sparse_tensor() -> None:
    text = section("Sparse tensors")
    python, pinned = re.findall(r"```(?:python|text)\n(.*?)```", text, re.DOTALL)
    message = eval(python, {**vars(messages), "torch": torch})  # noqa: S307  # our own text
    frames = frames_in(pinned)
    assert [bytes(frame).hex() for frame in encode(message)] == [frame.hex() for frame in frames]
    assert same(open_envelope(frames)[1], message)


def test_version() -> None:
    assert f"This is version {messages.PROTOCOL_VERSION}." in DOCUMENT


def test_error_codes() -> None:
    codes = [row[0] for row in rows(section("Error codes"))]
    assert sorted(codes) == sorted(failures._CODES.values())


def test_the_example_in_the_packages_docstring() -> None:
    message = messages.PropagateGradientsRequest(
        messages.AutogradMetadata(1, 2), [torch.tensor([1.0, 2.0]), None]
    )
    pieces = re.findall(
        r"^ +(?:frame \d)? +((?:[0-9a-f]{2,} )*[0-9a-f]{2,})(?: {2}|$)", str(wire.__doc__), re.M
    )
    assert bytes.fromhex("".join(pieces)) == b"".join(bytes(frame) for frame in encode(message))
