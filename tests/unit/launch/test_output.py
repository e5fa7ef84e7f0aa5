"""Output of processes: cut into whole lines, whatever the pieces it comes in."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmq_autograd.launch.output import LinePrefixer, Printer, relay


def prefixed(chunks: list[bytes], **options: int) -> bytes:
    lines = LinePrefixer(b"[3] ", **options)
    return b"".join(lines.feed(chunk) for chunk in chunks) + lines.finish()


def test_every_line_carries_the_prefix() -> None:
    assert prefixed([b"one\ntwo\n"]) == b"[3] one\n[3] two\n"


def test_a_line_in_pieces_is_put_together() -> None:
    assert prefixed([b"o", b"n", b"e\nt", b"wo\n"]) == b"[3] one\n[3] two\n"


def test_a_half_line_is_held_back() -> None:
    assert LinePrefixer(b"[3] ").feed(b"done\nhalf") == b"[3] done\n"


def test_a_last_line_without_newline_is_ended() -> None:
    assert prefixed([b"one\nlast"]) == b"[3] one\n[3] last\n"


def test_empty_lines_stay() -> None:
    assert prefixed([b"\n\n"]) == b"[3] \n[3] \n"


def test_nothing_gives_nothing() -> None:
    assert prefixed([]) == b""


def test_a_huge_line_is_broken_rather_than_held_in_memory() -> None:
    lines = LinePrefixer(b"[3] ", max_line_bytes=10)
    assert lines.feed(b"x" * 10) == b"[3] xxxxxxxxxx\n"
    assert lines.feed(b"yy\n") == b"[3] yy\n"


@given(st.lists(st.text("ab\n", max_size=8).map(str.encode), max_size=8))
def test_the_result_does_not_depend_on_the_pieces(chunks: list[bytes]) -> None:
    assert prefixed(chunks) == prefixed([b"".join(chunks)])


@given(st.binary(max_size=64))
def test_the_bytes_survive(data: bytes) -> None:
    *lines, rest = prefixed([data]).split(b"\n")
    assert rest == b""
    assert all(line.startswith(b"[3] ") for line in lines)
    ended = data if data.endswith(b"\n") or not data else data + b"\n"
    assert b"".join(line.removeprefix(b"[3] ") + b"\n" for line in lines) == ended


async def test_relayed_streams_never_share_a_line() -> None:
    read_end, write_end = os.pipe()
    printer = Printer()
    readers = [asyncio.StreamReader() for _ in range(2)]
    relays = [
        asyncio.create_task(relay(reader, printer, write_end, b"[%d] " % rank))
        for rank, reader in enumerate(readers)
    ]
    for piece in (b"he", b"llo\n", b"world"):
        for reader in readers:
            reader.feed_data(piece)
        await asyncio.sleep(0)
    for reader in readers:
        reader.feed_eof()
    async with asyncio.timeout(5):
        await asyncio.gather(*relays)
    printer.close()
    os.close(write_end)
    lines = os.read(read_end, 4096).splitlines()
    os.close(read_end)
    assert sorted(lines) == [b"[0] hello", b"[0] world", b"[1] hello", b"[1] world"]


async def test_a_closed_descriptor_is_told_to_the_writer() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    printer = Printer()
    with pytest.raises(BrokenPipeError):
        await printer.write(write_end, b"lost")
    printer.close()
    os.close(write_end)


async def test_a_stalled_descriptor_does_not_stall_the_loop() -> None:
    read_end, write_end = os.pipe()
    printer = Printer()
    data = b"x" * 1_000_000  # more than a pipe holds
    writing = asyncio.create_task(printer.write(write_end, data))
    await asyncio.sleep(0)
    assert (printer.busy, writing.done()) == (True, False)
    received = 0
    while received < len(data):
        received += len(await asyncio.to_thread(os.read, read_end, 65536))
    async with asyncio.timeout(5):
        await writing
    assert (printer.busy, writing.done()) == (False, True)
    printer.close()
    os.close(write_end)
    os.close(read_end)
