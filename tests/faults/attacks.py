"""What hostile peers do to a port, each as a function that blocks until it has done its worst.

An attack gets the endpoint, a seeded source of randomness, and a stack that keeps open what the
attack wants to hold open while the port is tried by good peers.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final

import torch

from tests.faults import zmtp_peer
from tests.faults.wire_peer import WirePeer
from zmq_autograd import ids
from zmq_autograd.wire import Buffer, Envelope, encode
from zmq_autograd.wire import messages as m
from zmq_autograd.wire.limits import DEFAULT_LIMITS, GIB, KIB

Attack = Callable[[str, random.Random, ExitStack], None]

METADATA: Final = m.AutogradMetadata(2, 3)

SAMPLES: Final[tuple[m.Message, ...]] = (
    m.RRefFetchRequest(1, METADATA),
    m.RRefFetchResponse([1, None]),
    m.RRefDeleteRequest(1, 2),
    m.RRefForkRequest(1, 2),
    m.RRefAcceptRequest(1, 2),
    m.ForwardRequest("double", [torch.ones(3, 2)], {"y": {"a": (1.5, b"z", None, True)}}),
    m.ForwardResponse([torch.ones(5), "text"], METADATA),
    m.PropagateGradientsRequest(METADATA, [torch.ones(4), None, torch.ones(2, 2)], True, 9),
    m.PropagateGradientsResponse(),
    m.CleanupContextRequest(5),
    m.CleanupContextResponse(),
    m.RRefBackwardRequest(1, 2, True),
    m.RRefBackwardResponse(),
    m.ErrorResponse("remote_error", "text", "origin", path=("a", "b"), workers=("c",)),
    m.Hello("mallory", ids.new_incarnation()),
    m.Welcome("mallory", ids.new_incarnation()),
    m.Heartbeat(),
    m.Cancel(7),
    m.StartPass(1, 2, [3, 4], [5], True),
    m.StartPassResponse(),
    m.AbortPass(1, 2, "code", "text", "origin"),
    m.AbortPassResponse(),
    m.CommitPass(1, 2),
    m.CommitPassResponse(),
    m.BackwardRequest(1, 2),
    m.BackwardResponse(),
    m.Status(),
    m.StatusResponse({"a": [1, 2]}),
    m.RRefDeleteResponse(),
    m.RRefForkResponse(),
    m.RRefAcceptResponse(),
)
"""One message of every type."""

ONES: Final = torch.ones(2)


def mutated(frames: list[Buffer], rng: random.Random) -> list[bytes]:
    """Return `frames` with a few bits flipped, bytes lost or added, or frames lost or repeated."""
    changed = [bytearray(frame) for frame in frames]
    for _ in range(rng.randint(1, 3)):
        frame = rng.choice(changed)
        place = rng.randrange(len(frame) + 1)
        kind = rng.randrange(8)
        if kind == 0:
            frame[place:place] = rng.randbytes(rng.randint(1, 8))
        elif kind == 1:
            del frame[place:]
        elif kind == 2:
            changed.insert(rng.randrange(len(changed) + 1), bytearray(frame))
        elif place < len(frame):
            frame[place] ^= 1 << rng.randrange(8)
    return [bytes(frame) for frame in changed]


def connect(endpoint: str, stack: ExitStack) -> socket.socket:
    return stack.enter_context(zmtp_peer.connect(endpoint))


def reset(peer: socket.socket) -> None:
    """End a connection by RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


PARTINGS: Final[list[Callable[[socket.socket], object]]] = [
    reset,
    socket.socket.close,
    lambda _: None,
]
"""How a peer may leave: abruptly, in the ordinary way, or not at all until the end."""


# --- below ZeroMQ's messages ---------------------------------------------------------------------


