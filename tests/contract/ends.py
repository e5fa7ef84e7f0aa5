"""Two transports with a link between them, for tests of what every transport promises."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tests.contract.recorder import Recorder
from zmq_autograd.transport import Link, Listener, Transport, Transports
from zmq_autograd.wire.limits import DEFAULT_LIMITS, Limits


@dataclass
class Ends:
    """Two transports with one link between them, both ends admitted."""

    near_transport: Transport
    far_transport: Transport
    listener: Listener
    near: Link
    far: Link
    near_heard: Recorder
    far_heard: Recorder


@contextlib.asynccontextmanager
async def connected(endpoint: str, limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[Ends]:
    """Join two transports by a link whose far end has heard a first message."""
    near_transport, far_transport = Transports(limits), Transports(limits)
    far_heard, near_heard = Recorder(), Recorder()

    def accept(link: Link) -> Recorder:
        link.admit()
        return far_heard

    try:
        listener = await far_transport.listen(endpoint, accept)
        near = await near_transport.dial(listener.endpoint, near_heard, timeout=5)
        near.admit()
        near.send([b"first"])
        await far_heard.until_messages(1)
        far_heard.messages.clear()
        far = far_heard.link
        assert far is not None
        yield Ends(near_transport, far_transport, listener, near, far, near_heard, far_heard)
    finally:
        await near_transport.close()
        await far_transport.close()
