"""Any bytes at all into `decode`: a message or ProtocolError, and nothing else.

Warnings count as failures, as everywhere in these tests; what was accepted must survive being sent
again.  Batches name the seed that they were drawn from.
"""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.wire.wire_samples import ENVELOPES, MESSAGES, decoded_or_refused
from zmq_autograd.errors import ProtocolError
from zmq_autograd.wire import Envelope, Limits, decode, encode
from zmq_autograd.wire import messages as m
from zmq_autograd.wire.codec import SCHEMAS
from zmq_autograd.wire.tensors import DTYPES

LIMITS = Limits(header_bytes=2**16, frames=16, frame_bytes=2**16, message_bytes=2**18)

SOAK = settings(max_examples=100_000, deadline=None, suppress_health_check=list(HealthCheck))
QUICK = settings(max_examples=2_500, deadline=None, suppress_health_check=list(HealthCheck))

# --- random bytes --------------------------------------------------------------------------------

RANDOM_FRAMES = st.lists(st.binary(max_size=64), max_size=4)


@QUICK
@given(RANDOM_FRAMES)
def test_random_bytes(frames: list[bytes]) -> None:
    decoded_or_refused(frames, LIMITS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@SOAK
@given(RANDOM_FRAMES)
def test_random_bytes_for_long(frames: list[bytes]) -> None:
    decoded_or_refused(frames, LIMITS)


# --- headers of the right form with the wrong things in them -------------------------------------

NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, 2, 7, -1, 2**31, 2**32, 2**48, 2**48 + 1, 2**63, 2**64 - 1]),
    st.booleans(),
    st.floats(),
)
DTYPE_NAMES = st.sampled_from([*DTYPES, "float", "qint8", "torch.float32", ""])
TIMESTAMPS = st.builds(
    msgpack.Timestamp, st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**9 - 1)
)
EXTENSIONS = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=9))
SPECS = st.tuples(DTYPE_NAMES, st.lists(st.integers(0, 3) | NUMBERS, max_size=4), st.booleans())
ATOMS = st.one_of(
    st.none(), NUMBERS, st.text(max_size=4), st.binary(max_size=10), EXTENSIONS, TIMESTAMPS
)
TAGS = st.sampled_from(["tensor", "sparse", "tuple", "dict", "complex", "int", "other"])
JUNK = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(TAGS | st.text(max_size=3), inner, max_size=2),
        st.lists(st.tuples(inner, inner), max_size=3).map(lambda pairs: {"dict": pairs}),
    ),
    max_leaves=8,
)
NAMES = sorted(
    {name for schema in SCHEMAS.values() for name in schema.fields}
    | {"context_id", "message_id", "session_id", "request_id", "timeout", "tensors", "type", "x"}
)


@st.composite
def junk_headers(draw: st.DrawFn) -> list[bytes]:
    """Draw a message whose header was changed in some fields, and whose frames may not fit it."""
    header, *frames = encode(draw(MESSAGES), draw(ENVELOPES))
    fields: dict[str, Any] = msgpack.unpackb(header)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(fields) or NAMES) | st.sampled_from(NAMES))
        match draw(st.integers(0, 3)):
            case 0:
                fields.pop(name, None)
            case 1:
                fields["tensors"] = draw(st.lists(SPECS, max_size=3))
            case 2:
                fields["type"] = draw(st.sampled_from([s.tag for s in SCHEMAS.values()]))
            case _:
                fields[name] = draw(JUNK)
    packed = [msgpack.packb(fields), *map(bytes, frames)]
    if draw(st.booleans()):
        packed += draw(st.lists(st.binary(max_size=16), max_size=2))
    return packed


@QUICK
@given(junk_headers())
def test_headers_with_the_wrong_things_in_them(frames: list[bytes]) -> None:
    decoded_or_refused(frames, LIMITS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@SOAK
@given(junk_headers())
def test_headers_with_the_wrong_things_in_them_for_long(frames: list[bytes]) -> None:
    decoded_or_refused(frames, LIMITS)


# --- good messages, damaged ----------------------------------------------------------------------

MARKERS = bytes([0x00, 0x01, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE1), 0xFF])


def damaged(frames: Sequence[bytes], source: random.Random) -> list[bytes]:
    """Return the frames with some bytes or frames changed, inserted, deleted, cut off or moved."""
    changed = [bytearray(frame) for frame in frames]
    for _ in range(source.randint(1, 3)):
        if changed and source.random() < 0.75:
            # The header is where most of the decisions are.
            damage_bytes(changed[0] if source.random() < 0.7 else source.choice(changed), source)
        else:
            damage_order(changed, source)
    return [bytes(frame) for frame in changed]


def damage_bytes(frame: bytearray, source: random.Random) -> None:
    at = source.randrange(len(frame) + 1)
    match source.randrange(5):
        case 0 if at < len(frame):
            frame[at] ^= 1 << source.randrange(8)
        case 1 if at < len(frame):
            frame[at] = source.choice(MARKERS)
        case 2:
            frame[at:at] = source.randbytes(source.randint(1, 9))
        case 3:
            del frame[at : at + source.randint(1, 9)]
        case _:
            del frame[at:]


