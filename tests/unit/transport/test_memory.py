"""What the transport in memory offers beyond the contract: links cut and stalled on purpose."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from zmq_autograd.transport import Link, MemoryLink, MemoryTransport


@dataclass
class Heard:
    """Counts what a handler hears."""

    headers: list[bytes] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        self.headers.append(bytes(frames[0]))

    def message_refused(self, link: Link, reason: str) -> None:
        raise AssertionError(reason)

    def link_lost(self, link: Link, reason: str) -> None:
        self.losses.append(reason)


async def _join(name: str) -> tuple[MemoryTransport, MemoryLink, Heard, MemoryLink, Heard]:
    transport = MemoryTransport()
    far_heard, near_heard = Heard(), Heard()
    far: list[Link] = []

    def accept(link: Link) -> Heard:
        far.append(link)
        return far_heard

    await transport.listen(f"memory://{name}", accept)
    near = await transport.dial(f"memory://{name}", near_heard, timeout=1)
    assert isinstance(far[0], MemoryLink)
    return transport, near, near_heard, far[0], far_heard


async def _turns() -> None:
    """Let everything that is scheduled run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_cut_loses_what_was_under_way_and_both_ends_hear_of_it() -> None:
    transport, near, near_heard, _far, far_heard = await _join("cut")
    near.send([b"lost"])
    near.cut("pulled the plug")
    await _turns()
    assert far_heard == Heard([], ["pulled the plug"])
    assert near_heard == Heard([], ["pulled the plug"])
    await transport.close()


async def test_a_stalled_end_hears_nothing_until_it_goes_on() -> None:
    transport, near, near_heard, far, far_heard = await _join("stall")
    far.stall()
    near.send([b"1"])
    near.send([b"2"])
    near.close()
    await _turns()
    assert far_heard == Heard()
    far.resume()
    await _turns()
    assert far_heard == Heard([b"1", b"2"], ["the connection was closed by the peer or broke"])
    assert near_heard == Heard()
    await transport.close()


async def test_names_are_free_again_after_closing() -> None:
    for _ in range(3):
        transport, *_ = await _join("again")
        await transport.close()
