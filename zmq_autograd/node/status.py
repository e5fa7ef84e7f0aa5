"""What a worker says of itself: plain values, for people and programs to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zmq_autograd.engine import Context

if TYPE_CHECKING:
    from zmq_autograd.node.channel import Channel
    from zmq_autograd.node.node import Node


def status_of(node: Node) -> dict[str, Any]:
    """Return what `node` is doing now: its sessions, contexts and passes."""
    return {
        "name": node.me.name,
        "incarnation": node.me.incarnation,
        "endpoints": list(node.endpoints),
        "peers": [channel.peer.name for channel in node.channels],
        "sessions": [_session(channel) for channel in node.channels],
        "contexts": [_context(context) for context in node.contexts],
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


def _context(context: Context) -> dict[str, Any]:
    running = context.running
    awaited = None if running is None else running.awaited()
    return {
        "context_id": context.context_id,
        "parent": None if context.parent is None else context.parent.name,
        "peers": [peer.name for peer in context.peers],
        "sends": len(context.record.sends),
        "receives": len(context.record.receives),
        "gradients": len(context.record.gradients),
        "pass": None
        if running is None or awaited is None
        else {
            "pass_id": running.pass_id,
            "message_ids": sorted(awaited.message_ids),
            "workers": sorted(awaited.workers),
        },
    }
