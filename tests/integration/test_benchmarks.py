"""The benchmarks of distributed backward run, and notice gradients that are wrong.

They are run as their users run them, with `--quick`: what is checked is that they measure what they
say, not how fast anything is.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DEADLINE = 100


def run(script: str, output: Path) -> tuple[str, dict[str, Any]]:
    """Run a benchmark; return what it printed and what it reported."""
    process = subprocess.Popen(
        [sys.executable, BENCHMARKS / script, "--quick", "--output", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, errors
    with pytest.raises(ProcessLookupError):  # its processes are gone, too
        os.killpg(process.pid, signal.SIGKILL)
    return printed, json.loads(output.read_text())


def check_report(report: dict[str, Any], teams: set[str], parts: set[str]) -> None:
    """Check that every team measured every part of every task in each round, and was right."""
    assert report["seconds"].keys() == report["differences"].keys()
    for task, by_team in report["seconds"].items():
        assert by_team.keys() == report["differences"][task].keys() == teams
        assert max(report["differences"][task].values()) < 1e-5
        for by_part in by_team.values():
            for part in parts:
                assert len(by_part[part]) == report["rounds"]
                assert all(0 <= seconds < 10 for seconds in by_part[part])
            for step, forward in zip(by_part["step"], by_part["forward"], strict=True):
                assert 0 < forward < step


def test_split_mlp_compares_four_ways_to_train(tmp_path: Path) -> None:
    printed, report = run("split_mlp.py", tmp_path / "report.json")
    teams = {"zmq_autograd", "torch", "by hand", "one process"}
    check_report(report, teams, {"step", "forward", "backward", "leave"})
    for task, ratios in report["ratio"].items():
        assert task in printed
        assert ratios.keys() == teams - {"zmq_autograd"}
        assert all(ratio > 0 for ratio in ratios.values())


def test_chain_grows_with_its_workers(tmp_path: Path) -> None:
    printed, report = run("chain.py", tmp_path / "report.json")
    teams = {"zmq_autograd", "torch", "by hand"}
    check_report(report, teams, {"step", "forward", "backward"})
    assert list(report["seconds"]) == ["1", "2"]
    assert report["per_worker"].keys() == teams
    assert "each further worker" in printed


def test_profile_accounts_for_the_whole_step(tmp_path: Path) -> None:
    printed, report = run("profile_pass.py", tmp_path / "report.json")
    assert len(report["differences"]) == 2
    assert max(report["differences"]) < 1e-5
    assert "the engine's own of it" in printed
    for place in ("trainer", "worker"):
        assert report["messages"][place]["PropagateGradientsRequest"] == 1
        seconds = report["seconds"][place]
        whole, hops = seconds.pop("all"), seconds.pop("hops between threads")
        assert hops > 0
        assert whole / 2 < sum(seconds.values()) < whole
        for row, spent in seconds.items():
            assert row in printed
            assert spent > 0


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import what the benchmarks compare gradients with."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers.model")


def test_wrong_gradients_are_noticed(model: Any) -> None:
    part = model.Part(model.Model(batch=2, width=3, layers=1), 1, 2)
    right = dict(zip(part.parameters, model.reference(part.model, 2)[1], strict=True))
    assert part.difference(right) == 0
    weight, bias = part.parameters
    assert part.difference({weight: right[weight]}) == float("inf")
    assert part.difference(right | {torch.zeros(3): right[bias]}) == float("inf")
    assert part.difference(right | {bias: torch.zeros(3)}) == 1
    assert part.difference(right | {bias: right[bias] * torch.nan}) == float("inf")
