"""The command line, `zmq-autograd`: a door without logic of its own.

Reads arguments, calls what does the work, and turns what it raises into an exit code: 0 for
success, 1 for a failure told in one line, 2 for a command that makes no sense; a launched program's
own code is passed on.  The work is in `launch.local`, `launch.serve` and `node.status`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, cast

from zmq_autograd.errors import ZmqAutogradError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: what follows the program's name; None takes them from ``sys.argv``.

    Raises:
        SystemExit: the command makes no sense (code 2), or asks for help or the version (code 0).
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options, parser))
    except (ZmqAutogradError, OSError) as error:
        print(f"zmq-autograd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _launch(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from zmq_autograd.launch.local import launch

    if not options.module and not os.path.exists(options.script):
        parser.error(f"no such script: {options.script}")
    target = ["-m", options.script] if options.module else [options.script]
    command = [sys.executable, "-u", *target, *options.arguments]
    return asyncio.run(launch(command, options.processes, grace=options.grace))


def _worker(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from zmq_autograd.launch.serve import load_worker, serve

    worker = load_worker(options.worker)
    worker.configure(listen=options.listen, name=options.name, insecure=options.insecure)

    def announce(endpoints: Sequence[str]) -> None:
        for endpoint in endpoints:
            print(f"listening on {endpoint}", flush=True)

    asyncio.run(serve(worker, announce))
    return 0


def _status(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from zmq_autograd.node.status import as_text

    status = asyncio.run(_asked_status(options.endpoint, options.timeout))
    if options.json:
        print(json.dumps(status, indent=2, default=str, skipkeys=True))
    else:
        print(as_text(status), end="")
    return 0


async def _asked_status(endpoint: str, timeout: float) -> Any:
    from zmq_autograd.wire.messages import Status, StatusResponse
    from zmq_autograd.worker import connect

    deadline = asyncio.get_running_loop().time() + timeout
    async with connect(endpoint, timeout=timeout) as remote:
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        reply = await remote.request(Status(), timeout=left)
        return cast(StatusResponse, reply).status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zmq-autograd", description="Distributed autograd for PyTorch over ZeroMQ."
    )
    parser.add_argument("--version", action="version", version=version("zmq-autograd"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_launch(commands.add_parser("launch", help="run a script in several local processes"))
    _add_worker(commands.add_parser("worker", help="run one worker"))
    _add_status(commands.add_parser("status", help="show what a worker is doing"))
    return parser


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run a script in several local processes, with torchrun's environment variables. The "
        "first process that fails ends all, and its exit code is returned."
    )
    parser.add_argument(
        "-n", "--processes", type=_positive, required=True, metavar="N", help="how many processes"
    )
    parser.add_argument(
        "-m", "--module", action="store_true", help="the script is a module's name, as in python -m"
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="time between asking processes to end and killing them (default: %(default)s)",
    )
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the script")
    parser.set_defaults(run=_launch)


def _add_worker(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the worker that a module defines until SIGINT or SIGTERM; calls under way are "
        "finished first. Prints each endpoint as `listening on tcp://...`."
    )
    parser.add_argument("worker", metavar="MODULE:WORKER", help="as in mypackage.module:worker")
    parser.add_argument(
        "--listen",
        action="append",
        metavar="ENDPOINT",
        help="as in tcp://127.0.0.1:0; may be repeated (default: what the module says)",
    )
    parser.add_argument("--name", help="the worker's name (default: what the module says)")
    parser.add_argument(
        "--insecure",
        action="store_const",
        const=True,
        help="listen beyond the loopback address without keys: the network is trusted",
    )
    parser.set_defaults(run=_worker)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask a running worker for its sessions, contexts and passes, and what each pass waits for."
    )
    parser.add_argument("endpoint", metavar="ENDPOINT", help="as in tcp://127.0.0.1:5555")
    parser.add_argument("--json", action="store_true", help="print the values themselves")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="time for the worker to answer (default: %(default)s)",
    )
    parser.set_defaults(run=_status)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return seconds


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
