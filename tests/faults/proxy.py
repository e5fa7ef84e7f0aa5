"""A TCP proxy between two workers that does on purpose what networks do by accident."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

_CHUNK: Final = 32 * 1024


class Proxy:
    """Passes bytes on between those that connect to it and one target, until told otherwise."""

    def __init__(self, target: str, *, bytes_per_second: float | None = None) -> None:
        """Pass bytes on to the endpoint `target`, each way no faster than said."""
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._bytes_per_second = bytes_per_second
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self._sockets: list[socket.socket] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.endpoint = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._accepting = asyncio.create_task(self._accept())

    def hold(self) -> None:
        """Take nothing in and pass nothing on any more; the system still acknowledges for it."""
        self._flowing.clear()

    async def finish(self) -> None:
        """End all connections in good order (FIN)."""
        await self._stop()
        for each in self._sockets:
            each.close()

    async def reset(self) -> None:
        """Break all connections (RST)."""
        await self._stop()
        for each in self._sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()

    async def _stop(self) -> None:
        tasks = [self._accepting, *self._pumps]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._listening.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(self._listening)
            far = socket.socket()
            self._sockets += [near, far]
            for each in (near, far):
                each.setblocking(False)
                # What waits in buffers travels at the speed of memory: keep that little.
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK)
            await loop.sock_connect(far, self._target)
            for source, sink in ((near, far), (far, near)):
                pump = asyncio.create_task(self._pump(source, sink))
                self._pumps.add(pump)
                pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(source, _CHUNK):
                await self._flowing.wait()
                if self._bytes_per_second is not None:
                    await asyncio.sleep(len(data) / self._bytes_per_second)
                await loop.sock_sendall(sink, data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return  # one of the two has broken the connection


@asynccontextmanager
async def proxied(target: str, *, bytes_per_second: float | None = None) -> AsyncIterator[Proxy]:
    """Run a proxy."""
    proxy = Proxy(target, bytes_per_second=bytes_per_second)
    try:
        yield proxy
    finally:
        await proxy.finish()