def random_bytes(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    for _ in range(200):
        peer = connect(endpoint, stack)
        with suppress(ConnectionError):
            peer.sendall(rng.randbytes(rng.randrange(1, 4 * KIB)))
        rng.choice(PARTINGS)(peer)


def half_handshakes(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """Every beginning of a good conversation, broken off in each of three ways."""
    hello = bytes(encode(m.Hello("mallory", ids.new_incarnation()), Envelope(0, 1))[0])
    whole = zmtp_peer.GREETING + zmtp_peer.ready(b"DEALER") + zmtp_peer.frame(hello, more=False)
    for length in range(0, len(whole), 2):
        peer = connect(endpoint, stack)
        with suppress(ConnectionError):
            peer.sendall(whole[:length])
        rng.choice(PARTINGS)(peer)


def http(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    for _ in range(100):
        connect(endpoint, stack).sendall(b"POST / HTTP/1.1\r\nHost: bob\r\n\r\n" + bytes(100))


def drops_of_greetings(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """Many greetings, all of them a byte at a time."""
    peers = [connect(endpoint, stack) for _ in range(200)]
    for byte in zmtp_peer.GREETING:
        for peer in peers:
            with suppress(ConnectionError):
                peer.sendall(bytes([byte]))


def claims_of_gigabytes(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    for _ in range(50):
        peer = connect(endpoint, stack)
        zmtp_peer.shake_hands(peer, b"DEALER")
        peer.sendall(zmtp_peer.claim(GIB) + bytes(100))


# --- below the protocol's messages ---------------------------------------------------------------


def random_frames(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    for _ in range(40):
        with WirePeer(endpoint) as peer:
            if rng.random() < 0.5:
                peer.shake_hands()
            for _ in range(50):
                count = rng.randint(1, 5)
                peer.send_frames([rng.randbytes(rng.randrange(200)) for _ in range(count)])


def mutated_messages(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """Of every type, on their way to being valid: in a session, and at its beginning."""
    for turn in range(60):
        with WirePeer(endpoint) as peer:
            if turn % 6:
                peer.shake_hands()
            for message in rng.sample(SAMPLES, len(SAMPLES)):
                peer.last_id += 1
                frames = encode(message, Envelope(peer.session_id, peer.last_id, 1.0))
                peer.send_frames(mutated(frames, rng))


def huge_headers(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """Too long, too deep, and as many objects as fit."""
    room = DEFAULT_LIMITS.header_bytes - 5
    headers = [
        bytes(2 * room),
        b"\x91" * room,  # lists in lists
        *(b"\xdd" + room.to_bytes(4, "big") + each * room for each in (b"\xc0", b"\x80", b"\x90")),
        b"\xdd" + (room // 2).to_bytes(4, "big") + b"\x81\xa0" * (room // 2),
        b"\xdf" + (room // 2).to_bytes(4, "big") + b"\xa0\xc0" * (room // 2),
        b"\xdd\xff\xff\xff\xff" + bytes(1000),
        b"\xdb\xff\xff\xff\xff" + bytes(1000),
    ]
    with WirePeer(endpoint) as peer:
        peer.shake_hands()
        for header in headers:
            peer.send_frames([header])
            assert isinstance(peer.reply_to(0), m.ErrorResponse)
    for header in headers:
        with WirePeer(endpoint) as stranger:
            stranger.send_frames([header])


def many_tiny_frames(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """One message of 100,000 empty frames, twice: from a peer, and, endless, from a stranger."""
    with WirePeer(endpoint) as peer:
        peer.shake_hands()
        peer.send_frames([b""] * 100_000)
        peer.reply_to(0)
    stranger = connect(endpoint, stack)
    zmtp_peer.shake_hands(stranger, b"DEALER")
    zmtp_peer.pour(stranger, zmtp_peer.frame(b"", more=True) * 100_000, 100)


# --- messages that are valid one by one ----------------------------------------------------------


def no_hello(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    for message in SAMPLES:
        if not isinstance(message, m.Hello):
            peer = stack.enter_context(WirePeer(endpoint))
            for _ in range(10):
                peer.request(message)


def hellos(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """Again and again in one session, and in many that are left at once."""
    with WirePeer(endpoint) as peer:
        peer.shake_hands()
        for _ in range(3000):
            peer.request(m.Hello(peer.name, ids.new_incarnation()))
        peer.reply_to(peer.last_id)
    for _ in range(100):
        with WirePeer(endpoint) as guest:
            guest.shake_hands()


def many_sessions(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    for _ in range(150):
        stack.enter_context(WirePeer(endpoint)).shake_hands()


def replies_to_nothing(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    for message in SAMPLES:
        if isinstance(message, m.Reply):
            for request_id in (0, 1, 2**64 - 1):
                with WirePeer(endpoint) as peer:
                    peer.shake_hands()
                    for _ in range(10):
                        peer.send(message, Envelope(peer.session_id, request_id))


def cancels(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """Of nothing, and of requests just sent."""
    with WirePeer(endpoint) as peer:
        peer.shake_hands()
        for _ in range(20_000):
            peer.send(m.Cancel(rng.choice([0, 1, 2**64 - 1])), Envelope(peer.session_id))
        for _ in range(3000):
            request_id = peer.request(m.ForwardRequest("wait"))
            peer.send(m.Cancel(request_id), Envelope(peer.session_id))
        peer.reply_to(peer.request(m.Status()))


def requests_cancelled_in_threads(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """A thread goes on when nobody awaits what it computes: how many can be had for nothing?"""
    with WirePeer(endpoint) as peer:
        peer.shake_hands()
        for _ in range(6):
            wanted = [peer.request(m.ForwardRequest("hold")) for _ in range(250)]
            # Answered when the others have been started: their threads run from here on.
            assert isinstance(peer.reply_to(peer.request(m.Status())), m.StatusResponse)
            for request_id in wanted:
                peer.send(m.Cancel(request_id), Envelope(peer.session_id))
        refused = peer.reply_to(peer.request(m.ForwardRequest("finish", [0.0])))
        assert isinstance(refused, m.ErrorResponse)
        assert refused.code == "resource_exhausted"
        peer.request(m.ForwardRequest("let_go"))
        # Until the threads have done what nobody awaits.
        while isinstance(refused, m.ErrorResponse):
            refused = peer.reply_to(peer.request(m.ForwardRequest("finish", [0.0])))


def requests_without_reading(endpoint: str, rng: random.Random, stack: ExitStack) -> None:
    """Ask for 5 GiB, and take none of it."""
    peer = stack.enter_context(WirePeer(endpoint, rcvhwm=1, rcvbuf=4 * KIB))
    peer.shake_hands()
    for _ in range(50_000):
        peer.request(m.ForwardRequest("zeros", [100 * KIB]))
