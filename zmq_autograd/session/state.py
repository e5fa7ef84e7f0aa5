"""One side of one session: a state machine without I/O, driven by a clock that is passed in.

Owns the handshake, request ids, deadlines, cancellation and liveness.  Knows messages, not bytes:
its owner decodes what arrives, hands it in, and carries out the `Action` list that comes back, in
order.  It must not know sockets, tasks or futures; `zmq_autograd.node.channel` has those.

Rules:

1. Who dialled says `Hello`; who accepted answers `Welcome` with the session's id.  Anything else
   before that ends the session.
2. Either side sends requests.  A request's id is larger than every earlier one of the same side in
   the same session, so an id seen again is a duplicate.
3. Every request ends once at its sender: by a reply, by its deadline, by its cancellation or by the
   loss of the session.  What arrives for it afterwards is ignored.
4. Every request ends once at its receiver: by the reply, or, without one, by its sender's `Cancel`,
   its deadline or the loss of the session.
5. A reply is never answered, so errors cannot echo.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from zmq_autograd import ids
from zmq_autograd.errors import (
    DeadlineExceeded,
    ProtocolError,
    ResourceExhausted,
    WorkerLost,
    ZmqAutogradError,
)
from zmq_autograd.session.actions import (
    Action,
    Close,
    FinishRequest,
    HandleRequest,
    Identity,
    Opened,
    Send,
    StopRequest,
)
from zmq_autograd.session.deadlines import Deadlines
from zmq_autograd.session.failures import error_response, exception_from
from zmq_autograd.session.liveness import Liveness
from zmq_autograd.wire import Envelope
from zmq_autograd.wire.messages import (
    PROTOCOL_VERSION,
    Cancel,
    ErrorResponse,
    Heartbeat,
    Hello,
    Message,
    Reply,
    Request,
    Welcome,
)

Clock = Callable[[], float]
"""Seconds from any fixed point, never going back."""


PASS_REQUESTS: Final = 64
"""Requests of backward passes that a worker takes at once, for each of `Limits.requests`."""


class State(enum.Enum):
    """Where a session is: DIALLED and ACCEPTED lead to OPEN, all lead to CLOSED."""

    DIALLED = "dialled"  # we said Hello and await Welcome
    ACCEPTED = "accepted"  # we await Hello
    OPEN = "open"
    CLOSED = "closed"


@dataclass(slots=True)
class _Sent:
    """A request of ours that has not ended.

    Attributes:
        expects: the type of its reply.
        timeout: seconds that it was given.
        message_ids: the autograd messages that it is about.
    """

    expects: type[Reply]
    timeout: float | None
    message_ids: tuple[int, ...]


class Session:
    """One side of one session.  See the module's rules."""

    def __init__(
        self, me: Identity, address: str, clock: Clock, *, dialled: bool, lost_after: float
    ) -> None:
        """Make a session that is not open yet.

        Args:
            me: this side.
            address: what to call the peer until it tells its name.
            clock: tells the time in seconds.
            dialled: this side dialled, and so speaks first.
            lost_after: seconds of silence after which the peer counts as lost.
        """
        self.me = me
        self.peer: Identity | None = None
        self.session_id = 0
        self.state = State.DIALLED if dialled else State.ACCEPTED
        self._address = address
        # Why it is closed.
        self._cause: str | ZmqAutogradError = "the connection is not open"
        self._clock = clock
        # Our requests that have not ended.
        self._sent: dict[int, _Sent] = {}
        self._last_sent_id = 0
        # The peer's requests that have not ended.
        self._received: dict[int, type[Request]] = {}
        self._last_received_id = 0
        self._deadlines = Deadlines(self._sent, self._received)
        self._liveness = Liveness(clock(), heartbeat=me.heartbeat, lost_after=lost_after)

    # --- our requests ----------------------------------------------------------------------------

    def start(self, timeout: float | None = None) -> Send:
        """Say Hello; the dialling side's first step.

        Args:
            timeout: seconds until that request ends with DeadlineExceeded, None for never.
        """
        envelope = self.request(Hello, timeout)
        me = self.me
        hello = Hello(me.name, me.incarnation, me.limits, me.features, me.heartbeat)
        return Send(envelope, hello)

    def request(
        self, kind: type[Request], timeout: float | None, message_ids: tuple[int, ...] = ()
    ) -> Envelope:
        """Return the envelope for a new request of type `kind`, which the owner sends.

        Args:
            kind: its type; what may come back for it follows from that.
            timeout: seconds until it ends with DeadlineExceeded, None for never.
            message_ids: the autograd messages that it is about, for that error to name.
        """
        self._last_sent_id += 1
        request_id = self._last_sent_id
        now = self._clock()
        deadline = None if timeout is None else now + timeout
        self._sent[request_id] = _Sent(kind.reply, timeout, message_ids)
        self._deadlines.add(deadline, ours=True, request_id=request_id)
        return Envelope(self.session_id, request_id, timeout)

    def cancel(self, request_id: int) -> list[Action]:
        """Stop awaiting our request `request_id`; the peer hears of it."""
        if self._sent.pop(request_id, None) is None or self.state is not State.OPEN:
            return []
        return [self._send(Envelope(self.session_id), Cancel(request_id))]

    def forget(self, request_id: int) -> None:
        """Take back our request `request_id`, which was not sent after all."""
        self._sent.pop(request_id, None)

    def note_sent(self) -> None:
        """Take in that something has just been sent: no heartbeat is needed for a while."""
        self._liveness.sent(self._clock())

    # --- the peer's requests ---------------------------------------------------------------------

    def reply(self, request_id: int) -> Envelope | None:
        """Return the envelope for the reply to the peer's request, None if nobody awaits it."""
        if request_id not in self._received:
            return None
        del self._received[request_id]
        return Envelope(self.session_id, request_id)

    # --- what arrives ----------------------------------------------------------------------------

    def receive(self, envelope: Envelope, message: Message) -> list[Action]:
        """Take in one message of the peer's."""
        if self.state is State.CLOSED:
            return []
        if self.state is State.ACCEPTED:
            return self._receive_hello(envelope, message)
        if self.state is State.DIALLED:
            return self._receive_welcome(envelope, message)
        if envelope.session_id != self.session_id:
            return self._receive_stray(envelope, message)
        if isinstance(message, Reply):
            return self._receive_reply(envelope.request_id, message)
        if isinstance(message, Request):
            return self._receive_request(envelope, message)
        if isinstance(message, Cancel):
            return self._receive_cancel(message.cancelled_id)
        return []  # Heartbeat: having arrived is all it says

    def receive_malformed(self, error: ProtocolError) -> list[Action]:
        """Take in that the peer sent something that is no message."""
        if self.state is State.CLOSED:
            return []
        if self.state is State.DIALLED:
            return self.lose(self._broken(str(error)))
        answer = self._answer_malformed(error, is_reply=error.is_reply)
        return answer if self.state is State.OPEN else [*answer, *self.lose(str(error))]

    def _receive_stray(self, envelope: Envelope, message: Message) -> list[Action]:
        """Take in a message of another session; what it ends or cancels there is not ours."""
        if not isinstance(message, Request):
            return []
        error = ProtocolError(
            f"expected session {self.session_id}, got {envelope.session_id}",
            worker=self.me.name,
            request_id=envelope.request_id,
        )
        return [self._answer(envelope.request_id, error)]

    def _receive_hello(self, envelope: Envelope, message: Message) -> list[Action]:
        if not isinstance(message, Hello):
            return self._refuse(envelope, message, f"expected Hello, got {type(message).__name__}")
        if message.version != PROTOCOL_VERSION:
            problem = f"expected protocol version {PROTOCOL_VERSION}, got {message.version}"
            return self._refuse(envelope, message, problem)
        if not envelope.request_id:
            return self._refuse(envelope, message, "expected a request id on Hello, got none")
        self.session_id = ids.random_id()
        self._last_received_id = envelope.request_id
        opened = self._open(message)
        me = self.me
        welcome = Welcome(me.name, me.incarnation, me.limits, me.features, me.heartbeat)
        return [self._send(Envelope(self.session_id, envelope.request_id), welcome), opened]

    def _refuse(self, envelope: Envelope, message: Message, problem: str) -> list[Action]:
        error = ProtocolError(problem, worker=self.me.name, request_id=envelope.request_id)
        answer = self._answer_malformed(error, is_reply=isinstance(message, Reply))
        return [*answer, *self.lose(problem)]

    def _receive_welcome(self, envelope: Envelope, message: Message) -> list[Action]:
        if isinstance(message, ErrorResponse):
            return self.lose(exception_from(message, self.peer_name))
        if not isinstance(message, Welcome):
            return self.lose(self._broken(f"expected Welcome, got {type(message).__name__}"))
        problem = None
        if message.version != PROTOCOL_VERSION:
            problem = f"expected protocol version {PROTOCOL_VERSION}, got {message.version}"
        elif not envelope.session_id:
            problem = "expected a session id on Welcome, got none"
        elif envelope.request_id not in self._sent:
            problem = f"expected Welcome to our Hello, got one to request {envelope.request_id}"
        if problem:
            return self.lose(self._broken(problem))
        self.session_id = envelope.session_id
        opened = self._open(message)
        return [opened, *self._receive_reply(envelope.request_id, message)]

    def _open(self, theirs: Hello | Welcome) -> Opened:
        self.peer = Identity(
            theirs.name, theirs.incarnation, theirs.limits, tuple(theirs.features), theirs.heartbeat
        )
        self._liveness.expect_heartbeat(theirs.heartbeat)
        self.state = State.OPEN
        return Opened(self.peer)

    def _receive_reply(self, request_id: int, reply: Reply) -> list[Action]:
        sent = self._sent.pop(request_id, None)
        if sent is None:
            if request_id > self._last_sent_id:
                return self.lose(f"it replied to request {request_id}, which was never sent")
            return []  # ended before: rule 3
        if isinstance(reply, ErrorResponse):
            return [FinishRequest(request_id, exception_from(reply, self.peer_name))]
        if not isinstance(reply, sent.expects):
            problem = f"expected {sent.expects.__name__}, got {type(reply).__name__}"
            return [FinishRequest(request_id, self._broken(problem, request_id))]
        return [FinishRequest(request_id, reply)]

    def _receive_request(self, envelope: Envelope, message: Request) -> list[Action]:
        request_id = envelope.request_id
        if request_id in self._received:
            return []  # a duplicate of one that is being handled: its reply is on its way
        problem = None
        if isinstance(message, Hello):
            problem = "expected no second Hello in a session"
        elif request_id <= self._last_received_id:
            problem = f"expected a request id above {self._last_received_id}, got {request_id}"
        if problem:
            error = ProtocolError(problem, worker=self.me.name, request_id=request_id)
            return self._answer_malformed(error, is_reply=False)
        self._last_received_id = request_id
        limit = self.me.limits.requests * (1 if message.is_limited else PASS_REQUESTS)
        alike = (kind for kind in self._received.values() if kind.is_limited is message.is_limited)
        if len(self._received) >= limit and sum(1 for _ in alike) >= limit:
            text = f"{limit} requests are under way: that is the limit"
            busy = ResourceExhausted(text, worker=self.me.name)
            return [self._answer(request_id, busy)]
        deadline = None if envelope.timeout is None else self._clock() + envelope.timeout
        self._received[request_id] = type(message)
        self._deadlines.add(deadline, ours=False, request_id=request_id)
        return [HandleRequest(request_id, message, deadline)]

    def _receive_cancel(self, request_id: int) -> list[Action]:
        if request_id not in self._received:
            return []
        del self._received[request_id]
        return [StopRequest(request_id)]

    def _answer_malformed(self, error: ProtocolError, *, is_reply: bool) -> list[Action]:
        if is_reply:
            if self._sent.pop(error.request_id, None) is None:
                return []
            return [FinishRequest(error.request_id, self._broken(str(error), error.request_id))]
        return [self._answer(error.request_id, error)]

    def _broken(self, problem: str, request_id: int = 0) -> ProtocolError:
        text = f"worker {self.peer_name!r} broke the protocol: {problem}"
        return ProtocolError(text, worker=self.peer_name, request_id=request_id)

    def _answer(self, request_id: int, error: ZmqAutogradError) -> Send:
        answer = error_response(error, self.me.name)
        return self._send(Envelope(self.session_id, request_id), answer)

    # --- time and loss ---------------------------------------------------------------------------

    def wakeup(self) -> float:
        """Return when `tick` is due next, on the session's clock."""
        due = self._liveness.next_check()
        deadline = self._deadlines.soonest()
        return due if deadline is None else min(due, deadline)

    def tick(self, received_ago: float, acknowledged_ago: float | None) -> list[Action]:
        """Let time pass.

        Args:
            received_ago: seconds since any byte came from the peer.
            acknowledged_ago: seconds since the peer's host acknowledged anything, None if the
                network does not tell.
        """
        now = self._clock()
        actions: list[Action] = []
        for ours, request_id in self._deadlines.take_due(now):
            actions += self._expire_sent(request_id) if ours else self._expire_received(request_id)
        if self.state is not State.OPEN:
            self._liveness.skip(now)
            return actions
        reason = self._liveness.check(now, received_ago, acknowledged_ago)
        if reason:
            return [*actions, *self.lose(reason)]
        if self._liveness.heartbeat_due(now):
            actions.append(self._send(Envelope(self.session_id), Heartbeat()))
        return actions

    def _expire_sent(self, request_id: int) -> list[Action]:
        sent = self._sent[request_id]
        about = (
            f" about message {', '.join(map(str, sent.message_ids))}" if sent.message_ids else ""
        )
        error = DeadlineExceeded(
            f"no reply from worker {self.peer_name!r}{about} within {sent.timeout:g} s",
            workers=(self.peer_name,),
            message_ids=sent.message_ids,
        )
        return [FinishRequest(request_id, error), *self.cancel(request_id)]

    def _expire_received(self, request_id: int) -> list[Action]:
        del self._received[request_id]
        name = self.me.name
        late = DeadlineExceeded(f"worker {name!r} did not finish in time", workers=(name,))
        return [StopRequest(request_id), self._answer(request_id, late)]

    def lose(self, cause: str | ZmqAutogradError) -> list[Action]:
        """End the session: nothing will come any more, because of `cause`."""
        if self.state is State.CLOSED:
            return []
        self.state = State.CLOSED
        self._cause = cause
        actions: list[Action] = [StopRequest(request_id) for request_id in sorted(self._received)]
        actions += [FinishRequest(request_id, self.loss()) for request_id in self._sent]
        self._received.clear()
        self._sent.clear()
        self._deadlines.clear()
        return [*actions, Close(str(cause))]

    def loss(self) -> ZmqAutogradError:
        """Return the error for one who awaits something of the peer after the session's end."""
        if isinstance(self._cause, ZmqAutogradError):
            return self._cause
        return WorkerLost(self.peer_name, self.peer.incarnation if self.peer else "", self._cause)

    @property
    def peer_name(self) -> str:
        """The peer's name; its address while it has not told."""
        return self.peer.name if self.peer else self._address

    def _send(self, envelope: Envelope, message: Message) -> Send:
        self._liveness.sent(self._clock())
        return Send(envelope, message)
