"""The grammar of endpoints, and who can reach them."""

from __future__ import annotations

import socket

import pytest

from zmq_autograd.errors import ConfigurationError
from zmq_autograd.transport.endpoints import (
    MAX_IPC_PATH_BYTES,
    Endpoint,
    is_loopback,
    parse_dialled,
    parse_endpoint,
    tcp_endpoint,
)


@pytest.mark.parametrize(
    ("text", "scheme", "host", "port"),
    [
        ("tcp://127.0.0.1:0", "tcp", "127.0.0.1", 0),
        ("tcp://127.0.0.1:*", "tcp", "127.0.0.1", 0),
        ("tcp://*:5555", "tcp", "*", 5555),
        ("tcp://[::1]:65535", "tcp", "::1", 65535),
        ("tcp://node-3.cluster:5555", "tcp", "node-3.cluster", 5555),
        ("ipc:///run/za/bob", "ipc", "/run/za/bob", 0),
        ("ipc://@abstract", "ipc", "@abstract", 0),
        ("memory://bob", "memory", "bob", 0),
    ],
)
def test_an_endpoint_is_taken_apart(text: str, scheme: str, host: str, port: int) -> None:
    assert parse_endpoint(text) == Endpoint(text, scheme, host, port)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "tcp://host:port"),
        ("127.0.0.1:5555", "tcp://host:port"),
        ("udp://127.0.0.1:5555", "tcp://host:port"),
        ("TCP://127.0.0.1:5555", "tcp://host:port"),
        ("tcp://", "something after"),
        ("tcp://127.0.0.1", "a port"),
        ("tcp://127.0.0.1:", "a port"),
        ("tcp://127.0.0.1:65536", "a port from 0 to 65535"),
        ("tcp://127.0.0.1:-1", "a port from 0 to 65535"),
        ("tcp://127.0.0.1:٣", "a port from 0 to 65535"),
        ("tcp://127.0.0.1:5555 ", "no white space"),
        ("tcp://:5555", "a host name"),
        ("tcp://::1:5555", "in brackets"),
        ("tcp://[::1]", "a port"),
        ("tcp://[::g]:1", "IPv6 address"),
        ("tcp://a;b:1", "a host name"),
        ("ipc://", "something after"),
        ("ipc:///" + "x" * MAX_IPC_PATH_BYTES, "at most 107 bytes"),
        ("memory://", "something after"),
        (None, "tcp://host:port"),
    ],
)
def test_what_is_no_endpoint_is_named_with_what_was_expected(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_endpoint(text)
    assert repr(text) in str(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://*:5555"])
def test_a_peer_is_somewhere(text: str) -> None:
    with pytest.raises(ConfigurationError, match="the peer's"):
        parse_dialled(text)


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.255.3.4:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://[::ffff:127.0.0.1]:1", True),
        ("ipc:///run/bob", True),
        ("memory://bob", True),
        ("tcp://*:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://[fe80::1%1]:1", False),
        ("tcp://eth0:1", False),
    ],
)
def test_loopback_is_what_no_other_machine_reaches(text: str, loopback: bool) -> None:
    assert is_loopback(text) is loopback


@pytest.mark.parametrize(
    ("addresses", "loopback"),
    [(["127.0.0.1", "::1"], True), (["127.0.0.1", "10.0.0.1"], False), (["10.0.0.1"], False)],
)
def test_a_name_is_loopback_if_all_its_addresses_are(
    addresses: list[str], loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert is_loopback("tcp://some-name:1") is loopback


def test_ipv6_addresses_are_written_with_brackets() -> None:
    assert tcp_endpoint("::1", 5) == "tcp://[::1]:5"
    assert tcp_endpoint("127.0.0.1", "*") == "tcp://127.0.0.1:*"
