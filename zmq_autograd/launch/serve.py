"""One worker from the command line: what `zmq-autograd worker` runs.

Owns finding the worker that the operator named, and serving until a signal comes.  The name comes
from the operator's own command line; nothing that arrives over a network is ever imported.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from zmq_autograd.errors import ConfigurationError
from zmq_autograd.worker import Worker

__all__ = ["load_worker", "serve"]


def load_worker(reference: str) -> Worker:
    """Import a module, the current directory included in the search, and return its worker.

    Args:
        reference: ``package.module:worker``.

    Raises:
        ConfigurationError: there is no such module, nothing of that name in it, or no worker.
        Exception: whatever the module's own code raises.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name or module_name.startswith("."):
        raise ConfigurationError(f"worker: expected package.module:worker, got {reference!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise ConfigurationError(f"worker: no module named {error.name!r}") from error
    if not hasattr(module, name):
        raise ConfigurationError(f"worker: module {module_name!r} has nothing named {name!r}")
    worker = getattr(module, name)
    if not isinstance(worker, Worker):
        raise ConfigurationError(
            f"worker: expected {reference} to be a Worker, got {type(worker).__name__}"
        )
    return worker


async def serve(worker: Worker, announce: Callable[[Sequence[str]], None]) -> None:
    """Start `worker`, and serve until SIGINT or SIGTERM comes; then finish calls under way.

    Args:
        worker: not running.
        announce: is told the endpoints, once it can be reached there.

    Raises:
        ConfigurationError: it cannot listen, or nobody said where.
    """
    async with worker:
        if not worker.endpoints:
            raise ConfigurationError(f"worker {worker.name!r} listens nowhere: use --listen")
        serving = asyncio.create_task(worker.serve_forever())
        await asyncio.sleep(0)  # so that it hears signals before anyone knows of it
        announce(worker.endpoints)
        await serving
