"""The autograd graph of one context over all the workers that share it, as Graphviz text (DOT).

Owns what each worker tells of its part, whom it asks for theirs, and how the whole is written down.
Workers are asked along the way that the context came: up to the parent, down to those that got it
from the asking one.  Those ways are a tree, so each worker is asked once, whatever the calls were.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from torch.autograd.graph import Node

from zmq_autograd.autograd.functions import leaf_of, receive_of
from zmq_autograd.autograd.walk import walk
from zmq_autograd.engine.host import Host, Peer
from zmq_autograd.errors import ProtocolError, ZmqAutogradError
from zmq_autograd.wire.limits import short
from zmq_autograd.wire.messages import ForwardRequest, ForwardResponse

if TYPE_CHECKING:
    from zmq_autograd.engine.local_context import LocalContext

T = TypeVar("T")

logger = logging.getLogger("zmq_autograd")

GRAPH_FUNCTION: Final = "za.graph"
"""The name by which a worker asks another one for its part and for those behind."""

GRAPH_SECONDS: Final = 5.0
"""Seconds that who draws the graph waits for the others."""

PATIENCE: Final = 0.75
"""How much of these a worker that is asked waits for those behind it, so that what it knows itself
still arrives in time."""

MAX_NUMBERS: Final = 16_000
"""Numbers in one answer at most: what a message's header has room for."""


@dataclass(frozen=True, slots=True)
class SendNode:
    """One send function.

    Attributes:
        message_id: the message.
        nbytes: bytes of its tensors.
        is_freed: a pass has freed at least a part of the graph that it leads to.
        leaves: how many leaves it leads to.
        receives: ids of the messages whose receive functions it leads to.
    """

    message_id: int
    nbytes: int
    is_freed: bool = False
    leaves: int = 0
    receives: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class WorkerGraph:
    """One worker's part of the graph.

    Attributes:
        name: the worker.
        sends: its send functions.
        receives: ids of the messages that it has receive functions for.
        silent: names of workers that it could not ask, or that did not answer.
        left_out: how many functions are not listed, because there are too many.
    """

    name: str
    sends: Sequence[SendNode] = ()
    receives: Sequence[int] = ()
    silent: Sequence[str] = ()
    left_out: int = 0


# --- collecting ----------------------------------------------------------------------------------


async def collect(
    context: LocalContext, host: Host, asker: Peer | None = None, seconds: float = GRAPH_SECONDS
) -> list[WorkerGraph]:
    """Return this worker's part of the graph, and the parts of all behind it.

    Args:
        context: this worker's view of the context.
        host: this worker.
        asker: who asks this worker for it, and so need not be asked.
        seconds: how long to wait for the others.
    """
    peers = [peer for peer in context.peers if peer is not asker]
    answers = await asyncio.gather(*(_ask(peer, context, seconds) for peer in peers))
    behind: list[WorkerGraph] = []
    silent: list[str] = []
    for peer, parts in zip(peers, answers, strict=True):
        if parts is None:
            silent.append(peer.name)
        else:
            behind += parts
    return [replace(await _part_of(context, host), silent=silent), *behind]


async def answer(
    context: LocalContext,
    host: Host,
    asker: Peer,
    committed: int,
    seconds: float,
    *,
    is_parent: bool,
) -> list[Any]:
    """Return what `collect` finds, as values that can travel; nothing to who is not next to it.

    Args:
        context: this worker's view of the context.
        host: this worker.
        asker: who asks, one of those that share the context.
        committed: the last pass that the asker knows to be complete; the answer is from after it.
        seconds: how long the asker waits.
        is_parent: the asker says that it got the context from this worker.
    """
    if not is_parent and asker is not context.parent:
        return []
    context.passes.learn_committed(committed)
    await context.passes.until_committed()
    parts = await collect(context, host, asker, PATIENCE * seconds)
    return [_plain(part) for part in _within_limit(parts)]


