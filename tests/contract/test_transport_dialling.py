"""What every transport promises of endpoints: listening, dialling, giving up."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.contract.ends import connected
from tests.contract.recorder import DEADLINE_SECONDS, Recorder
from zmq_autograd.errors import ConfigurationError, WorkerLost
from zmq_autograd.transport import LINGER_SECONDS, Transports


async def test_dialling_waits_for_a_listener(endpoint: str, tmp_path: Path) -> None:
    late, early, heard = Transports(), Transports(), Recorder()
    try:
        probe = await late.listen(endpoint, lambda link: Recorder())
        known = probe.endpoint
        await late.close()
        late = Transports()
        dialling = asyncio.create_task(early.dial(known, heard, timeout=5))
        await asyncio.sleep(0.05)
        assert not dialling.done()
        await late.listen(known, lambda link: Recorder())
        link = await dialling
        assert link.address == known
        started = time.monotonic()
        await early.close()
        assert time.monotonic() - started < LINGER_SECONDS + 1
    finally:
        await early.close()
        await late.close()


async def left(endpoint: str) -> str:
    """Return an endpoint on which somebody has listened."""
    transport = Transports()
    try:
        listener = await transport.listen(endpoint, lambda link: Recorder())
        return listener.endpoint
    finally:
        await transport.close()


async def test_dialling_nobody_raises_in_time(endpoint: str) -> None:
    known = await left(endpoint)
    transport = Transports()
    try:
        with pytest.raises(WorkerLost, match=r"refused, tried for 0.3 s") as caught:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await transport.dial(known, Recorder(), timeout=0.3)
        assert caught.value.name == known
    finally:
        await transport.close()


async def test_a_cancelled_dial_leaves_nothing(endpoint: str) -> None:
    known = await left(endpoint)
    transport = Transports()
    try:
        for pause in [0.0, 0.001, 0.02, 0.1]:
            dialling = asyncio.create_task(transport.dial(known, Recorder(), timeout=None))
            await asyncio.sleep(pause)
            dialling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dialling
        assert asyncio.all_tasks() == {asyncio.current_task()}
    finally:
        started = time.monotonic()
        await transport.close()
        assert time.monotonic() - started < LINGER_SECONDS + 1


async def test_dials_given_up_disturb_no_other_link(endpoint: str) -> None:
    """A socket given up at the wrong moment can stop libzmq's thread, and with it every link."""
    async with connected(endpoint) as ends:
        absent = "ipc:///no/such/socket" if endpoint.startswith("ipc") else "tcp://127.0.0.1:1"
        for turn in range(1, 21):
            dials = [
                asyncio.create_task(ends.near_transport.dial(absent, Recorder(), timeout=None))
                for _ in range(5)
            ]
            await asyncio.sleep(0.001 * (turn % 4))
            for dial in dials:
                dial.cancel()
            await asyncio.gather(*dials, return_exceptions=True)
            ends.near.send([b"%d" % turn])
            ends.far.send([b"%d" % turn])
            await ends.far_heard.until_messages(turn)
            await ends.near_heard.until_messages(turn)


async def test_a_dial_under_way_ends_when_the_transport_is_closed(endpoint: str) -> None:
    transport = Transports()
    listener = await transport.listen(endpoint, lambda link: Recorder())
    known = listener.endpoint
    await transport.close()
    transport = Transports()
    dialling = asyncio.create_task(transport.dial(known, Recorder(), timeout=None))
    await asyncio.sleep(0.03)
    await transport.close()
    async with asyncio.timeout(1):
        with pytest.raises(WorkerLost):
            await dialling


async def test_a_taken_endpoint_is_refused(endpoint: str) -> None:
    transport = Transports()
    try:
        listener = await transport.listen(endpoint, lambda link: Recorder())
        with pytest.raises(ConfigurationError, match="in use"):
            await transport.listen(listener.endpoint, lambda link: Recorder())
    finally:
        await transport.close()


async def test_a_closed_listener_ends_its_links_and_frees_its_endpoint(endpoint: str) -> None:
    async with connected(endpoint) as ends:
        ends.listener.close()
        ends.listener.close()
        await ends.near_heard.until(lambda: bool(ends.near_heard.losses))
        await ends.far_transport.close()
        again = Transports()
        try:
            await again.listen(ends.listener.endpoint, lambda link: Recorder())
        finally:
            await again.close()
        assert not ends.far_heard.losses
