"""The worker that an operator names: found, or told in one line why not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from zmq_autograd import Worker
from zmq_autograd.cli import main
from zmq_autograd.errors import ConfigurationError
from zmq_autograd.launch.serve import load_worker, serve

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules into the current directory; what is imported of them is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write_module(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    yield write_module
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_a_worker_is_found_in_a_module_of_the_current_directory(write: Write) -> None:
    write("served/inner.py", "import zmq_autograd as za\nbob = za.Worker('bob')\n")
    worker = load_worker("served.inner:bob")
    assert isinstance(worker, Worker)
    assert worker.name == "bob"


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("served", "expected package.module:worker, got 'served'"),
        (":bob", "expected package.module:worker, got ':bob'"),
        ("served:", "expected package.module:worker, got 'served:'"),
        (".served:bob", "expected package.module:worker, got '.served:bob'"),
        ("absent:bob", "no module named 'absent'"),
        ("absent.inner:bob", "no module named 'absent'"),
        ("served.absent:bob", "no module named 'served.absent'"),
        ("served:alice", "module 'served' has nothing named 'alice'"),
        ("served:number", "expected served:number to be a Worker, got int"),
    ],
)
def test_an_operator_s_mistake_is_told_in_a_line(
    write: Write, capsys: pytest.CaptureFixture[str], reference: str, problem: str
) -> None:
    write("served.py", "number = 5\n")
    assert main(["worker", reference]) == 1
    assert capsys.readouterr().err == f"zmq-autograd: worker: {problem}\n"


def test_a_module_that_imports_what_is_not_there_shows_where(write: Write) -> None:
    write("served.py", "import absent_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        load_worker("served:bob")


def test_a_worker_that_would_listen_beyond_this_machine_is_refused(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("served.py", "import zmq_autograd as za\nbob = za.Worker('bob')\n")
    assert main(["worker", "served:bob", "--listen", "tcp://0.0.0.0:0"]) == 1
    assert "beyond this machine" in capsys.readouterr().err


async def test_a_worker_that_listens_nowhere_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'bob' listens nowhere: use --listen"):
        await serve(Worker("bob"), lambda endpoints: None)


async def test_a_worker_is_closed_when_nobody_reads_where_it_listens() -> None:
    worker = Worker("bob", listen="tcp://127.0.0.1:0")
    told: list[str] = []

    def announce(endpoints: Sequence[str]) -> None:
        told.extend(endpoints)
        raise BrokenPipeError("nobody reads this")

    with pytest.raises(BrokenPipeError):
        await serve(worker, announce)
    assert told[0].startswith("tcp://127.0.0.1:")
    assert worker.endpoints == []
