"""The script of a program has one name in all of its processes, however they were started."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from zmq_autograd.compat.rpc.names import Names

SCRIPT = """
def double(x):
    return 2 * x

class Counter:
    def add(self, n):
        return n
"""


@pytest.fixture(params=["__main__", "__mp_main__"])
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the script as a process has it, by that name."""
    module = ModuleType(request.param)
    exec(SCRIPT, vars(module))
    for name in ("__main__", module.__name__):  # as `multiprocessing` has it in a spawned process
        monkeypatch.setitem(sys.modules, name, module)
    return module


def test_names_are_those_of_the_parent(script: Any) -> None:
    names = Names()
    assert names.name_of(script.double) == "__main__:double"
    assert names.name_of(script.Counter) == "__main__:Counter"


def test_what_is_allowed_is_found_by_these_names(script: Any) -> None:
    names = Names()
    names.allow_module(script.__name__)
    assert names.find("__main__:double") is script.double
    assert names.find("__main__:Counter.add") is script.Counter.add
    assert names.method_of(script.Counter(), "add")(3) == 3


def test_what_is_registered_is_found_by_these_names(script: Any) -> None:
    names = Names()
    names.register(script.Counter)
    assert names.find("__main__:Counter") is script.Counter
    assert names.find("__main__:Counter.add") is script.Counter.add
    assert names.method_of(script.Counter(), "add")(3) == 3