async def _ask(peer: Peer, context: LocalContext, seconds: float) -> list[WorkerGraph] | None:
    """Return what `peer` answers, None if that is nothing that can be used."""
    args = (context.context_id, context.passes.committed, seconds, peer is context.parent)
    try:
        reply = await peer.request(ForwardRequest(GRAPH_FUNCTION, args, {}), timeout=seconds)
        if not isinstance(reply, ForwardResponse) or not isinstance(reply.result, list):
            raise ProtocolError(f"expected a list, got {short(reply)}")
        return [_part_from(plain) for plain in reply.result]
    except ZmqAutogradError:
        logger.debug("worker %r did not tell of its graph", peer.name, exc_info=True)
        return None  # the drawing says that it lacks it


async def _part_of(context: LocalContext, host: Host) -> WorkerGraph:
    sends = list(context.record.sends.values())
    roots = [[edge.node for edge in send.edges if edge is not None] for send in sends]
    found = await host.compute(lambda: _reached(roots))
    nodes = [
        SendNode(send.message_id, send.nbytes, bool(send.freed), leaves, receives)
        for send, (leaves, receives) in zip(sends, found, strict=True)
    ]
    return WorkerGraph(host.name, nodes, list(context.record.receives))


def _reached(roots: Sequence[Sequence[Node]]) -> list[tuple[int, list[int]]]:
    """Return for each list of roots how many leaves it leads to, and ids of received messages."""
    graph = walk(node for nodes in roots for node in nodes)
    masks = [0] * len(graph.nodes)
    for bit, nodes in enumerate(roots):
        for node in nodes:
            masks[graph.numbers[node]] |= 1 << bit
    leaves = [0] * len(roots)
    # Each at most once, although each tensor of a message has a node of its own.
    receives: list[dict[int, None]] = [{} for _ in roots]
    for number, node in enumerate(graph.nodes):
        for slot in graph.nexts[number]:
            if slot is not None:
                masks[slot[0]] |= masks[number]
        receive = receive_of(node)
        if leaf_of(node) is not None:
            for bit in _bits(masks[number]):
                leaves[bit] += 1
        elif receive is not None:
            for bit in _bits(masks[number]):
                receives[bit][receive.message_id] = None
    return [(count, list(ids)) for count, ids in zip(leaves, receives, strict=True)]


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


# --- travelling ----------------------------------------------------------------------------------


def _within_limit(parts: Iterable[WorkerGraph]) -> Iterator[WorkerGraph]:
    """Yield `parts`, without the functions of those that no longer fit into one answer."""
    numbers = 0
    for part in parts:
        own = len(part.receives) + sum(4 + len(send.receives) for send in part.sends)
        if numbers + own <= MAX_NUMBERS:
            numbers += own
            yield part
        else:
            left_out = part.left_out + len(part.sends) + len(part.receives)
            yield replace(part, sends=(), receives=(), left_out=left_out)


def _plain(part: WorkerGraph) -> list[Any]:
    sends = [
        [send.message_id, send.nbytes, send.is_freed, send.leaves, *send.receives]
        for send in part.sends
    ]
    receives, silent = list(part.receives), list(part.silent)
    return [part.name, sends, receives, silent, part.left_out]


def _part_from(plain: Any) -> WorkerGraph:
    match plain:
        case [str(name), [*sends], [*receives], [*silent], int(left_out)]:
            nodes = [_send_from(send) for send in sends]
            return WorkerGraph(name, nodes, _all(int, receives), _all(str, silent), left_out)
    raise ProtocolError(f"expected a worker's part of a graph, got {short(plain)}")


def _send_from(plain: Any) -> SendNode:
    match plain:
        case [int(message_id), int(nbytes), bool(is_freed), int(leaves), *receives]:
            return SendNode(message_id, nbytes, is_freed, leaves, _all(int, receives))
    raise ProtocolError(f"expected a send function, got {short(plain)}")


