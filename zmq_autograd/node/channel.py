"""A session on its link: carries out what the session decides, and lets callers await replies.

Owns the futures of the requests sent over it, its handlers' tasks, and the one timer that the
session asks for.  Decides nothing: that is `zmq_autograd.session`'s.  Everything here runs in the
event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from zmq_autograd.errors import (
    ConfigurationError,
    DeadlineExceeded,
    ProtocolError,
    ZmqAutogradError,
)
from zmq_autograd.node.current import shortened
from zmq_autograd.node.forks import Given
from zmq_autograd.node.rrefs import RRefs
from zmq_autograd.session import (
    Action,
    Close,
    FinishRequest,
    HandleRequest,
    Identity,
    Opened,
    Send,
    Session,
    State,
    StopRequest,
    error_response,
)
from zmq_autograd.transport import HIGH_WATER_BYTES, Link, LinkClosed
from zmq_autograd.transport.outgoing import hold
from zmq_autograd.wire import Buffer, Envelope, check_fits, encode, open_envelope
from zmq_autograd.wire.messages import (
    AutogradMetadata,
    ForwardResponse,
    Message,
    Reply,
    Request,
)


class ChannelOwner(Protocol):
    """What a channel needs of its node."""

    me: Identity
    lost_after: float

    def channel_opened(self, channel: Channel) -> None:
        """Hear that the peer said who it is."""

    def channel_closed(self, channel: Channel) -> None:
        """Hear that the channel is gone.  Called once, opened or not."""

    def take(self, channel: Channel, message: Message) -> Message:
        """Return a message that arrived as whoever gets it sees it."""

    @property
    def rrefs(self) -> RRefs:
        """The RRefs in what is sent and received."""

    def handle(self, channel: Channel, request: HandleRequest) -> asyncio.Task[None]:
        """Start a task that handles `request` and replies through `Channel.reply`."""


class Channel:
    """One session with one peer, over one link."""

    def __init__(self, owner: ChannelOwner, address: str, *, dialled: bool) -> None:
        """Make a channel without a link yet.

        Args:
            owner: the node it belongs to.
            address: the endpoint dialled, or where the peer came from.
            dialled: this side dialled.
        """
        self.address = address
        # The worker at the other end as its user holds it; the owner sets it on opening.
        self.peer: Any = None
        # How many have it from dialling: while there are none, whoever opened it may close it.
        self.users = 0
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._session = Session(
            owner.me, address, self._loop.time, dialled=dialled, lost_after=owner.lost_after
        )
        self._link: Link | None = None
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        # Requests that count against the number that the peer lets run at once.
        self._limited: set[int] = set()
        # Those above that number, in order, by request id.
        self._held: dict[int, list[Buffer]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        # Of whole messages, what the connection adds not counted.
        self.bytes_sent = 0
        self.bytes_received = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def identity(self) -> Identity | None:
        """Who the peer is, None before the handshake."""
        return self._session.peer

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return self._session.state is State.OPEN

    @property
    def requests_sent(self) -> int:
        """How many requests of this side are under way."""
        return len(self._replies)

    @property
    def requests_received(self) -> int:
        """How many requests of the peer's are being handled."""
        return len(self._tasks)

    # --- opening and closing ---------------------------------------------------------------------

    def attach(self, link: Link) -> None:
        """Use `link`, which has just been made, from now on."""
        self._link = link
        if self._session.state is State.CLOSED:  # what came over it at once has ended the session
            link.close()

    async def shake_hands(self, timeout: float | None) -> None:
        """Open the session over the attached link; the dialling side's part.

        Raises:
            ZmqAutogradError: the peer refused, broke the protocol or was lost.
            DeadlineExceeded: it did not answer within `timeout` seconds.

        On any failure, cancellation included, the channel is closed.
        """
        if self._session.state is State.CLOSED:  # the link broke as soon as it was there
            raise self._session.loss()
        hello = self._session.start(timeout)
        request_id = hello.envelope.request_id
        self._replies[request_id] = welcome = self._loop.create_future()
        try:
            self._perform([hello])
            self._arm()
            await welcome
        except BaseException:
            self.close("the handshake failed")
            raise
        finally:
            self._replies.pop(request_id, None)

    def close(self, cause: str | ZmqAutogradError) -> None:
        """End the session; whoever awaits something of the peer hears of `cause`.  Idempotent."""
        self._perform(self._session.lose(cause))

    # --- our requests ----------------------------------------------------------------------------

    async def request(self, message: Request, timeout: float | None) -> Reply:
        """Send `message` and return its reply.

        The message's tensors have been read when this first suspends.

        Args:
            message: any request.
            timeout: seconds to wait for the reply, None for ever; never more than the request
                that the calling code serves has left.

        Raises:
            SerializationError: something in it cannot travel; nothing was sent.
            ResourceExhausted: it is larger than the peer takes in; nothing was sent.
            DeadlineExceeded: no reply in time.
            WorkerLost: the peer was lost before it replied.
            ZmqAutogradError: what the peer replied instead, an error.

        Cancelling it tells the peer to stop.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(
                f"worker {self._session.peer_name!r} was connected in another event loop: "
                "use it there"
            )
        timeout = shortened(timeout)
        if not self.is_open:
            raise self._session.loss()
        if timeout is not None and timeout <= 0:
            name = self._session.peer_name
            raise DeadlineExceeded(f"no time was left to ask worker {name!r}", workers=(name,))
        until = None if timeout is None else self._loop.time() + timeout
        metadata = getattr(message, "metadata", None)
        message_ids = (metadata.message_id,) if isinstance(metadata, AutogradMetadata) else ()
        envelope = self._session.request(type(message), timeout, message_ids)
        request_id = envelope.request_id
        given: Given = []
        try:
            message, given = self._owner.rrefs.give(message, self.peer)
            frames = self._encoded(message, envelope)
        except BaseException:
            self._session.forget(request_id)
            self._owner.rrefs.taken_back(given)
            raise
        if message.is_limited:
            self._limited.add(request_id)
        has_room = not message.is_limited or len(self._limited) <= self._room()
        # The future comes first: sending may find the link broken and end the request at once.
        reply: asyncio.Future[Reply] = self._loop.create_future()
        self._replies[request_id] = reply
        if has_room:
            self._send(frames)
        else:
            self._held[request_id] = hold(frames)
        self._arm()
        try:
            answer = await reply
        except asyncio.CancelledError:
            self._perform(self._session.cancel(request_id))
            raise
        finally:
            del self._replies[request_id]
            self._limited.discard(request_id)
            if self._held.pop(request_id, None) is not None:  # it never left
                self._owner.rrefs.taken_back(given)
            self._send_held()
            del reply  # it holds the error that it ended with, and that holds this frame
        await self._owner.rrefs.until_claimed(answer, until)
        return answer

    def _send_held(self) -> None:
        while self._held and len(self._limited) - len(self._held) < self._room():
            self._send(self._held.pop(next(iter(self._held))))

    def _room(self) -> int:
        return self.identity.limits.requests if self.identity else 1

    # --- the peer's requests ---------------------------------------------------------------------

    def reply(self, request_id: int, reply: Reply) -> None:
        """Answer the peer's request, unless nobody awaits that any more."""
        self._answer(request_id, *self._reply_frames(request_id, reply))

    async def reply_when_drained(self, request_id: int, reply: Reply) -> None:
        """Like `reply`, but wait while too much waits to be sent to the peer.

        The reply's tensors have been read when this first suspends.
        """
        frames, given = self._reply_frames(request_id, reply)
        if self._link and self._link.pending_bytes >= HIGH_WATER_BYTES:
            frames = hold(frames)
            try:
                await self._link.drained()
            except asyncio.CancelledError:
                self._owner.rrefs.taken_back(given)
                raise
        self._answer(request_id, frames, given)

    def _reply_frames(self, request_id: int, reply: Reply) -> tuple[list[Buffer], Given]:
        envelope = Envelope(self._session.session_id, request_id)
        given: Given = []
        try:
            message, given = self._owner.rrefs.give(reply, self.peer)
            return self._encoded(message, envelope), given
        except Exception as error:  # noqa: BLE001  # whatever it is, the sender must hear of it
            self._owner.rrefs.taken_back(given)
            if isinstance(reply, ForwardResponse) and reply.profiler_events is not None:
                # Together they may be too much; the result comes first.
                return self._reply_frames(request_id, replace(reply, profiler_events=None))
            return self._own_frames(error_response(error, self._owner.me.name), envelope), []

    def _answer(self, request_id: int, frames: list[Buffer], given: Given) -> None:
        if self._session.reply(request_id) is not None:
            self._send(frames)
        else:
            self._owner.rrefs.taken_back(given)

    # --- what the link tells (LinkHandler) -------------------------------------------------------

    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        """Take one message in."""
        self.bytes_received += sum(frame.nbytes for frame in frames)
        try:
            envelope, message = open_envelope(frames, self._owner.me.limits, adopt=True)
        except ProtocolError as error:
            self._perform(self._session.receive_malformed(error))
        else:
            self._perform(self._session.receive(envelope, self._owner.take(self, message)))
        self._arm()

    def message_refused(self, link: Link, reason: str) -> None:
        """Take in that a message over the limits was thrown away."""
        self._perform(self._session.receive_malformed(ProtocolError(reason)))

    def link_lost(self, link: Link, reason: str) -> None:
        """Take in that the link is gone."""
        self.close(reason)

    # --- carrying out ----------------------------------------------------------------------------

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send(envelope, message):
                    self._send(self._own_frames(message, envelope))
                case Opened():
                    self._opened()
                case HandleRequest(request_id):
                    self._start(request_id, action)
                case StopRequest(request_id):
                    self._stop(request_id)
                case FinishRequest(request_id, outcome):
                    self._finish(request_id, outcome)
                case Close():
                    self._close()

    def _opened(self) -> None:
        if self._link:
            self._link.admit()
        self._owner.channel_opened(self)

    def _start(self, request_id: int, action: HandleRequest) -> None:
        task = self._tasks[request_id] = self._owner.handle(self, action)
        task.add_done_callback(lambda _: self._tasks.pop(request_id, None))

    def _stop(self, request_id: int) -> None:
        task = self._tasks.pop(request_id, None)
        # A handler that closes its own worker must not cancel itself in the middle of that.
        if task and task is not asyncio.current_task():
            task.cancel()

    def _finish(self, request_id: int, outcome: Reply | ZmqAutogradError) -> None:
        future = self._replies.get(request_id)
        if future is None or future.done():
            return
        if isinstance(outcome, ZmqAutogradError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _close(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._link:
            self._link.close()
        self._owner.channel_closed(self)

    def _encoded(self, message: Message, envelope: Envelope) -> list[Buffer]:
        frames = encode(message, envelope)
        if self.identity:
            check_fits(frames, self.identity.limits, self.identity.name)
        return frames

    def _own_frames(self, message: Message, envelope: Envelope) -> list[Buffer]:
        """Encode what has to be said; a peer whose limits leave no room for it is given up."""
        try:
            return self._encoded(message, envelope)
        except ZmqAutogradError as error:
            self.close(str(error))
            return []

    def _send(self, frames: list[Buffer]) -> None:
        if self._link is None or not frames:
            return
        try:
            self._link.send(frames)
        except LinkClosed as error:
            self.close(str(error))
        else:
            self.bytes_sent += sum(memoryview(frame).nbytes for frame in frames)
            self._session.note_sent()

    # --- time ------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Have the timer ring when the session wants it to."""
        if self._session.state is State.CLOSED:
            return
        due = self._session.wakeup()
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._link is None:
            return
        silence = self._link.silence()
        try:
            self._perform(self._session.tick(silence.received, silence.acknowledged))
        finally:
            self._arm()
