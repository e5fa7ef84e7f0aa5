"""A random program as plain data: what each trainer does, and what the calls it makes do in turn.

A body is a list of steps over registers.  A step reads registers by number and appends what it
makes, so the registers of a body are known before it runs: first the tensors that it was called
with, then what its steps made, in order.  Everything that happens is written down here, failures
and cancellations too, so that two interpreters can follow the same program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

WORKERS: Final = ("alice", "bob", "carol", "dave")
"""Who takes part; the trainers are the first of them, and all of them serve calls."""


class Outcome(Enum):
    """How a call ends."""

    TENSORS = "tensors"
    NONE = "none"
    NUMBER = "number"
    FAILURE = "failure"


# --- steps within one worker ----------------------------------------------------------------------


@dataclass(frozen=True)
class UseLeaf:
    """Append a leaf, which lives on this worker."""

    leaf: int


@dataclass(frozen=True)
class Constant:
    """Append a tensor that requires no grad."""

    seed: int


@dataclass(frozen=True)
class Unary:
    """Append a function of one register."""

    kind: str
    a: int


@dataclass(frozen=True)
class Binary:
    """Append a function of two registers."""

    kind: str
    a: int
    b: int


@dataclass(frozen=True)
class Mix:
    """Append a sum of registers, each with a factor of its own."""

    registers: tuple[int, ...]


@dataclass(frozen=True)
class Halves:
    """Append both outputs of one built-in node."""

    a: int


@dataclass(frozen=True)
class Custom:
    """Append what a custom Function makes of two registers, two outputs for the kind `pair`."""

    kind: str
    a: int
    b: int
    site: int


@dataclass(frozen=True)
class Detach:
    """Append the register, cut off the graph."""

    a: int


@dataclass(frozen=True)
class InPlace:
    """Change the received tensor `a` in place, by `b` where the kind is `add_`."""

    kind: str
    a: int
    b: int


@dataclass(frozen=True)
class Hook:
    """Register a tensor hook on a register, if it requires grad."""

    kind: str
    a: int
    site: int


@dataclass(frozen=True)
class Keep:
    """Keep a register in a slot of this worker, for later calls."""

    a: int
    slot: int


@dataclass(frozen=True)
class Load:
    """Append what an earlier body kept on this worker."""

    slot: int


# --- steps that reach other workers ---------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """Call a worker, which runs `body`; append the tensors that it returns.

    Attributes:
        number: which call of the program.
        worker: index of the worker that is called; it may be the caller.
        args: registers of the caller that are sent; the same one may be there twice.
        body: what the worker does.
        returns: registers of the body that are sent back, where the outcome is TENSORS.
        outcome: how it ends.
        failures: how many times it fails before it is repeated and ends like that.
        no_grad: the caller makes it under `torch.no_grad`.
        in_threads: the worker computes in compute threads, not on its event loop.
    """

    number: int
    worker: int
    args: tuple[int, ...]
    body: tuple[Step, ...]
    returns: tuple[int, ...] = ()
    outcome: Outcome = Outcome.TENSORS
    failures: int = 0
    no_grad: bool = False
    in_threads: bool = False


@dataclass(frozen=True)
class Gather:
    """Make several calls at once; append what they return, in their order."""

    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Start:
    """Make a call and go on once its body has run; it returns when it is finished."""

    call: Call


@dataclass(frozen=True)
class Finish:
    """Let a started call return and append its tensors, or cancel it."""

    number: int
    cancels: bool


@dataclass(frozen=True)
class Root:
    """Where a pass begins: the sum of a register, or all of it with a gradient."""

    register: int
    is_sum: bool


@dataclass(frozen=True)
class Pass:
    """One call of `backward`.

    Attributes:
        roots: at least one.
        retain_graph: as for `backward`.
        fault: the site that raises in this pass; None where none does.
        meets_freed: it comes to what an earlier pass has freed.
    """

    roots: tuple[Root, ...]
    retain_graph: bool
    fault: int | None = None
    meets_freed: bool = False

    @property
    def fails(self) -> bool:
        """Whether it raises."""
        return self.fault is not None or self.meets_freed


@dataclass(frozen=True)
class Backward:
    """Run passes, all of them asked for at once."""

    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Collect:
    """Ask every worker for the gradients that this context has there by now."""


LocalStep = (
    UseLeaf
    | Constant
    | Unary
    | Binary
    | Mix
    | Halves
    | Custom
    | Detach
    | InPlace
    | Hook
    | Keep
    | Load
)
RemoteStep = Call | Gather | Start | Finish | Backward | Collect
Step = LocalStep | RemoteStep


# --- the whole ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A parameter.

    Attributes:
        worker: index of the worker that it lives on.
        hook: kind of its tensor hook, None where it has none.
        counts: it has a post-accumulate hook, which counts.
    """

    worker: int
    hook: str | None = None
    counts: bool = False


