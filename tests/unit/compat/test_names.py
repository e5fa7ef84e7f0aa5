"""Functions and classes by name: only what was registered or allowed is found, and only by name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from zmq_autograd.compat.rpc.errors import CannotTravel, NotAllowed
from zmq_autograd.compat.rpc.names import Names

SOURCE = """
import os
import subprocess
from os import system
from torch import load

def double(x):
    return 2 * x

def decorated(function):
    import functools
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

@decorated
def triple(x):
    return 3 * x

class Counter:
    step = 1
    _shell = os.system

    def __init__(self, start):
        self.value = start

    def add(self, n):
        self.value += n
        return self.value

    @staticmethod
    def half(x):
        return x / 2

    @classmethod
    def made(cls, start):
        return cls(start)

    @property
    def secret(self):
        return 1

    class Inner:
        pass

class Net(__import__("torch").nn.Module):
    def forward(self, x):
        return x

class Failure(Exception):
    pass

alias = Counter
"""


@pytest.fixture
def program() -> Iterator[Any]:
    """A program's module, as if it had been imported."""
    module = ModuleType("a_program")
    exec(compile(SOURCE, "a_program.py", "exec"), vars(module))
    sys.modules["a_program"] = module
    yield module
    del sys.modules["a_program"]


@pytest.fixture
def names() -> Names:
    """The names of a process that allowed the program's module."""
    names = Names()
    names.allow_module("a_program")
    return names


@pytest.mark.parametrize(
    "key",
    ["double", "triple", "Counter", "Counter.add", "Counter.half", "Counter.Inner", "alias", "Net"],
)
def test_what_an_allowed_module_defines_is_found(program: Any, names: Names, key: str) -> None:
    found: Any = program
    for part in key.split("."):
        found = getattr(found, part)
    assert names.find(f"a_program:{key}") is found


def test_class_methods_come_bound(program: Any, names: Names) -> None:
    made = names.find("a_program:Counter.made")(3)
    assert isinstance(made, program.Counter)
    assert made.value == 3


@pytest.mark.parametrize(
    "name",
    [
        "a_program:os",
        "a_program:system",
        "a_program:load",
        "a_program:subprocess",
        "a_program:os.system",
        "a_program:subprocess.Popen",
        "a_program:Counter._shell",
        "a_program:Counter.step",
        "a_program:Counter.secret",
        "a_program:Counter.__class__",
        "a_program:Counter.__subclasses__",
        "a_program:double.__globals__",
        "a_program:double.__code__",
        "a_program:__builtins__",
        "a_program:",
        "a_program",
        "",
        ":",
        "os:system",
        "posix:system",
        "builtins:eval",
        "builtins:exec",
        "torch:load",
        "torch.serialization:load",
        "torch.hub:load",
        "zmq_autograd.compat.rpc.names:Names",
    ],
)
def test_what_it_does_not_define_is_not_found(program: Any, names: Names, name: str) -> None:
    with pytest.raises(NotAllowed, match="may be called"):
        names.find(name)


def test_a_module_that_nobody_allowed_offers_nothing(program: Any) -> None:
    with pytest.raises(NotAllowed, match="allow_module"):
        Names().find("a_program:double")


def test_a_module_is_not_imported_for_a_name_that_arrives() -> None:
    names = Names()
    names.allow_module("a_program_that_is_not_there")
    with pytest.raises(NotAllowed):
        names.find("a_program_that_is_not_there:double")
    assert "a_program_that_is_not_there" not in sys.modules


def test_a_function_that_is_taken_away_is_not_found_any_more(program: Any, names: Names) -> None:
    assert names.find("a_program:double") is program.double
    del program.double
    with pytest.raises(NotAllowed, match="does not serialize function code"):
        names.find("a_program:double")


def test_a_function_that_comes_later_is_found(program: Any, names: Names) -> None:
    names.find("a_program:double")
    exec("def late(): return 1", vars(program))
    assert names.find("a_program:late")() == 1


