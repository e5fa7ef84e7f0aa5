"""Writes `zmq_autograd/blocking/__init__.pyi`: the types of the generated classes, for checkers.

Run it (``python -m tests.unit.blocking.stub``) after a change of the async classes; a test compares
what it would write with what is there.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import indent
from typing import Any, Final

import torch

from zmq_autograd import blocking, worker
from zmq_autograd.blocking.surface import GENERATED, Surface
from zmq_autograd.launch import world

STUB: Final = Path(blocking.__file__).with_suffix(".pyi")

FUNCTIONS: Final[tuple[Callable[..., Any], ...]] = (
    worker.connect,
    world.init,
    worker.current_context,
    worker.current_worker,
    worker.current_peer,
)

HEAD: Final = """\
# Made by tests/unit/blocking/stub.py of the async classes.  Change those, and run it.
import asyncio
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import torch

from zmq_autograd.blocking.portal import Portal as Portal
from zmq_autograd.blocking.portal import current_portal as current_portal
"""

TAIL: Final = """
def of(value: Any, loop: asyncio.AbstractEventLoop | None = None) -> Any: ...
"""

ENTERED: Final = """\
def __enter__(self) -> Self: ...
def __exit__(
    self,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> bool | None: ...
"""

AWAITED: Final = {"Awaitable": 0, "Coroutine": 2}
"""Types of what is awaited, and which of their arguments is the type of the result."""


STANDS_FOR: Final = {"RemoteRoot": "RRef"}
"""Names of protocols that only one class of the surface has."""


class WithoutAsync(ast.NodeTransformer):
    """Makes a plain function's signature of a coroutine function's, and notes the names in it."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self.visit_FunctionDef(ast.FunctionDef(**dict(ast.iter_fields(node))))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        managed = any(ast.unparse(d) == "asynccontextmanager" for d in node.decorator_list)
        if managed and isinstance(node.returns, ast.Subscript):
            node.returns.value = ast.Name(AbstractContextManager.__name__)
        node.decorator_list = [] if managed else node.decorator_list
        node.args.defaults = [ast.Constant(...) for _ in node.args.defaults]
        node.args.kw_defaults = [d and ast.Constant(...) for d in node.args.kw_defaults]
        node.body = [ast.Expr(ast.Constant(...))]
        self.generic_visit(node)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        name = ast.unparse(node.value)
        if name in AWAITED:
            arguments = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            result: ast.AST = self.visit(arguments[AWAITED[name]])
            return result
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = STANDS_FOR.get(node.id, node.id)
        self.names.add(node.id)
        return node


class Source:
    """The source of a module: its definitions, and where the names in them come from."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tree = ast.parse(inspect.getsource(sys.modules[name]))
        self._imports = {
            alias.name: f"from {node.module} import {alias.name}"
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self._variables = {
            ast.unparse(node.targets[0]): ast.unparse(node)
            for node in self.tree.body
            if isinstance(node, ast.Assign) and "TypeVar(" in ast.unparse(node)
        }

    def definition(self, name: str) -> Any:
        """Return the class or function of that name."""
        return next(node for node in self.tree.body if getattr(node, "name", None) == name)

    def lines_for(self, name: str) -> Iterator[str]:
        """Yield what makes known elsewhere what `name` is here."""
        if name in self._variables:
            yield self._variables[name]
            for node in ast.walk(ast.parse(self._variables[name])):
                if isinstance(node, ast.Name) and node.id in self._imports:
                    yield self._imports[node.id]
        else:
            yield self._imports.get(name, f"from {self.name} import {name}")


class Writer:
    """Writes the stub."""

    def __init__(self) -> None:
        self._here = {of.__name__ for of in Surface._classes} | vars(builtins).keys()
        self._here.add(AbstractContextManager.__name__)
        self._lines: set[str] = set()

    def write(self) -> str:
        """Return the whole text."""
        body = [self._class(of, made) for of, made in Surface._classes.items()]
        for function in FUNCTIONS:
            source = Source(function.__module__)
            body += self._signatures(source, [source.definition(function.__name__)])
        variables = sorted(line for line in self._lines if not line.startswith("from "))
        head = [HEAD, *(self._lines - set(variables)), *variables]
        text = "\n".join([*head, f"__all__ = {blocking.__all__!r}", *body, TAIL])
        for command in (["check", "--fix", "--select", "F401,I"], ["format"]):
            text = subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", STUB, "-"],
                input=text,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        return text

    def _class(self, of: type, made: type) -> str:
        source = Source(of.__module__)
        bases = [base.__name__ for base in of.__bases__ if base in Surface._classes]
        bases += ["torch.optim.Optimizer"] if issubclass(of, torch.optim.Optimizer) else []
        functions = [
            node
            for node in source.definition(of.__name__).body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (not node.name.startswith("_") or node.name in GENERATED)
            # Only those that users make have one of their own.
            and (node.name != "__init__" or "__init__" in vars(made))
        ]
        members = self._signatures(source, functions)
        members += [ENTERED] if "__aenter__" in vars(of) else []
        # Attributes that `__init__` sets have no types to be read.
        members += ["def __getattr__(self, name: str) -> Any: ..."]
        return f"class {of.__name__}({', '.join(bases)}):\n" + indent("\n".join(members), "    ")

    def _signatures(self, source: Source, functions: Iterable[Any]) -> list[str]:
        overloaded = {f.name for f in functions if "overload" in map(ast.unparse, f.decorator_list)}
        found = []
        for function in functions:
            if function.name in overloaded and not function.decorator_list:
                continue
            without = WithoutAsync()
            text = ast.unparse(ast.fix_missing_locations(without.visit(function)))
            for name in sorted(without.names - self._here):
                self._lines.update(source.lines_for(name))
            # As in the async class: torch's optimizers step without a context.
            found.append(f"{text}  # type: ignore[override]" if function.name == "step" else text)
        return found


if __name__ == "__main__":
    STUB.write_text(Writer().write())
