"""What the page on moving from torch.distributed.rpc shows runs, on torch as well as here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
TEXT = PAGE.read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SECONDS = 60


def test_the_page_has_programs_both_ways() -> None:
    on_torch = ["import torch.distributed.rpc" in snippet for snippet in SNIPPETS]
    assert on_torch == [False] + [True, False] * 5


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_prints_what_its_comments_say(snippet: str, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(snippet)
    # What torch warns of in its own modules is no matter of ours.
    warnings = "ignore" if "import torch.distributed" in snippet else "error"
    done = subprocess.run(
        [sys.executable, "-W", warnings, script],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"print\(.*\)  # (.*)", snippet)
    assert expected
    assert done.stdout.splitlines() == expected


def test_the_programs_of_a_pair_print_the_same() -> None:
    printed = [re.findall(r"print\(.*\)  # (.*)", snippet) for snippet in SNIPPETS[1:]]
    assert printed[::2] == printed[1::2]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+\.md)\)", TEXT))
def test_links_lead_somewhere(link: str) -> None:
    assert (PAGE.parent / link).exists()
