"""What the README shows runs, and prints what its comments say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_readme_has_programs() -> None:
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_prints_what_its_comments_say(snippet: str, tmp_path: Path) -> None:
    expected = re.findall(r"print\(.*\)  # (.*)", snippet)
    script = tmp_path / "snippet.py"
    script.write_text(snippet)
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert expected
    assert done.stdout.splitlines() == expected


def test_the_first_program_is_short() -> None:
    assert len(SNIPPETS[0].splitlines()) < 35


def test_the_first_program_is_the_example() -> None:
    example = (ROOT / "examples" / "first_backward.py").read_text()
    assert SNIPPETS[0].strip() == example.split('"""', 2)[2].strip()


def test_the_training_of_what_lives_elsewhere_is_that_of_one_process() -> None:
    (snippet,) = [snippet for snippet in SNIPPETS if "DistributedOptimizer" in snippet]
    torch.manual_seed(0)
    trunk, head = nn.Linear(2, 2), nn.Linear(2, 1)
    scale = torch.ones(2, requires_grad=True)
    parameters = [scale, *trunk.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        y = head(trunk(torch.eye(2)) * scale)
        loss = (y - torch.tensor([[1.0], [2.0]])).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert f"# {loss.item():.4f}\n" in snippet


@pytest.mark.parametrize(
    "link", re.findall(r"\]\(((?:docs|examples)/[^)]*)\)", (ROOT / "README.md").read_text())
)
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
