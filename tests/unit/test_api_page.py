"""docs/api.md has every name that a program imports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import zmq_autograd as za

PAGE = Path(__file__).parents[2] / "docs" / "api.md"

ELSEWHERE = {
    "blocking": r"`za\.blocking`",
    "wire": r"zmq_autograd\.wire\.",
    "messages": r"messages$",
}
"""Modules, and what the page says of them."""

ERRORS = r"automodule:: zmq_autograd\.errors$"


@pytest.mark.parametrize("name", za.__all__)
def test_every_public_name_is_there(name: str) -> None:
    is_error = isinstance(getattr(za, name), type) and issubclass(getattr(za, name), Exception)
    directive = ERRORS if is_error else ELSEWHERE.get(name, rf"auto(class|function):: {name}$")
    assert re.search(directive, PAGE.read_text(), re.MULTILINE), name
