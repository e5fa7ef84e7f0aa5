"""Each test that ``docs/traps.md`` names is there, and each test written for a trap is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

NAMED = re.findall(r"`(\S+\.py)::(\w+)`", (TESTS.parent / "docs" / "traps.md").read_text("utf-8"))


def found_in(file: str) -> set[str]:
    """Return the names of the tests in `file`, which is relative to ``tests/``."""
    tree = ast.parse((TESTS / file).read_text("utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = {node.name for node in tree.body if isinstance(node, functions)}
    return {name for name in names if name.startswith("test_")}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_is_named_is_there(file: str) -> None:
    assert {name for at, name in NAMED if at == file} <= found_in(file)


def test_every_row_names_a_test() -> None:
    rows = [
        line
        for line in (TESTS.parent / "docs" / "traps.md").read_text("utf-8").splitlines()
        if line.startswith("| ") and line != "| trap | here | test |"
    ]
    assert rows
    assert [row for row in rows if ".py::test_" not in row.rsplit("|", 2)[-2]] == []


def test_every_test_of_a_trap_is_named() -> None:
    named = {name for file, name in NAMED if file == "integration/test_traps.py"}
    assert named == found_in("integration/test_traps.py")
