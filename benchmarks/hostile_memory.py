"""How much memory a hostile peer can make a listener hold, with the transport's guard and without.

libzmq delivers a message only when all of it has come, and keeps what has come until then.  A
stranger that speaks ZMTP by hand sends a message that never ends, or announces a huge frame; the
growth of the listening process's resident memory is read from the outside.  Runs on loopback, takes
about half a minute and prints one line per attack:

    python benchmarks/hostile_memory.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final
from unittest import mock
from urllib.parse import urlsplit

import psutil

from zmq_autograd.transport import Link, ZmqTransport
from zmq_autograd.transport.guard import Guard
from zmq_autograd.wire.limits import GIB, KIB, MIB

GREETING: Final = (
    b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
)
READY: Final = b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER"

ATTACKS: Final = {
    "endless message of empty frames": b"\x01\x00" * (MIB // 2),
    "endless message of 1 KiB frames": (b"\x03" + KIB.to_bytes(8, "big") + bytes(KIB)) * KIB,
    "one frame of 1 GiB": b"\x02" + GIB.to_bytes(8, "big") + bytes(MIB),
}

ATTACK_BYTES: Final = 24 * MIB
"""What each attack sends if nobody stops it: without the guard, empty frames turn it into 32 times
as much memory."""


class _Deaf:
    def frames_received(self, link: Link, frames: list[memoryview]) -> None:
        pass

    def message_refused(self, link: Link, reason: str) -> None:
        pass

    def link_lost(self, link: Link, reason: str) -> None:
        pass


async def _listen() -> None:
    transport = ZmqTransport()
    listener = await transport.listen("tcp://127.0.0.1:0", lambda link: _Deaf())
    print(listener.endpoint, flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def _victim(*, guarded: bool) -> Iterator[tuple[psutil.Process, str]]:
    command = [sys.executable, __file__, "--listen", *([] if guarded else ["--unguarded"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield psutil.Process(process.pid), process.stdout.readline().strip()
        finally:
            process.kill()


def attack(what: bytes, *, guarded: bool) -> tuple[int, int]:
    """Send `what` again and again; return bytes sent and the growth of resident memory at worst."""
    with _victim(guarded=guarded) as (process, endpoint):
        parts = urlsplit(endpoint)
        before = worst = process.memory_info().rss
        sent = 0
        with socket.create_connection((parts.hostname, parts.port or 0), timeout=2) as peer:
            peer.sendall(GREETING)
            peer.sendall(READY)
            time.sleep(0.1)  # messages before the handshake is over do not count for libzmq
            with contextlib.suppress(OSError):
                while sent < ATTACK_BYTES:
                    sent += peer.send(what)
                    worst = max(worst, process.memory_info().rss)
            ends = time.monotonic() + 0.5
            while time.monotonic() < ends:
                worst = max(worst, process.memory_info().rss)
                time.sleep(0.002)
        return sent, worst - before


def main() -> None:
    """Run every attack on a guarded and an unguarded listener."""
    for name, what in ATTACKS.items():
        for guarded in (True, False):
            sent, grown = attack(what, guarded=guarded)
            print(
                f"{name}, {'guarded' if guarded else 'unguarded'}: "
                f"{sent / MIB:.1f} MiB sent, memory grew by {grown / MIB:.1f} MiB"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="memory that a hostile peer can take")
    parser.add_argument("--listen", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--unguarded", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.listen:
        main()
    elif arguments.unguarded:
        with mock.patch.object(Guard, "watch"):
            asyncio.run(_listen())
    else:
        asyncio.run(_listen())
