"""The backward passes of one context on one worker: whose turn it is, and how each ended.

Owns the queue of passes, which one was completed last, who has still to be told so, and the telling
of a failed one.  How a pass goes is `distributed_pass`'s.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from torch import Tensor

from zmq_autograd.autograd.accumulate import is_quick
from zmq_autograd.engine.distributed_pass import Awaited, Losses, Pass, Settings, Told
from zmq_autograd.engine.host import Host, Peer, tell
from zmq_autograd.errors import DeadlineExceeded, ZmqAutogradError
from zmq_autograd.session import error_response
from zmq_autograd.wire.messages import (
    AbortPass,
    AbortPassResponse,
    BackwardRequest,
    BackwardResponse,
    CommitPass,
    PropagateGradientsRequest,
)

if TYPE_CHECKING:
    from zmq_autograd.engine.local_context import LocalContext

ABORT_SECONDS: Final = 1.0
"""Seconds that a failed pass waits for others to say that they have heard of it, and twice as long
as they wait for those behind them."""

COMMIT_SECONDS: Final = 0.01
"""Seconds after which a worker is told of a complete pass if no other message told it."""


class Passes:
    """See the module.

    Attributes:
        committed: the last pass that is complete everywhere, 0 for none.
        running: the pass that runs here.
        staged: the pass whose part here is complete, until all are.
    """

    def __init__(self, context: LocalContext, host: Host) -> None:
        """Make the passes of `context`, of which there is none yet."""
        self.committed = 0
        self.running: Pass | None = None
        self.staged: Pass | None = None
        self._context = context
        self._host = host
        self._turn = asyncio.Lock()
        self._granted = 0
        # By request of this worker, what its pass starts from, and what went wrong with it here;
        # and the requests whose passes have begun.
        self._requested: dict[int, Losses] = {}
        self._causes: dict[int, BaseException] = {}
        self._begun: set[int] = set()
        # The last pass that was told of here, and who told; the last that ended here, and what it
        # awaited; the last whose failure was told on.
        self._told_by: tuple[int, Peer | None] = 0, None
        self._ended = 0
        self._awaited = Awaited()
        self._told_aborted = 0
        # Why no pass can run any more, and why gradients were lost.
        self._broken = ""
        self._commit_error: BaseException | None = None
        self._committing: asyncio.Task[None] | None = None
        self._owing: set[Peer] = set()
        # What runs in threads, for a pass that was aborted too: nothing stops it there.
        self._computing: set[asyncio.Task[Any]] = set()

    # --- asking for one --------------------------------------------------------------------------

    async def backward(self, losses: Losses, settings: Settings, timeout: float | None) -> None:
        """Run a pass from `losses` on this worker; see `Context.backward`."""
        asked_id = settings.asked_id
        self._requested[asked_id] = losses
        running = asyncio.ensure_future(self._outcome(settings))
        try:
            done, _ = await asyncio.wait({running}, timeout=timeout)
            error = running.result() if done else await self._expired(running, asked_id, timeout)
            if error is not None:
                raise error
        finally:
            del self._requested[asked_id]
            self._causes.pop(asked_id, None)
            self._begun.discard(asked_id)
            running.cancel()
            self._context.table.gate.changed()
        await self.until_committed()
        if self._commit_error is not None:
            raise self._commit_error

    async def _outcome(self, settings: Settings) -> BaseException | None:
        """Run a pass; return why it failed.  A task that raises SystemExit would end the loop."""
        try:
            await self.run(settings)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001  # `backward` raises it
            return error
        return None

    def check_usable(self) -> None:
        """Raise ContextError if no pass can run in it any more."""
        if self._context.is_ended:
            raise self._context.ended_error()
        if self._broken:
            raise self._context.error(
                "an earlier pass failed without retain_graph=True, and part of the graph is gone: "
                f"{self._broken}"
            )

    async def run(self, settings: Settings) -> int:
        """Run a pass when its turn has come, or have the context's owner run it; return its id.

        Raises:
            BaseException: the first cause, if it is aborted.
        """
        parent = self._context.parent
        if parent is None:
            async with self._turn:
                self.check_usable()
                pass_id = await self._run_here(settings)
        else:
            pass_id = await self._ask_owner(parent, settings)
        if self._context.is_ended:
            raise self._context.ended_error()
        self.learn_committed(pass_id)
        return pass_id

    async def _run_here(self, settings: Settings) -> int:
        self._granted += 1
        settings = replace(settings, pass_id=self._granted)
        started = self.start(settings)
        try:
            await started.completion()
        except BaseException as error:
            cause = started.cause or error
            telling = self._host.spawn(self.tell_aborted(settings.pass_id, cause))
            awaited = await asyncio.shield(telling)
            if isinstance(cause, DeadlineExceeded):
                raise DeadlineExceeded(
                    cause.args[0],
                    workers=sorted(awaited.workers.union(cause.workers)),
                    message_ids=sorted(awaited.message_ids.union(cause.message_ids)),
                ) from None
            raise
        return settings.pass_id

    async def _ask_owner(self, parent: Peer, settings: Settings) -> int:
        request = BackwardRequest(
            self._context.context_id,
            settings.asked_id,
            settings.retain_graph,
            settings.inputs_only,
            settings.accumulate_grad,
            settings.check_nan,
        )
        try:
            reply = cast(BackwardResponse, await parent.request(request, timeout=None))
        except ZmqAutogradError:
            cause = self._causes.pop(settings.asked_id, None)
            if cause is None:
                raise
            raise cause from None  # as it was raised here, before it went round by the owner
        return reply.pass_id

    async def _expired(
        self, running: asyncio.Future[BaseException | None], asked_id: int, timeout: float | None
    ) -> BaseException | None:
        """End a pass whose time ran out; return what to raise, None if it was complete by then."""
        text = f"backward in context {self._context.context_id} did not end within {timeout:g} s"
        if asked_id not in self._begun:
            text += ": it waited for its turn"
            return DeadlineExceeded(text, workers=(self._host.name,))
        error = DeadlineExceeded(text)
        if self.running is not None and self.running.settings.asked_id == asked_id:
            self.running.abort(error)
        else:  # this worker's part is complete: it is the owner's to say what becomes of it
            self.report(self._ended, error)
        # The owner tells everybody, and hears what they awaited.
        done, _ = await asyncio.wait({running}, timeout=2 * ABORT_SECONDS)
        outcome = running.result() if done else error
        if not isinstance(outcome, DeadlineExceeded):
            return outcome
        workers = sorted(self._awaited.workers.union(outcome.workers)) or [self._host.name]
        message_ids = sorted(self._awaited.message_ids.union(outcome.message_ids))
        return DeadlineExceeded(
            f"{text}: workers {', '.join(map(repr, workers))} and the gradients for "
            f"{len(message_ids)} messages were awaited",
            workers=workers,
            message_ids=message_ids,
        )

    @property
    def queued(self) -> list[int]:
        """The requests of this worker whose passes have not begun: others have their turn."""
        return [asked_id for asked_id in self._requested if asked_id not in self._begun]

    @property
    def losses(self) -> list[Losses]:
        """What the passes start from that this worker has asked for and that have not ended."""
        return list(self._requested.values())

    # --- taking part -----------------------------------------------------------------------------

    def start(self, settings: Settings, told_by: Told | None = None) -> Pass:
        """Take part in a pass from now on.

        Args:
            settings: of the pass.
            told_by: who told of it; None on the context's owner.
        """
        if self.running is not None:
            self.running.abort(self._context.error("another backward pass began"))
        self.staged = None  # it was aborted, or it would have been told to be complete
        self._told_by = settings.pass_id, None if told_by is None else told_by.peer
        losses = Losses()
        if settings.asked_id in self._requested:
            losses = self._requested[settings.asked_id]
            self._begun.add(settings.asked_id)
        self.running = Pass(self._context, self._host, settings, losses, told_by)
        return self.running

    def is_over(self, pass_id: int) -> bool:
        """Whether this worker's part in the pass has ended."""
        return pass_id <= self._ended

    def find(self, pass_id: int) -> Pass | None:
        """Return the pass that runs here or waits to be complete elsewhere, if it is `pass_id`."""
        for found in (self.running, self.staged):
            if found is not None and found.pass_id == pass_id:
                return found
        return None

    def propagated(self, request: PropagateGradientsRequest, peer: Peer) -> None:
        """Take in gradients; those of a pass that has ended are dropped.

        Raises:
            ContextError: there is no such pass.
            ProtocolError: they cannot be those of that message.
        """
        running = self.running
        if running is not None and running.pass_id == request.pass_id:
            try:
                running.propagated(peer, request.metadata.message_id, request.grads)
            except Exception as error:
                running.abort(error)
                raise
        elif not (request.pass_id and self.is_over(request.pass_id)):
            raise self._context.error(f"no backward pass {request.pass_id} is under way")

    def completed(self, ended: Pass) -> None:
        """Take in that the part of this worker and of all behind it is complete."""
        self._ended, self._awaited = ended.pass_id, Awaited()
        self.running, self.staged = None, ended

    def aborted(self, ended: Pass, awaited: Awaited) -> None:
        """Take in that a pass is over without a result, and what it awaited then."""
        self._ended, self._awaited = ended.pass_id, awaited
        self.running = self.staged = None
        if not ended.settings.retain_graph:
            # Not the error itself: its traceback holds on to the graph.
            self._broken = str(ended.cause)

    def raised(self, asked_id: int, error: BaseException) -> None:
        """Take in what went wrong on this worker with a pass that it may have asked for."""
        if asked_id in self._requested:
            self._causes.setdefault(asked_id, error)

    def computing(self, task: asyncio.Task[Any]) -> None:
        """Take in that a pass computes something."""
        self._computing.add(task)
        task.add_done_callback(self._computing.discard)

    async def until_idle(self) -> None:
        """Wait until nothing of an earlier pass runs any more."""
        await self.until_committed()
        if self._computing:
            await asyncio.wait(self._computing)

    def end(self, cause: BaseException) -> None:
        """End whatever runs, and let go of it."""
        for ended in (self.running, self.staged):
            if ended is not None:
                ended.abort(cause)
        self.running = self.staged = self._commit_error = None
        self._causes.clear()

    def peer_lost(self, peer: Peer) -> None:
        """Take in that nothing can be exchanged with `peer` any more."""
        self._owing.discard(peer)
        if self.running is not None:
            self.running.peer_lost(peer)

    # --- failing ---------------------------------------------------------------------------------

    async def heard_aborted(self, pass_id: int, cause: BaseException, peer: Peer) -> Awaited:
        """Take in that `peer` says that a pass failed; return what was awaited here and behind."""
        told_id, told_by = self._told_by
        if told_id != pass_id:
            return Awaited()
        if told_by is peer or told_by is None:
            found = self.find(pass_id)
            # The owner's own part being complete, all are: it is too late.
            if found is not None and (told_by is peer or found is self.running):
                found.abort(cause)
            return await self.tell_aborted(pass_id, cause, peer) if told_by is peer else Awaited()
        self.report(pass_id, cause)
        return Awaited()

    def report(self, pass_id: int, cause: BaseException) -> None:
        """Let the owner know, along those who told of the pass, that it should fail."""
        told_id, told_by = self._told_by
        if told_by is not None and told_id == pass_id and told_by.is_connected:
            message = _abort_message(self._context.context_id, pass_id, cause, self._host)
            self._host.spawn(told_by.request(message, timeout=None))

    async def tell_aborted(
        self, pass_id: int, cause: BaseException, source: Peer | None = None
    ) -> Awaited:
        """Tell everybody but `source` of the first cause.

        Returns:
            What was awaited here and behind, as far as it was told within a second.
        """
        if pass_id <= self._told_aborted:
            return Awaited()  # whoever told first gets it
        self._told_aborted = pass_id
        awaited = self._awaited if self._ended == pass_id else Awaited()
        message = _abort_message(self._context.context_id, pass_id, cause, self._host)
        seconds = ABORT_SECONDS if source is None else ABORT_SECONDS / 2
        others = [peer for peer in self._context.peers if peer is not source and peer.is_connected]
        for reply in await tell(self._host, others, message, seconds):
            if isinstance(reply, AbortPassResponse):
                awaited.message_ids.update(reply.message_ids)
                awaited.workers.update(reply.workers)
        if self._computing:
            await asyncio.wait(self._computing, timeout=seconds)
        return awaited

    # --- completing it ---------------------------------------------------------------------------

    def learn_committed(self, pass_id: int) -> None:
        """Take in that a pass is complete everywhere; `until_committed` waits for its gradients."""
        if pass_id <= self.committed or self._context.is_ended:
            return
        self.committed = pass_id
        staged, self.staged = self.staged, None
        if staged is not None and staged.pass_id == pass_id:
            gradients = staged.take_gradients()
            self._context.table.gate.changed()
            into_grad = staged.settings.accumulate_grad
            self._committing = self._host.spawn(self._commit(gradients, into_grad=into_grad))
        # Whoever was told by this worker of the pass, or was in it without this one, hears of it.
        self._owing.update(peer for peer in self._context.peers if peer.is_connected)
        asyncio.get_running_loop().call_later(COMMIT_SECONDS, self._pay)

    async def until_committed(self) -> None:
        """Wait until the gradients of the last complete pass are the context's."""
        if self._committing is not None:
            await asyncio.shield(self._committing)

    async def _commit(self, gradients: dict[Tensor, Tensor], *, into_grad: bool) -> None:
        record = self._context.record
        self._context.enter_pass(self.committed)
        summed = partial(record.summed, gradients, into_grad=into_grad)
        try:
            record.gradients = summed() if is_quick(gradients) else await self._host.compute(summed)
        except BaseException as error:  # noqa: BLE001  # a user's hook: it is told where it matters
            self._commit_error, self._broken = error, str(error)

    def _pay(self) -> None:
        """Tell those of the last complete pass whom no other message has told."""
        owing, self._owing = self._owing, set()
        for peer in owing if not self._context.is_ended else ():
            if peer.is_connected:
                message = CommitPass(self._context.context_id, self.committed)
                self._host.spawn(peer.request(message, timeout=None))

    def told_committed(self, peer: Peer, pass_id: int) -> None:
        """Take in that `peer` has got a message that says that the pass is complete."""
        if pass_id == self.committed:
            self._owing.discard(peer)

    def check_gradients(self) -> None:
        """Raise ContextError if those of a pass were lost."""
        if self._commit_error is not None:
            raise self._context.error(f"its gradients are lost: {self._commit_error}")


def _abort_message(context_id: int, pass_id: int, cause: BaseException, host: Host) -> AbortPass:
    """Return what tells of a failed pass: the fields of an `ErrorResponse` tell its cause."""
    error = error_response(cause, host.name, send_traceback=host.tracebacks)
    return AbortPass(
        context_id,
        pass_id,
        error.code,
        error.text,
        error.origin,
        error.type_name,
        error.traceback,
        error.path,
        error.incarnation,
        error.message_ids,
        error.workers,
    )
