"""The house rules, walked: which module imports which, what no module does, how long it may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "zmq_autograd"

FLOORS = [
    {"cli", "__main__", "compat", "blocking"},
    {"launch"},
    {"worker"},
    {"remote", "rref", "module", "optimizer"},
    {"node"},
    {"engine"},
    {"autograd"},
    {"session"},
    {"transport"},
    {"wire"},
    {"errors", "ids"},
]
"""From the top of the house to the ground.  A module imports from its own floor and below."""

DEPTH = {name: depth for depth, names in enumerate(FLOORS) for name in names}

NOT_ON_FLOOR = {
    "wire": ("zmq", "asyncio", "torch.distributed"),
    "session": ("zmq", "asyncio", "torch.distributed"),
    "transport": ("torch", "msgpack"),
    "autograd": ("zmq", "asyncio"),
    "engine": ("zmq",),
}
"""Modules of others that a floor must not know."""

NOWHERE = (
    *("pickle", "marshal", "shelve", "dill", "cloudpickle"),
    *("torch.load", "eval", "exec", "__import__"),
)
"""What would run something that arrived."""

LOADS_BY_NAME = {"cli", "launch"}
"""Floors that may import what an operator names on the command line."""

MAX_LINES = 450


def floor_of(module: str) -> str:
    """Return the floor of a module by its dotted name: ``zmq_autograd.wire.codec`` is ``wire``."""
    return module.split(".")[1]


def imported(tree: ast.Module, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Yield the dotted names of all that a module imports, wherever in it that stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            kept = len(parts) - node.level + is_package
            base = [*(parts[:kept] if node.level else []), *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def used(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module uses: ``eval``, and ``torch.load`` for an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return what in the source of `module` breaks a rule of the house."""
    tree = ast.parse(source)
    imports = set(imported(tree, module, is_package=is_package))
    names = imports | set(used(tree))
    found = [f"{module}: {name}" for name in names for bad in NOWHERE if is_within(name, bad)]
    if any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        found.append(f"{module}: assert, which -O takes away")
    if len(source.splitlines()) > MAX_LINES:
        found.append(f"{module}: more than {MAX_LINES} lines")
    if module == PACKAGE:
        return found
    floor = floor_of(module)
    for name in imports:
        if name == PACKAGE or (is_within(name, PACKAGE) and floor_of(name) not in DEPTH):
            found.append(f"{module}: imports {name} from the roof")
        elif is_within(name, PACKAGE) and DEPTH[floor_of(name)] < DEPTH[floor]:
            found.append(f"{module}: imports {name} from above")
        elif is_within(name, "importlib") and floor not in LOADS_BY_NAME:
            found.append(f"{module}: {name}")
    for bad in NOT_ON_FLOOR.get(floor, ()):
        found += [f"{module}: knows {name}" for name in names if is_within(name, bad)]
    return found


def modules() -> dict[str, Path]:
    """Return every module of the package: dotted name to file."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


@pytest.mark.parametrize("name", modules())
def test_the_house_rules_are_kept(name: str) -> None:
    file = modules()[name]
    module = name.removesuffix(".__init__")
    source = file.read_text(encoding="utf-8")
    assert violations(source, module, is_package=file.name == "__init__.py") == []


def test_every_module_has_a_floor() -> None:
    names = {floor_of(name) for name in modules()} - {"__init__"}
    assert names <= DEPTH.keys(), "give the new floor its place in FLOORS"


@pytest.mark.parametrize(
    ("source", "module", "problem"),
    [
        ("from zmq_autograd.session import state", "wire.codec", "from above"),
        ("import zmq_autograd.node.channel", "session.state", "from above"),
        ("from zmq_autograd import worker", "node.channel", "from above"),
        ("from ..session import state", "wire.codec", "from above"),
        ("from .. import node", "session.state", "from above"),
        ("def f():\n    from zmq_autograd.cli import main", "errors", "from above"),
        ("import zmq_autograd", "wire.codec", "from the roof"),
        ("from zmq_autograd import Worker", "cli", "from the roof"),
        ("import zmq.asyncio", "wire.codec", "knows zmq.asyncio"),
        ("from zmq import Context", "session.state", "knows zmq.Context"),
        ("import asyncio", "session.state", "knows asyncio"),
        ("from torch import distributed", "wire.tensors", "knows torch.distributed"),
        ("import torch\ntorch.distributed.init()", "wire.tensors", "knows torch.distributed"),
        ("import torch", "transport.zmq", "knows torch"),
        ("import msgpack", "transport.zmq", "knows msgpack"),
        ("import pickle", "cli", "pickle"),
        ("from marshal import loads", "cli", "marshal.loads"),
        ("import torch\ntorch.load(f)", "remote", "torch.load"),
        ("load = torch.load", "remote", "torch.load"),
        ("eval('1')", "cli", "eval"),
        ("run = exec", "cli", "exec"),
        ("__import__('os')", "cli", "__import__"),
        ("from importlib import import_module", "node.registry", "importlib.import_module"),
        ("assert True", "errors", "assert"),
        ("\n" * (MAX_LINES + 1), "errors", "more than"),
    ],
)
def test_the_walk_sees_each_violation(source: str, module: str, problem: str) -> None:
    found = violations(source, f"{PACKAGE}.{module}")
    assert found
    assert all(problem in violation for violation in found)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from zmq_autograd.wire.limits import Limits", "wire.codec"),
        ("from . import limits\nfrom .limits import Limits", "wire.codec"),
        ("from zmq_autograd import errors, ids", "session.state"),
        ("import zmq, asyncio, torch.distributed", "node.channel"),
        ("import importlib", "launch.local"),
        ("module.eval()", "node.registry"),
    ],
)
def test_the_walk_lets_pass_what_is_allowed(source: str, module: str) -> None:
    assert violations(source, f"{PACKAGE}.{module}") == []
