"""PyTorch's RPC tutorial programs, with only their imports changed, give the same numbers on both.

Each is run as a user runs it, over TensorPipe and over this package, and every number that the two
print is compared: losses, accuracies, weights.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "examples" / "tutorials"
SECONDS = 100.0
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def run(script: str, on: str) -> tuple[list[str], str]:
    """Run a tutorial; return the lines that its processes printed, in a fixed order, and stderr."""
    process = subprocess.Popen(
        [sys.executable, TUTORIALS / script, "--on", on],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
    return sorted(output.splitlines()), errors


def numbers(lines: list[str]) -> list[float]:
    """Return all numbers in a text."""
    return [float(number) for number in NUMBER.findall("\n".join(lines))]


@pytest.mark.timeout(2 * SECONDS + 20)
@pytest.mark.parametrize(
    ("script", "least", "relative"),
    [
        ("end_to_end.py", 40, 0.0),
        ("rnn.py", 30, 0.0),
        ("parameter_server.py", 20, 0.0),
        # torch adds up the gradients of forward passes that ran in several threads in an order that
        # changes from run to run, on torch.distributed.rpc too: the last bits of the weights do.
        ("reinforcement.py", 20, 1e-9),
    ],
)
def test_the_numbers_are_those_of_torch(script: str, least: int, relative: float) -> None:
    expected, _ = run(script, "torch")
    found, errors = run(script, "zmq_autograd")
    assert errors == ""
    assert NUMBER.sub("0", "\n".join(found)) == NUMBER.sub("0", "\n".join(expected))
    assert len(numbers(expected)) >= least
    assert numbers(found) == pytest.approx(numbers(expected), rel=relative, abs=0)


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.py")), ids=lambda path: path.name)
def test_only_the_imports_differ(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    (switch,) = [node for node in body if isinstance(node, ast.If) and "--on" in ast.unparse(node)]
    *imports, allowed = switch.orelse
    assert ast.unparse(allowed) == "rpc.allow_module(__name__)"
    assert all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in [*switch.body, *imports])
    rest = [ast.unparse(node) for node in body[1:] if node is not switch]
    assert [
        text for text in rest if re.search(r"zmq_autograd|torch\.distributed\b|--on", text)
    ] == []
