"""One worker's part of a distributed autograd context: what its calls and messages meet.

Owns which workers it has reached, and its way to its owner.  Its passes are `passes`'; which
contexts a worker has, `contexts`'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from torch import Tensor

from zmq_autograd.autograd.record import Record
from zmq_autograd.engine.host import Host, Peer
from zmq_autograd.engine.passes import Passes
from zmq_autograd.engine.places import Place
from zmq_autograd.errors import ContextError, WorkerLost

if TYPE_CHECKING:
    from zmq_autograd.engine.context import Context
    from zmq_autograd.engine.contexts import Contexts


@dataclass(frozen=True, slots=True)
class Scope:
    """What running code is in: a context, and the place where it makes its messages.

    Attributes:
        context: the context.
        place: the place.
        is_pass: it runs for a backward pass: a hook, say.
    """

    context: LocalContext
    place: Place
    is_pass: bool = False


current_scope: Final[ContextVar[Scope | None]] = ContextVar("zmq_autograd_scope", default=None)


def keeps(results: Iterable[Tensor]) -> None:
    """Take in that what was computed here is kept for a later pass: see `gate.Gate`."""
    scope = current_scope.get()
    if scope is not None:
        scope.context.record.keep(results)


class LocalContext:
    """See the module.

    Attributes:
        context_id: the same on every worker, an unsigned 64-bit number.
        table: the worker's contexts, which it is one of.
        user: what a user holds of it; the table sets it.
        record: what was sent and received in it here, and the gradients so far.
        passes: its backward passes.
        parent: the worker that it came from, None on the one that opened it.
        owner: the worker that opened it, where a call has come from that one.
        peers: everybody that a call was exchanged with; a dict for its order.
        steps: the steps that it has asked for, on any worker, by id.
        is_ended: it has been left, or its way to its owner was lost.
    """

    user: Context

    def __init__(self, context_id: int, host: Host, table: Contexts, parent: Peer | None) -> None:
        """Make a context; `Contexts` does.

        Args:
            context_id: its id.
            host: the worker that it is on.
            table: what forgets it once it has ended.
            parent: where it came from, None on the worker that opened it.
        """
        self.context_id = context_id
        self.record = Record(context_id)
        self.parent = parent
        self.owner: Peer | None = None
        self.peers: dict[Peer, None] = {} if parent is None else {parent: None}
        self.steps: set[int] = set()
        self.is_ended = False
        self._lost = ""
        self.table = table
        self._host = host
        self.passes = Passes(self, host)
        # Where this worker's own code, and the last pass, make messages.  There is one object of
        # each: a second one would give the same ids once more.
        self._own_place = Place(context_id) if parent is None else self._named_place("own")
        self._pass_place = 0, self._own_place

    def __repr__(self) -> str:
        return f"<Context {self.context_id} on worker {self._host.name!r}>"

    # --- being in it -----------------------------------------------------------------------------

    def enter(self, served: int = 0) -> Place:
        """Have what runs in this task from now on be in this context; return its place there.

        Args:
            served: the message that it serves, 0 for the program that opened the context.
        """
        place = Place(self.context_id, served) if served else self._own_place
        current_scope.set(Scope(self, place))
        return place

    def enter_pass(self, pass_id: int) -> None:
        """Have what runs in this task from now on run for a pass of this context."""
        if self._pass_place[0] != pass_id:
            self._pass_place = pass_id, self._named_place(f"pass {pass_id}")
        current_scope.set(Scope(self, self._pass_place[1], is_pass=True))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have what this task runs in a block be in this context, whichever it is in outside.

        Raises:
            ContextError: it is not open.
        """
        self.check_open()
        scope = current_scope.get()
        is_in = scope is not None and scope.context is self
        token = current_scope.set(scope if is_in else Scope(self, self._own_place))
        try:
            yield
        finally:
            current_scope.reset(token)

    def _named_place(self, name: str) -> Place:
        """Return a place that is none of a served call's, and no other worker's."""
        digest = blake2b(f"{self._host.name} {name}".encode(), digest_size=8).digest()
        # Mixed with the context's id, as those of messages are.
        return Place(self.context_id, int.from_bytes(digest, "little") ^ self.context_id)

    # --- calls -----------------------------------------------------------------------------------

    def sending(self, peer: Peer, message_id: int, tensors: Iterable[Tensor]) -> bool:
        """Record that a message leaves for `peer`; say whether it is on the graph.

        Raises:
            ContextError: the context has ended.
        """
        self.check_not_ended()
        self.peers.setdefault(peer)
        return self.record.send(message_id, peer, tensors)

    def not_sent(self, message_id: int) -> None:
        """Take back a message that did not leave after all."""
        self.record.sends.pop(message_id, None)

    def received(self, peer: Peer, message_id: int, tensors: Iterable[Tensor]) -> None:
        """Record that a message came from `peer`, and put its tensors on the graph.

        Raises:
            ContextError: the context has ended.
        """
        self.check_not_ended()
        self.peers.setdefault(peer)
        self.record.receive(message_id, peer, tensors)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the gradients of this worker's leaves; see `Context.gradients`."""
        self.check_not_ended()
        self.passes.check_gradients()
        return dict(self.record.gradients)

    # --- its end ---------------------------------------------------------------------------------

    def end(self, lost: str = "") -> None:
        """Let go of everything; whatever uses it from now on raises.

        Args:
            lost: the worker whose loss is why, if that is why.
        """
        if self.is_ended:
            return
        self.is_ended = True
        self._lost = lost
        self.passes.end(self.ended_error())
        self.record.clear()

    def peer_lost(self, peer: Peer) -> None:
        """Take in that nothing can be exchanged with `peer` any more."""
        if self.parent is peer and self.owner is not None and self.owner.is_connected:
            self.parent = self.owner
        self.passes.peer_lost(peer)

    def check_open(self) -> None:
        """Raise what is wrong with using it now.

        Raises:
            ContextError: it has not been entered, or has ended.
            WorkerLost: it has ended since a worker was lost.
        """
        self.check_not_ended()
        if self not in self.table:
            raise self.error("it has not been entered: use it inside `async with`")

    def check_not_ended(self) -> None:
        """Raise what `ended_error` returns if it has ended."""
        if self.is_ended:
            raise self.ended_error()

    def ended_error(self) -> ContextError | WorkerLost:
        """Return what to raise for a use after its end."""
        if self._lost:
            reason = f"context {self.context_id} on worker {self._host.name!r} ended with it"
            return WorkerLost(self._lost, reason=reason)
        return self.error("it has ended")

    def error(self, problem: str) -> ContextError:
        return ContextError(
            f"context {self.context_id} on worker {self._host.name!r}: {problem}",
            context_id=self.context_id,
            worker=self._host.name,
        )
