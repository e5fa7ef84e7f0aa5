"""What a worker says of itself: plain values for programs, and the same as text for people.

Owns how much it says, which never is more than one message has room for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from zmq_autograd.engine import LocalContext
from zmq_autograd.engine.distributed_pass import Awaited
from zmq_autograd.errors import ProtocolError

if TYPE_CHECKING:
    from zmq_autograd.node.channel import Channel
    from zmq_autograd.node.node import Node

MAX_BYTES: Final = 80 * 1024
"""What all sessions, and all contexts, may take: some 400 of each.  Together they, and the names
that are told twice, fit into the header of one message, whatever they are called."""

MAX_LISTED: Final = 20
"""How many peers, passes, messages or workers are listed of one context or pass."""


def status_of(node: Node) -> dict[str, Any]:
    """Return what `node` is doing now; `Worker.status` says what each key means."""
    sessions = sorted(map(_session, node.channels), key=lambda s: (s["peer"], s["address"]))
    listed = _fitting(sessions)
    contexts = _fitting(map(_context, node.contexts))
    return {
        "name": node.me.name,
        "incarnation": node.me.incarnation,
        "endpoints": list(node.endpoints),
        "peers": [session["peer"] for session in listed],
        "sessions": listed,
        "sessions_left_out": len(sessions) - len(listed),
        "contexts": contexts,
        "contexts_left_out": len(node.contexts) - len(contexts),
        "rrefs": node.rrefs.status(),
    }


def _session(channel: Channel) -> dict[str, Any]:
    return {
        "peer": channel.peer.name,
        "incarnation": channel.peer.incarnation,
        "address": channel.address,
        "bytes_sent": channel.bytes_sent,
        "bytes_received": channel.bytes_received,
        "requests_sent": channel.requests_sent,
        "requests_received": channel.requests_received,
    }


def _context(context: LocalContext) -> dict[str, Any]:
    return {
        "context_id": context.context_id,
        "parent": None if context.parent is None else context.parent.name,
        **_first("peers", [peer.name for peer in context.peers]),
        "sends": len(context.record.sends),
        "receives": len(context.record.receives),
        "gradients": len(context.record.gradients),
        **_first("passes", _passes(context)),
    }


def _passes(context: LocalContext) -> list[dict[str, Any]]:
    passes = []
    if context.passes.running is not None:
        passes.append(
            _pass(context.passes.running.pass_id, "running", context.passes.running.awaited())
        )
    if context.passes.staged is not None:
        passes.append(_pass(context.passes.staged.pass_id, "complete here", Awaited()))
    return passes + [_pass(pass_id, "queued", Awaited()) for pass_id in context.passes.queued]


def _pass(pass_id: int, state: str, awaited: Awaited) -> dict[str, Any]:
    return {
        "pass_id": pass_id,
        "state": state,
        **_first("message_ids", sorted(awaited.message_ids)),
        **_first("workers", sorted(awaited.workers)),
    }


def _first(key: str, items: Sequence[Any]) -> dict[str, Any]:
    """Return the first of `items`, and how many more there are."""
    return {key: list(items[:MAX_LISTED]), f"{key}_left_out": max(0, len(items) - MAX_LISTED)}


def _fitting(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first of `entries`: as many as there is room for."""
    fitting = []
    left = MAX_BYTES
    for entry in entries:
        left -= len(json.dumps(entry))  # more than it takes in a message
        if left < 0:
            break
        fitting.append(entry)
    return fitting


# --- for people ----------------------------------------------------------------------------------


def as_text(status: Any) -> str:
    """Return what `status_of` returned, here or on another worker, as lines of text.

    Raises:
        ProtocolError: it is nothing that `status_of` returns.
    """
    try:
        return "\n".join(_lines(status)) + "\n"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(
            f"expected a status as this version tells it, got another one ({error!r}): see --json"
        ) from error


def _lines(status: dict[str, Any]) -> Iterator[str]:
    yield f"worker       {_clean(status['name'])}"
    yield f"incarnation  {_clean(status['incarnation'])}"
    yield f"listens on   {_names(status, 'endpoints')}"
    rrefs = ", ".join(f"{count:,} {what}" for what, count in status["rrefs"].items())
    yield f"rrefs        {rrefs}"
    sessions, contexts = status["sessions"], status["contexts"]
    yield from _table(
        "sessions",
        status["sessions_left_out"],
        ["peer", "address", "bytes sent", "bytes received", "requests to it", "from it"],
        [
            [
                *(_clean(session[key]) for key in ("peer", "address")),
                *(f"{session[key]:,}" for key in ("bytes_sent", "bytes_received")),
                *(f"{session[key]:,}" for key in ("requests_sent", "requests_received")),
            ]
            for session in sessions
        ],
    )
    yield from _table(
        "contexts",
        status["contexts_left_out"],
        ["context", "parent", "peers", "sends", "receives", "gradients"],
        [
            [
                f"{context['context_id']:d}",
                "-" if context["parent"] is None else _clean(context["parent"]),
                _names(context, "peers"),
                *(f"{context[key]:,}" for key in ("sends", "receives", "gradients")),
            ]
            for context in contexts
        ],
    )
    yield from _table(
        "passes",
        sum(context["passes_left_out"] for context in contexts),
        ["pass", "context", "state", "waits for workers", "waits for messages"],
        [
            [
                f"{running['pass_id']:d}",
                f"{context['context_id']:d}",
                _clean(running["state"]),
                _names(running, "workers"),
                _names(running, "message_ids"),
            ]
            for context in contexts
            for running in context["passes"]
        ],
    )


def _names(entry: dict[str, Any], key: str) -> str:
    names = [_clean(str(name)) for name in entry[key]]
    left_out = entry.get(f"{key}_left_out", 0)
    return ", ".join([*names, *([f"and {left_out:,} more"] if left_out else [])]) or "-"


def _table(title: str, left_out: int, head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield a title and an aligned table, numbers to the right."""
    yield ""
    yield f"{title}: {len(rows) + left_out:,}"
    if rows:
        columns = list(zip(head, *rows, strict=True))
        aligned = [_column(cells) for cells in columns]
        yield from ("  " + "  ".join(cells).rstrip() for cells in zip(*aligned, strict=True))
    if left_out:
        yield f"  and {left_out:,} more"


def _column(cells: Sequence[str]) -> list[str]:
    width = max(map(len, cells))
    are_numbers = all(cell.replace(",", "").isdecimal() for cell in cells[1:])
    return [cell.rjust(width) if are_numbers else cell.ljust(width) for cell in cells]


def _clean(text: str) -> str:
    """Return `text` without what would move a terminal's cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)