def _all(kind: type[T], values: Iterable[Any]) -> list[T]:
    """Return `values`, all of which must be of one kind."""
    checked = list(values)
    for value in checked:
        if not isinstance(value, kind):
            raise ProtocolError(f"expected {kind.__name__}, got {short(value)}")
    return checked


# --- writing it down -----------------------------------------------------------------------------


def to_dot(context_id: int, parts: Iterable[WorkerGraph]) -> str:
    """Return the graph that `parts` make up, as Graphviz text.

    Edges lead where gradients flow: within a worker from send functions to receive functions,
    between workers from the receive function of a message to its send function.
    """
    workers = sorted(parts, key=lambda part: part.name)
    lines = [f"digraph {_quoted(f'context {context_id}')} {{"]
    lines.append(f"  label={_quoted(*_title(context_id, workers))}")
    lines += ["  rankdir=LR", "  node [shape=box]"]
    for number, part in enumerate(workers):
        lines += _cluster(number, part)
    lines += _edges_between(workers)
    return "\n".join([*lines, "}"]) + "\n"


def _title(context_id: int, workers: Sequence[WorkerGraph]) -> list[str]:
    there = {part.name for part in workers}
    silent = sorted({name for part in workers for name in part.silent} - there)
    left_out = [part for part in workers if part.left_out]
    return [
        f"context {context_id}",
        *(f"without worker {name}, which is lost or did not answer" for name in silent),
        *(f"without {part.left_out:,} functions of worker {part.name}" for part in left_out),
    ]


def _cluster(number: int, part: WorkerGraph) -> Iterator[str]:
    """Yield the lines of one worker: its functions, and the edges between them."""
    yield f"  subgraph cluster_{number} {{"
    yield f"    label={_quoted(part.name)}"
    receives = dict(_receives(number, part))
    for message_id, node in receives.items():
        yield f'    {node} [label="RecvRpcBackward", tooltip={_quoted(f"message {message_id}")}]'
    for send, node in _sends(number, part):
        yield f"    {node} [{_send_attributes(send)}]"
        for message_id in send.receives:
            if message_id in receives:
                yield f"    {node} -> {receives[message_id]}"
    yield "  }"


def _send_attributes(send: SendNode) -> str:
    tooltip = f"message {send.message_id}"
    if send.is_freed:
        tooltip += ", whose graph a pass has freed"
        return f'label="SendRpcBackward", style=dashed, tooltip={_quoted(tooltip)}'
    leaves = "1 leaf" if send.leaves == 1 else f"{send.leaves:,} leaves"
    return f"label={_quoted('SendRpcBackward', leaves)}, tooltip={_quoted(tooltip)}"


def _edges_between(workers: Sequence[WorkerGraph]) -> Iterator[str]:
    receives: dict[int, str] = {}
    for number, part in enumerate(workers):
        receives.update(_receives(number, part))
    for number, part in enumerate(workers):
        for send, node in _sends(number, part):
            if send.message_id in receives:
                # The last digits tell messages apart well enough; the tooltip has the whole id.
                label = _quoted(f"{send.message_id:016x}"[-8:], f"{send.nbytes:,} B")
                tooltip = _quoted(f"message {send.message_id}")
                attributes = f"label={label}, tooltip={tooltip}, labeltooltip={tooltip}"
                yield f"  {receives[send.message_id]} -> {node} [{attributes}]"


def _sends(number: int, part: WorkerGraph) -> Iterator[tuple[SendNode, str]]:
    """Yield the send functions of worker `number`, each with its node in the drawing."""
    return ((send, f"w{number}_send{n}") for n, send in enumerate(part.sends))


def _receives(number: int, part: WorkerGraph) -> Iterator[tuple[int, str]]:
    return ((message_id, f"w{number}_recv{n}") for n, message_id in enumerate(part.receives))


def _quoted(*lines: str) -> str:
    """Return `lines` as one string of DOT; whatever they hold stands for itself."""
    texts = []
    for line in lines:
        text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
        for char, escape in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;")):
            text = text.replace(char, escape)
        texts.append(text)
    return '"' + "\\n".join(texts) + '"'
