"""Output of several processes on one terminal: whole lines, each with its process in front.

Owns the cutting into lines and the thread that writes them.  Knows nothing of processes: it reads
any `asyncio.StreamReader` and writes to any file descriptor.  Used by `launch.local`.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from concurrent.futures import Future
from typing import Final

__all__ = ["MAX_LINE_BYTES", "LinePrefixer", "Printer", "relay"]

MAX_LINE_BYTES: Final = 1024 * 1024
"""A line longer than this is broken into several, so that memory stays bounded."""

CHUNK_BYTES: Final = 64 * 1024


class LinePrefixer:
    """Cuts a stream of bytes into lines and puts a prefix in front of each."""

    def __init__(self, prefix: bytes, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._prefix = prefix
        self._max_line_bytes = max_line_bytes
        # The line that has not ended yet; shorter than `max_line_bytes` between calls.
        self._partial = bytearray()

    def feed(self, chunk: bytes) -> bytes:
        """Take in some bytes and return the lines that they complete, prefixed."""
        *ended, rest = chunk.split(b"\n")
        lines = []
        for end in ended:
            lines.append(bytes(self._partial) + end)
            self._partial.clear()
        self._partial += rest
        if len(self._partial) >= self._max_line_bytes:
            lines.append(bytes(self._partial))
            self._partial.clear()
        return b"".join(b"%b%b\n" % (self._prefix, line) for line in lines)

    def finish(self) -> bytes:
        """Return the last line if the stream ended without a newline, prefixed and ended."""
        return self.feed(b"\n") if self._partial else b""


class Printer:
    """Writes to file descriptors from one thread, one piece after the other.

    A terminal or pipe that takes nothing stalls this thread, never the event loop; and as there is
    one thread for all descriptors, two of them that lead to the same place never share a line.  The
    thread is a daemon and writes past Python's buffers, so that a stalled one cannot hold up the
    end of the process.
    """

    def __init__(self) -> None:
        self._pieces: queue.SimpleQueue[tuple[int, bytes, Future[None]] | None]
        self._pieces = queue.SimpleQueue()
        self._writing = 0
        threading.Thread(target=self._run, name="launch-printer", daemon=True).start()

    async def write(self, descriptor: int, data: bytes) -> None:
        """Write all of `data`, returning once it is written.

        Cancelling waits no longer; the data is written all the same unless that had not begun.

        Raises:
            OSError: the descriptor takes no more, as with a closed pipe.
        """
        if not data:
            return
        written: Future[None] = Future()
        self._pieces.put((descriptor, data, written))
        self._writing += 1
        try:
            await asyncio.wrap_future(written)
        finally:
            self._writing -= 1

    @property
    def busy(self) -> bool:
        """Whether somebody waits in `write`: the descriptors take less than they are given."""
        return self._writing > 0

    def close(self) -> None:
        """Let the thread end once everything is written; does not wait for it."""
        self._pieces.put(None)

    def _run(self) -> None:
        while piece := self._pieces.get():
            descriptor, data, written = piece
            if written.set_running_or_notify_cancel():
                try:
                    _write_all(descriptor, data)
                except OSError as error:
                    written.set_exception(error)
                else:
                    written.set_result(None)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


async def relay(
    reader: asyncio.StreamReader, printer: Printer, descriptor: int, prefix: bytes
) -> None:
    """Print what a process writes, line by line, until it closes its end.

    Reading waits for writing, so a process that writes faster than the terminal takes is slowed
    down by its pipe, as it would be without a launcher.

    Raises:
        OSError: the descriptor takes no more.
    """
    lines = LinePrefixer(prefix)
    while chunk := await reader.read(CHUNK_BYTES):
        await printer.write(descriptor, lines.feed(chunk))
    await printer.write(descriptor, lines.finish())
