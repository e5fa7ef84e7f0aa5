"""Every example is run as a user runs it, and what it claims is checked.

It knows the examples by their command lines, output and files only.  That the same script runs on
several machines is shown in `test_multi_host.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import psutil
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE = 100

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start examples, each in a process group of its own, and end these groups afterwards."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [sys.executable, EXAMPLES / script, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield start_one
    for process in processes:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def members(group: int) -> list[psutil.Process]:
    """Return the processes of a process group that still run."""
    running = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return running


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for success and return both outputs; nothing of the example may still run."""
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    assert members(process.pid) == []
    return output, errors


def test_every_example_is_covered_here() -> None:
    text = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text] == []


def test_hello_calls_across_workers(start: Start) -> None:
    assert finish(start("hello.py")) == ("tensor([2., 2., 2.])\n", "")


def test_hello_fits_in_the_readme() -> None:
    lines = (EXAMPLES / "hello.py").read_text().splitlines()
    assert len(lines) < 25


def test_bare_transport_shows_what_it_says(start: Start) -> None:
    alice, bob = finish(start("bare_transport.py"))
    # Sent once, resent over the retained graph, and then through both outputs.
    assert bob.splitlines() == [
        "bob: got [tensor(1.), None], now weight.grad is 6.0",
        "bob: got [tensor(1.), None], now weight.grad is 12.0",
        "bob: got [tensor(1.), tensor(1.)], now weight.grad is 45.0",
    ]
    error = alice.partition("alice: ")[2]
    assert error.startswith("RuntimeError on worker 'bob': ")
    assert "backward through the graph a second time" in error
    assert "Remote traceback" in error
    assert "torch.autograd.backward" in error


def test_bare_transport_is_short() -> None:
    assert len((EXAMPLES / "bare_transport.py").read_text().splitlines()) <= 60


def test_multi_node_equals_one_process(start: Start, tmp_path: Path) -> None:
    output, errors = finish(start("multi_node.py", "--output", tmp_path))
    assert errors == ""

    with np.load(tmp_path / "multi_node.npz", allow_pickle=False) as file:
        ours = dict(file)
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as file:
        reference = dict(file)
    assert ours.keys() == reference.keys()
    for name, weight in reference.items():
        assert weight.dtype == np.float64
        np.testing.assert_allclose(ours[name], weight, rtol=0, atol=1e-12, err_msg=name)
    assert len(ours["losses"]) >= 10
    assert ours["losses"][-1] < ours["losses"][0] / 10
    assert ours["accuracy"] > 0.95

    said = re.search(r"largest difference of a weight: (\S+) \(of 6 tensors\)", output)
    assert said is not None
    assert float(said[1]) <= 1e-12
    picture = matplotlib.image.imread(tmp_path / "multi_node.png")
    height, width, _ = picture.shape
    assert height > 400
    assert width > 600
    assert picture.std() > 0.01  # something is drawn


def test_reference_knows_nothing_of_this_package() -> None:
    # `multi_node.py` runs it, above; what it says is worth something only if it is independent.
    text = (EXAMPLES / "multi_node_reference.py").read_text()
    imports = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE))
    assert {"torch", "sklearn"} <= imports
    assert imports <= {
        "__future__",
        "argparse",
        "collections",
        "pathlib",
        "numpy",
        "torch",
        "sklearn",
    }


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_multi_node_leaves_no_process(
    start: Start, tmp_path: Path, signum: signal.Signals
) -> None:
    process = start("multi_node.py", "--epochs", "100000", "--output", tmp_path)
    # It prints this when the stages are linked, which is before the first batch.
    assert process.stdout is not None
    assert "training" in process.stdout.readline()
    assert len(members(process.pid)) == 4
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert errors.strip() == "stopped"
    assert members(process.pid) == []


def test_lost_stage_ends_multi_node_with_its_name(start: Start, tmp_path: Path) -> None:
    process = start("multi_node.py", "--epochs", "100000", "--output", tmp_path)
    assert process.stdout is not None
    assert "training" in process.stdout.readline()
    (stage,) = [p for p in members(process.pid) if p.cmdline()[-2:] == ["--serve", "1"]]
    stage.kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "stage1" in errors.splitlines()[-1]
    assert members(process.pid) == []