@pytest.mark.parametrize(
    "module",
    [
        "os",
        "subprocess",
        "builtins",
        "importlib.util",
        "torch",
        "torch.serialization",
        "torch.hub",
        "torch.testing._internal.common_utils",
    ],
)
def test_the_modules_of_python_and_torch_cannot_be_allowed(module: str) -> None:
    with pytest.raises(ValueError, match="not the program's own"):
        Names().allow_module(module)


@pytest.mark.parametrize("module", ["", "a b", "os;", 3])
def test_what_is_no_modules_name_is_refused(module: Any) -> None:
    with pytest.raises(ValueError, match="name of a module"):
        Names().allow_module(module)


def test_one_function_can_be_registered(program: Any) -> None:
    names = Names()
    assert names.register(program.double) is program.double
    assert names.find("a_program:double") is program.double
    with pytest.raises(NotAllowed):
        names.find("a_program:triple")


def test_a_registered_class_offers_its_own_methods(program: Any) -> None:
    names = Names()
    names.register(program.Counter)
    assert names.find("a_program:Counter.half")(4) == 2
    assert names.method_of(program.Counter(1), "add")(2) == 3
    with pytest.raises(NotAllowed):
        names.method_of(program.Net(), "forward")


def test_what_has_no_name_elsewhere_is_refused(program: Any) -> None:
    def local() -> None:
        return None

    names = Names()
    for target in (lambda: 1, local, functools.partial(program.double, 1), program.Counter(1)):
        with pytest.raises(CannotTravel):
            names.name_of(target)
    with pytest.raises(CannotTravel, match="built-in"):
        names.name_of(print)
    with pytest.raises(ValueError, match="top level"):
        names.register(local)


@pytest.mark.parametrize(
    "key", ["double", "Counter", "Counter.half", "Counter.made", "Counter.add"]
)
def test_a_function_is_found_by_the_name_that_it_goes_by(
    program: Any, names: Names, key: str
) -> None:
    target: Any = program
    for part in key.split("."):
        target = getattr(target, part)
    assert names.name_of(target) == f"a_program:{key}"
    assert names.find(names.name_of(target)) == target


@pytest.mark.parametrize("target", [torch.add, torch.Tensor.add_, nn.Linear, min, torch.split])
def test_operators_go_by_torchs_names(target: Any) -> None:
    names = Names()
    assert names.find(names.name_of(target)) is target


def test_methods_of_a_value_are_those_of_its_class(program: Any, names: Names) -> None:
    assert names.method_of(program.Counter(1), "add")(2) == 3
    assert names.method_of(program.Counter(1), "half")(2) == 1
    assert torch.equal(names.method_of(torch.ones(2), "add")(1), torch.full((2,), 2.0))
    assert names.method_of(program.Net(), "forward")(3) == 3
    assert names.method_of(program.Net(), "train")(False).training is False


@pytest.mark.parametrize(
    "name", ["__class__", "__reduce__", "_shell", "secret", "step", "__dict__"]
)
def test_what_is_no_method_of_its_class_cannot_be_called(
    program: Any, names: Names, name: str
) -> None:
    with pytest.raises((NotAllowed, AttributeError)):
        names.method_of(program.Counter(1), name)


@pytest.mark.parametrize("name", ["register_forward_hook", "__setstate__", "load_state_dict", "to"])
def test_of_a_layer_only_a_few_methods_can_be_called(names: Names, name: str) -> None:
    with pytest.raises(NotAllowed):
        names.method_of(nn.Linear(1, 1), name)


def test_a_method_that_is_not_there_is_an_attribute_error(program: Any, names: Names) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'non_exist'"):
        names.method_of(program.Counter(1), "non_exist")


def test_exceptions_are_found_by_name(program: Any, names: Names) -> None:
    assert names.find_exception("builtins:ValueError") is ValueError
    assert names.find_exception("a_program:Failure") is program.Failure
    for unknown in ("builtins:SystemExit", "builtins:int", "a_program:Counter", "os:error"):
        assert names.find_exception(unknown) is None
    assert names.find_exception("builtins:StopIteration") is None
