"""The rendezvous store: real ones, on ports of the loopback address."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from zmq_autograd.errors import (
    ConfigurationError,
    DeadlineExceeded,
    ProtocolError,
    WorkerLost,
)
from zmq_autograd.launch.environment import Environment, rank_variables, read_environment
from zmq_autograd.launch.store import Entry, exchange, host_store, open_store


def place(rank: int, world_size: int, port: int) -> Environment:
    return read_environment(rank_variables(rank, world_size, master_port=port, run_id="run"))


def entry(rank: int) -> Entry:
    return Entry(rank, f"worker{rank}", (f"tcp://127.0.0.1:{rank + 1}",), "ab" * 16)


def soon(seconds: float = 10) -> float:
    return asyncio.get_running_loop().time() + seconds


async def join(environment: Environment, seconds: float = 10) -> list[Entry]:
    store = await open_store(environment, soon(seconds))
    return await exchange(store, environment, entry(environment.rank), soon(seconds))


async def test_every_rank_learns_of_all_in_order() -> None:
    store = host_store("127.0.0.1", 0)
    found = await asyncio.gather(*(join(place(rank, 3, store.port)) for rank in (2, 0, 1)))
    assert found == [[entry(0), entry(1), entry(2)]] * 3


async def test_rank_0_hosts_the_store_when_no_agent_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = [replace(place(rank, 2, port), agent_store=False) for rank in range(2)]
    waiting = asyncio.create_task(join(places[1]))  # before there is a store
    await asyncio.sleep(0)
    assert await join(places[0]) == await waiting


async def test_a_second_time_does_not_meet_the_first() -> None:
    store = host_store("127.0.0.1", 0)
    await join(place(0, 1, store.port))
    environment = place(0, 1, store.port)
    later = replace(entry(0), incarnation="cd" * 16)
    assert await exchange(store, environment, later, soon()) == [later]


async def test_another_restart_does_not_meet_the_one_before() -> None:
    store = host_store("127.0.0.1", 0)
    first = place(0, 1, store.port)
    await exchange(store, first, entry(0), soon())
    with pytest.raises(DeadlineExceeded):
        await exchange(store, replace(first, world_size=2, restart_count=1), entry(0), soon(0))


async def test_absent_ranks_are_named_when_time_is_over() -> None:
    store = host_store("127.0.0.1", 0)
    with pytest.raises(
        DeadlineExceeded, match=r"expected 4 ranks.* rank 0, rank 2, rank 3"
    ) as info:
        await join(place(1, 4, store.port), seconds=0.2)
    assert info.value.workers == ("rank 0", "rank 2", "rank 3")


async def test_who_hosts_the_store_waits_until_all_have_read_it() -> None:
    store = host_store("127.0.0.1", 0)
    host = replace(place(0, 2, store.port), agent_store=False)
    store.set("zmq_autograd/run/0/1/1", entry(1).encode())
    hosting = asyncio.create_task(exchange(store, host, entry(0), soon()))
    assert await asyncio.wait([hosting], timeout=0.2) == (set(), {hosting})
    store.add("zmq_autograd/run/0/1/readers", 1)
    assert await hosting == [entry(0), entry(1)]


async def test_an_absent_store_is_told_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with asyncio.timeout(5):
        with pytest.raises(DeadlineExceeded, match=rf"store at 127\.0\.0\.1:{port}, got .*Connect"):
            await open_store(place(1, 2, port), soon(0.2))


async def test_a_port_in_use_is_a_configuration_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127\.0\.0\.1:{port}, got .*in use"):
            host_store("127.0.0.1", port)


async def test_a_lost_store_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    store = host_store("127.0.0.1", 0)
    environment = place(1, 2, store.port)
    client = await open_store(environment, soon())
    del store
    with pytest.raises(WorkerLost, match="store failed"):
        await exchange(client, environment, entry(1), soon())
    capfd.readouterr()  # torch prints a stack trace of its own


async def test_nonsense_in_the_store_is_a_protocol_error() -> None:
    store = host_store("127.0.0.1", 0)
    store.set("zmq_autograd/run/0/1/1", "nonsense")
    with pytest.raises(ProtocolError, match="entry of rank 1"):
        await join(place(0, 2, store.port))


def test_an_entry_survives_its_text() -> None:
    unusual = Entry(7, 'é"\n', ("tcp://[::1]:5", "ipc:///x"), "ab" * 16)
    assert Entry.decode(unusual.encode().encode(), 7) == unusual


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"rank": 1, "name": "b", "endpoints": [], "incarnation": "a"}',
        b'{"rank": 1, "name": "b", "endpoints": ["e", 5], "incarnation": "a"}',
        b'{"rank": 1, "name": 5, "endpoints": ["e"], "incarnation": "a"}',
        b'{"rank": 2, "name": "b", "endpoints": ["e"], "incarnation": "a"}',
    ],
)
def test_a_garbled_entry_is_a_protocol_error(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="entry of rank 1"):
        Entry.decode(text, 1)


def test_the_store_of_a_loopback_host_is_closed_to_the_network() -> None:
    store = host_store("127.0.0.1", 0)
    with pytest.raises(ConnectionRefusedError), socket.socket() as other:
        other.connect(("127.0.0.2", store.port))  # would reach a listener on every address
