"""Two sides of an open session, for tests of what goes over it."""

from __future__ import annotations

from tests.unit.session.session_pair import Clock, limited_to, open_pair
from zmq_autograd.errors import ProtocolError
from zmq_autograd.session import Send
from zmq_autograd.wire import Envelope
from zmq_autograd.wire.messages import CleanupContextRequest, CleanupContextResponse, ErrorResponse

CLEANUP = CleanupContextRequest(5)
CLEANED = CleanupContextResponse()


class Pair:
    """Alice dialled bob; their session is open, and each has nothing under way."""

    def __init__(self, bob_requests: int = 1024) -> None:
        self.clock = Clock()
        self.alice, self.bob = open_pair(self.clock, bob=limited_to(bob_requests))
        self.id = self.alice.session_id

    def refusal(self, request_id: int, text: str, code: str = "protocol_error") -> Send:
        kind = {"protocol_error": "ProtocolError", "deadline_exceeded": "DeadlineExceeded"}
        name = kind.get(code, "ResourceExhausted")
        waiting = ("bob",) if code == "deadline_exceeded" else ()
        response = ErrorResponse(code, text, "bob", name, path=("bob",), workers=waiting)
        return Send(Envelope(self.id, request_id), response)

    def nothing_open(self) -> bool:
        """Say whether neither side awaits or handles anything: a loss would end nothing."""
        return [len(side.lose("the end")) for side in (self.alice, self.bob)] == [1, 1]


def malformed(text: str, request_id: int = 0, *, is_reply: bool = False) -> ProtocolError:
    error = ProtocolError(text, request_id=request_id)
    error.is_reply = is_reply
    return error