@dataclass(frozen=True)
class Program:
    """Everything that happens.

    Attributes:
        seed: of the leaves' values.
        leaves: all parameters.
        trainers: what each trainer does in a context of its own, all of them at once.
    """

    seed: int
    leaves: tuple[Leaf, ...]
    trainers: tuple[tuple[Step, ...], ...]


def leaf_site(leaf: int) -> int:
    """Return the site of a leaf's tensor hook; those in bodies are not negative."""
    return -1 - leaf


def calls_in(body: tuple[Step, ...]) -> Iterator[Call]:
    """Yield the calls that a body makes itself."""
    for step in body:
        if isinstance(step, Call):
            yield step
        elif isinstance(step, Gather):
            yield from step.calls
        elif isinstance(step, Start):
            yield step.call


def all_calls(body: tuple[Step, ...]) -> Iterator[Call]:
    """Yield the calls that a body makes, and those that these make in turn."""
    for call in calls_in(body):
        yield call
        yield from all_calls(call.body)


def all_passes(program: Program) -> Iterator[Pass]:
    """Yield every pass of every trainer, wherever it is asked for."""
    for body in program.trainers:
        yield from passes_in(body)


def passes_in(body: tuple[Step, ...]) -> Iterator[Pass]:
    """Yield the passes that a body, or one that it calls in turn, asks for."""
    for step in all_steps(body):
        if isinstance(step, Backward):
            yield from step.passes


def has_passes_in_any_order(program: Program) -> bool:
    """Tell whether it is open which pass comes first, and what calls are made before it."""
    return any(
        isinstance(step, Gather) and any(any(passes_in(call.body)) for call in step.calls)
        for body in program.trainers
        for step in all_steps(body)
    )


def all_steps(body: tuple[Step, ...]) -> Iterator[Step]:
    """Yield the steps of a body, and those of all that it calls in turn."""
    yield from body
    for call in all_calls(body):
        yield from call.body


def registers_read_by(step: Step) -> Iterator[int]:
    """Yield the registers that a step of a body reads."""
    match step:
        case Unary() | Halves() | Detach() | Hook() | Keep():
            yield step.a
        case Binary() | Custom() | InPlace():
            yield from (step.a, step.b)
        case Mix():
            yield from step.registers
        case Call() | Gather() | Start():
            for call in calls_in((step,)):
                yield from call.args
        case Backward():
            for one in step.passes:
                yield from (root.register for root in one.roots)
        case _:
            return


def registers_made_by(step: Step) -> int:
    """Return how many registers a step appends, where it does not finish a call."""
    match step:
        case Hook() | Keep() | InPlace() | Start() | Finish() | Backward() | Collect():
            return 0
        case Halves() | Custom(kind="pair"):
            return 2
        case Call():
            return len(step.returns) if step.outcome is Outcome.TENSORS else 0
        case Gather():
            return sum(map(registers_made_by, step.calls))
        case _:
            return 1
