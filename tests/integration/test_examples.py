"""Every example is run as a user runs it, and what it claims is checked.

It knows the examples by their command lines, output and files only.  Elsewhere: that the training
runs on several machines, in `test_multi_host.py`; and "first_backward.py", which is the README's
first program, in `test_readme.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import psutil
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DEADLINE = 100

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start examples in `tmp_path`, each in a process group that is ended afterwards."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(script: str, *arguments: str) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [sys.executable, EXAMPLES / script, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
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


def test_blocking_equals_one_process(start: Start) -> None:
    output, errors = finish(start("blocking.py"))
    assert errors == ""
    loss, difference = re.findall(r": ([\d.e+-]+)\n", output)
    assert float(loss) < 0.5
    assert float(difference) == 0


def test_remote_module_equals_one_process(start: Start) -> None:
    output, errors = finish(start("remote_module.py"))
    assert errors == ""
    _, score, of_logits, of_state = re.findall(r": ([\d.e+-]+)$", output, re.MULTILINE)
    assert float(score) > 0.85
    assert float(of_logits) < 1e-12
    assert float(of_state) == 0


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


def unused_result_rows(output: str) -> list[list[str]]:
    """Return the cells of the table that `unused_result.py` prints."""
    rows = [re.split(r" {2,}", line.strip()) for line in output.splitlines()]
    return [row for row in rows if len(row) == 3]


def test_unused_result_hangs_torch_and_not_this(start: Start) -> None:
    output, errors = finish(start("unused_result.py", "--seconds", "2"))
    assert errors == ""
    rows = unused_result_rows(output)
    right = re.compile(r"(\d+\.\d) ms: \[2\.0, 4\.0, 6\.0\]")
    assert [row[0] for row in rows] == [
        "every result is used",
        "one result is unused",
        "a call is tried again",
    ]
    for _, ours, _ in rows:
        found = right.fullmatch(ours)
        assert found is not None, output
        assert float(found[1]) < 1000
    # torch gets on with the first, so its processes are set up as they should be.
    assert right.fullmatch(rows[0][2])
    assert [row[2] for row in rows[1:]] == ["killed after 2 s"] * 2
    assert without_numbers(shown_in_the_readme("unused_result.py")) == without_numbers(output)


def shown_in_the_readme(script: str) -> str:
    """Return the output of an example that the README shows."""
    readme = (ROOT / "README.md").read_text()
    shown = re.search(rf"```console\n\$ python examples/{script}\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    return shown[1]


def without_numbers(text: str) -> list[str]:
    """Return the lines of a text, with every number and rule the same, and no padding."""
    return [re.sub(r"[\d.]+|─+", "0", " ".join(line.split())) for line in text.split("\n")]


def test_draw_graph_draws_three_workers_and_six_messages(start: Start, tmp_path: Path) -> None:
    output, errors = finish(start("draw_graph.py"))
    assert errors == ""
    graph = (tmp_path / "output" / "graph.dot").read_text()
    assert output.startswith(graph)
    workers = re.findall(r'subgraph cluster_\d+ {\n *label="(\w+)"', graph)
    assert sorted(workers) == ["alice", "bob", "carol"]
    # The input of 4 x 8 floats goes three ways, the 4 scores come back the same ways.
    messages = re.findall(r' -> .*label="[0-9a-f]{8}\\n(\d+) B"', graph)
    assert sorted(messages) == ["128"] * 3 + ["16"] * 3
    assert (tmp_path / "output" / "graph.svg").exists() == (shutil.which("dot") is not None)


def test_bare_gradients_equal_one_process(start: Start) -> None:
    output, errors = finish(start("bare_gradients.py", "--epochs", "1"))
    assert errors == ""
    assert output.splitlines()[-1] == "largest difference of a weight: 0.0e+00 (of 6 tensors)"


def test_multi_node_equals_one_process(start: Start, tmp_path: Path) -> None:
    said, errors = finish(start("multi_node.py", "--epochs", "3", "--output", "found"))
    assert errors == ""

    output = tmp_path / "found"
    with np.load(output / "multi_node.npz", allow_pickle=False) as file:
        ours = dict(file)
    with np.load(output / "reference.npz", allow_pickle=False) as file:
        reference = dict(file)
    assert ours.keys() == reference.keys()
    for name, weight in reference.items():
        assert weight.dtype == np.float64
        # Bitwise: what arrives lies in memory as torch's own does, so all kernels do the same.
        np.testing.assert_array_equal(ours[name], weight, err_msg=name)
    assert len(ours["losses"]) == 3
    assert ours["losses"][-1] < ours["losses"][0] / 4
    assert ours["accuracy"] > 0.9

    assert "largest difference of a weight: 0.0e+00 (of 6 tensors)" in said
    picture = matplotlib.image.imread(output / "multi_node.png")
    height, width, _ = picture.shape
    assert height > 400
    assert width > 600
    assert picture.std() > 0.01  # something is drawn


def test_parameter_server_loses_no_update(start: Start) -> None:
    output, errors = finish(start("parameter_server.py", "--epochs", "2"))
    assert errors == ""
    before, *trained, after, check = output.splitlines()
    assert sorted(line.split(",")[0] for line in trained) == [
        f"trainer {rank}: epoch {epoch}" for rank in range(3) for epoch in (1, 2)
    ]
    scores = [
        float(line.removeprefix(f"{when}: test accuracy "))
        for when, line in (("before", before), ("after", after))
    ]
    assert scores[0] < 0.3
    assert scores[1] > 0.75
    difference = check.removeprefix("largest difference of a weight from the sum of all updates: ")
    assert float(difference) < 1e-12


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


@pytest.mark.parametrize(
    ("script", "said", "signum"),
    [
        # While processes are starting, ...
        ("multi_node.py", "starting", signal.SIGINT),
        ("parameter_server.py", "before", signal.SIGINT),
        ("unused_result.py", "loss =", signal.SIGTERM),
        # ... and when the stages are linked, which is before the first batch.
        ("multi_node.py", "training over", signal.SIGTERM),
    ],
)
def test_stopped_example_leaves_no_process(
    start: Start, script: str, said: str, signum: signal.Signals
) -> None:
    process = start(script)
    read_until(process, said)
    if said == "training over":
        assert len(members(process.pid)) >= 4
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert errors.strip() == "stopped"
    assert members(process.pid) == []


def test_lost_stage_ends_multi_node_with_its_name(start: Start) -> None:
    process = start("multi_node.py", "--epochs", "100000")
    read_until(process, "training over")
    (stage,) = [p for p in members(process.pid) if p.cmdline()[-2:] == ["--serve", "1"]]
    stage.kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "stage1" in errors.splitlines()[-1]
    assert members(process.pid) == []


def read_until(process: subprocess.Popen[str], said: str) -> None:
    """Read until a line that starts with `said`."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(said):
            return
    pytest.fail(f"ended before it said {said!r}")
