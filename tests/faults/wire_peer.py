"""Peers made of pyzmq and the wire alone, which need not keep to the protocol above it.

They take messages of every type from the package, and block, so that attacks run in threads.  The
peer of `tests.integration.helpers_bare_peer`, which tries the specification, knows neither.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Final, Self

import zmq

from zmq_autograd import ids
from zmq_autograd.wire import Buffer, Envelope, encode, open_envelope
from zmq_autograd.wire.messages import Hello, Message, Welcome

DEADLINE_SECONDS: Final = 20.0

LINGER_MILLISECONDS: Final = 500


class WirePeer:
    """A DEALER that may say anything.  Every method blocks, up to a deadline."""

    def __init__(self, endpoint: str, **options: int) -> None:
        """Connect to `endpoint`; `options` are names of socket options and their values."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.rcvtimeo = self._socket.sndtimeo = int(DEADLINE_SECONDS * 1000)
        for name, value in options.items():
            setattr(self._socket, name, value)
        self._socket.connect(endpoint)
        self.name = f"bare-{ids.random_id():x}"
        self.session_id = 0
        self.last_id = 0

    def shake_hands(self) -> None:
        """Open a session."""
        self.last_id = 1
        self.send(Hello(self.name, ids.new_incarnation()), Envelope(0, 1))
        envelope, welcome = self.receive()
        assert isinstance(welcome, Welcome)
        self.session_id = envelope.session_id

    def request(self, message: Message, *, timeout: float | None = None) -> int:
        """Send a request as the protocol has it and return its id."""
        self.last_id += 1
        self.send(message, Envelope(self.session_id, self.last_id, timeout))
        return self.last_id

    def send(self, message: Message, envelope: Envelope) -> None:
        """Send a message in any envelope."""
        self.send_frames(encode(message, envelope))

    def send_frames(self, frames: Sequence[Buffer]) -> None:
        """Send any frames."""
        self._socket.send_multipart(frames)

    def receive(self) -> tuple[Envelope, Message]:
        """Wait for the next message, heartbeats included."""
        return open_envelope(self._socket.recv_multipart())

    def reply_to(self, request_id: int) -> Message:
        """Wait for the next message that belongs to a request."""
        while True:
            envelope, message = self.receive()
            if envelope.request_id == request_id:
                return message

    def ids_until(self, request_id: int) -> list[int]:
        """Return what the messages belong to that come before the reply to a request."""
        found = []
        while (received := self.receive()[0].request_id) != request_id:
            found.append(received)
        return found

    def close(self) -> None:
        """Vanish, once what was sent has left."""
        self._context.destroy(linger=LINGER_MILLISECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


Answer = Callable[[Envelope], Sequence[Buffer]]


@contextlib.contextmanager
def silent_socket(kind: int) -> Iterator[str]:
    """Run a socket of `kind` that takes what comes and says nothing."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = 0
        yield f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


@contextlib.contextmanager
def impostor(answer: Answer) -> Iterator[str]:
    """Run a ROUTER that answers each message with what `answer` makes of its envelope."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def serve() -> None:
        with contextlib.suppress(zmq.ContextTerminated), socket:
            while True:
                route, *frames = socket.recv_multipart()
                envelope, _ = open_envelope(frames)
                socket.send_multipart([route, *answer(envelope)])

    thread = threading.Thread(target=serve, name="impostor")
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        context.term()
        thread.join(DEADLINE_SECONDS)