def damage_order(frames: list[bytearray], source: random.Random) -> None:
    match source.randrange(4):
        case 0 if frames:
            frames.pop(source.randrange(len(frames)))
        case 1 if frames:
            frames.append(bytearray(source.choice(frames)))
        case 2:
            frames.append(bytearray(source.randbytes(source.randint(0, 9))))
        case _:
            source.shuffle(frames)


def good_messages() -> list[list[bytes]]:
    """Return frames of every type, with what has most ways to be damaged several times."""
    tensors = [
        torch.ones(2, 3),
        torch.tensor(True),
        torch.zeros(0, 5, dtype=torch.bfloat16),
        torch.ones(6, dtype=torch.float16).view(torch.complex32),
        torch.eye(2, 3).to_sparse(),
    ]
    value = {"a": (1, [2.5, None, tensors[1]]), 3: 2**70, b"k": 1j, "t": tensors[0]}
    value["s"] = tensors[4]
    incarnation = "0123456789abcdef" * 2
    metadata = m.AutogradMetadata(2**63, 300)
    rich: list[m.Message] = [
        m.ForwardRequest("f", (value, "x" * 40, *tensors), {"k": value}, metadata, committed=2**63),
        m.ForwardResponse(value, metadata, committed=300),
        m.PropagateGradientsRequest(metadata, [tensors[0], None, *tensors[2:]], True, 9),
        m.RRefFetchResponse(value),
        m.StatusResponse(value),
        m.Hello("alice", incarnation, features=("a", "b")),
        m.Welcome("bob", incarnation),
        m.ErrorResponse("worker_lost", "text", "bob", path=("a", "b"), message_ids=(1, 2**64 - 1)),
        m.StartPass(1, 2, (3, 4, 500), accumulate_grad=True, committed=2**64 - 1),
        m.AbortPass(1, 2, "remote_error", "text", "bob", "E", "trace", ("a", "b"), workers=("c",)),
        m.AbortPassResponse((3, 2**64 - 1), ("a", "b")),
    ]
    plain: list[m.Message] = [
        m.Cancel(1),
        m.Heartbeat(),
        m.Status(),
        m.CleanupContextRequest(1, 2),
        m.StartPassResponse(False),
        m.CommitPass(1, 2),
        m.BackwardRequest(1, 2, inputs_only=True),
        m.RRefFetchRequest(1, metadata),
        m.RRefForkRequest(1, 2),
        m.RRefBackwardRequest(1, 2),
        m.PropagateGradientsResponse(),
    ]
    messages = [*rich, *rich, *rich, *plain]
    return [[bytes(f) for f in encode(message, Envelope(5, 6, 1.5))] for message in messages]


def survive_damage(seed: int, cases: int) -> int:
    """Decode `cases` damaged messages; return how many were accepted."""
    source = random.Random(seed)
    messages = good_messages()
    accepted = 0
    for case in range(cases):
        frames = damaged(source.choice(messages), source)
        try:
            accepted += decoded_or_refused(frames, LIMITS) is not None
        except Exception as error:
            error.add_note(f"seed {seed}, case {case}: {[frame.hex() for frame in frames]}")
            raise
    return accepted


@pytest.mark.parametrize("seed", range(8))
def test_damaged_messages(seed: int) -> None:
    accepted = survive_damage(seed, 4_000)
    assert 0 < accepted < 2_000  # damage that always or never matters would show nothing


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_damaged_messages_for_long() -> None:
    seed = random.SystemRandom().getrandbits(32)
    for offset in range(1_000):
        survive_damage(seed + offset, 4_000)


# --- what claims to be large ---------------------------------------------------------------------

CLAIMS = {
    "arrays": b"\xdd\xff\xff\xff\xff",
    "arrays of the buffer's size": b"\xdd\x00\x0f\xff\x00",
    "short arrays": b"\xdc\xff\xff",
    "maps": b"\xdf\x00\x07\xff\x00",
    "extensions": b"\xc9\xff\xff\xff\xff\x01",
    "strings": b"\xdb\xff\xff\xff\xff",
    "bytes": b"\xc6\xff\xff\xff\xff",
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
@pytest.mark.parametrize("depth", [3, 500, 1000])
def test_claimed_lengths_cost_no_memory(claim: bytes, depth: int) -> None:
    size = 2**20
    frame = (claim * depth)[:size].ljust(size, b"\xc0")
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode([frame])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size


def test_a_header_of_the_largest_size_costs_memory_in_proportion() -> None:
    size = 2**17
    for item in (b"\xc0", b"\x00", b"\xa0"):
        frame = b"\x82\xa4type\x49\xa6status\xdd" + size.to_bytes(4, "big") + item * size
        tracemalloc.start()
        try:
            decode([frame])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 256 * size


def test_a_large_header_does_not_set_off_the_garbage_collector() -> None:
    size = 2**17
    frame = b"\x82\xa4type\x49\xa6status\xdd" + size.to_bytes(4, "big") + b"\x90" * size
    collections: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        collections.append(phase)

    gc.callbacks.append(note)
    try:
        with pytest.raises(ProtocolError, match="more than 16384 lists"):
            decode([frame])
        while_paused = list(collections)
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()
    # One may follow when the collector is back, not one for every few hundred lists.
    assert len(while_paused) <= 4
