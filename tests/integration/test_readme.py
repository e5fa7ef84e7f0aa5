"""What the README shows runs, and prints what its comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "link", re.findall(r"\]\(((?:docs|examples)/[^)]*)\)", (ROOT / "README.md").read_text())
)
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
