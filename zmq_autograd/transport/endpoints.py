"""Endpoints: what ``tcp://host:port``, ``ipc://path`` and ``memory://name`` mean.

Owns the grammar of endpoints and the question whether one can be reached from other machines.
Opens nothing.  What is done with an endpoint is in `zmq_autograd.transport.zmq` and
`zmq_autograd.transport.memory`.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from typing import Final

from zmq_autograd.errors import ConfigurationError

SCHEMES: Final = ("tcp", "ipc", "memory")

MAX_PORT: Final = 65535

MAX_IPC_PATH_BYTES: Final = 107
"""Length of a Unix socket's path: the field in ``sockaddr_un`` less its closing zero."""

WILDCARD: Final = "*"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint, taken apart.

    Attributes:
        text: as it was written.
        scheme: one of `SCHEMES`.
        host: tcp: host name, address without brackets, or `WILDCARD`; ipc: path; memory: name.
        port: tcp: port, 0 for a free one; 0 for the other schemes.
    """

    text: str
    scheme: str
    host: str
    port: int = 0


def parse_endpoint(text: str) -> Endpoint:
    """Take `text` apart.

    Raises:
        ConfigurationError: it is no endpoint; the message says what was expected.
    """
    scheme, separator, rest = text.partition("://") if isinstance(text, str) else ("", "", "")
    if not separator or scheme not in SCHEMES:
        raise _malformed(text, "tcp://host:port, ipc://path or memory://name")
    if not rest or any(character.isspace() or character == "\0" for character in rest):
        raise _malformed(text, f"something after {scheme}:// and no white space in it")
    if scheme == "tcp":
        host, port = _parse_tcp(text, rest)
        return Endpoint(text, scheme, host, port)
    if scheme == "ipc" and len(os.fsencode(rest)) > MAX_IPC_PATH_BYTES:
        raise _malformed(text, f"a path of at most {MAX_IPC_PATH_BYTES} bytes")
    return Endpoint(text, scheme, rest)


def parse_dialled(text: str) -> Endpoint:
    """Take `text` apart as the endpoint of a peer, which must say where that is.

    Raises:
        ConfigurationError: it is no endpoint, or one that only a listener can have.
    """
    endpoint = parse_endpoint(text)
    if endpoint.scheme == "tcp" and endpoint.port == 0:
        raise _malformed(text, "the peer's port")
    if endpoint.scheme == "tcp" and endpoint.host == WILDCARD:
        raise _malformed(text, "the peer's host")
    return endpoint


def is_loopback(text: str) -> bool:
    """Say whether `text` can be reached from this machine alone.

    A host name is resolved, which may block; one that does not resolve, or not to loopback
    addresses alone, is not loopback.

    Raises:
        ConfigurationError: it is no endpoint.
    """
    endpoint = parse_endpoint(text)
    if endpoint.scheme != "tcp":
        return True
    if endpoint.host == WILDCARD:
        return False
    try:
        return _is_loopback_address(endpoint.host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(endpoint.host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(_is_loopback_address(str(address[0])) for *_, address in found)


def tcp_endpoint(host: str, port: int | str) -> str:
    """Write a TCP endpoint, with brackets where the host is an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _parse_tcp(text: str, rest: str) -> tuple[str, int]:
    host, separator, port = rest.rpartition(":")
    if not separator or not port or port.endswith("]"):
        raise _malformed(text, "a port, as in tcp://127.0.0.1:5555; 0 takes a free one")
    if port == WILDCARD:
        port = "0"
    if not port.isascii() or not port.isdigit() or int(port) > MAX_PORT:
        raise _malformed(text, f"a port from 0 to {MAX_PORT}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise _malformed(text, "an IPv6 address in the brackets") from error
    elif not host or not set(host).isdisjoint(":[]/@;,"):
        raise _malformed(text, "a host name, an address, or an IPv6 address in brackets")
    return host, int(port)


def _malformed(text: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"endpoint {text!r}: expected {expected}")
