"""Run a stage of `examples/multi_node.py` on each of three hosts, and its trainer on a fourth.

    three_hosts.py namespaces OUTPUT    each host is a network namespace, wired to a bridge
    three_hosts.py loopback OUTPUT      each host is a loopback address

A script of its own, because the first way runs inside a namespace that `test_multi_host.py` made
for it: the bridge and every link live there and are gone with the last process, whatever happens.
The last line printed is JSON: the endpoints, and the network namespaces of the stages and trainer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "multi_node.py"
EPOCHS = "2"
TRAINER_SECONDS = 90
STOP_SECONDS = 10

Process = subprocess.Popen[str]


def ip(*arguments: str, host: Process | None = None) -> None:
    inside = () if host is None else ("nsenter", f"--target={host.pid}", "--net")
    subprocess.run([*inside, "ip", *arguments], check=True, timeout=10)


def make_bridge() -> None:
    ip("link", "set", "lo", "up")
    ip("link", "add", "name", "bridge", "type", "bridge")
    ip("address", "add", "10.77.0.1/24", "dev", "bridge")
    ip("link", "set", "bridge", "up")


def wire_up(host: Process, index: int) -> None:
    """Give the namespace of `host` an interface that is plugged into the bridge."""
    plug = f"plug{index}"
    ip("link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
    ip("link", "set", plug, "master", "bridge", "up")
    ip("address", "add", f"10.77.0.{index + 2}/24", "dev", "eth0", host=host)
    ip("link", "set", "eth0", "up", host=host)


def start_stage(stack: ExitStack, index: int, namespaces: bool) -> Process:
    address = f"10.77.0.{index + 2}" if namespaces else f"127.0.0.{index + 2}"
    command = [sys.executable, str(SCRIPT), "--serve", str(index), "--listen", f"tcp://{address}:0"]
    if namespaces:
        command += ["--insecure"]
        # The stage starts once its namespace has an address; `exec` keeps its process id.
        waiting = 'echo waiting && read -r go && exec "$@"'
        command = ["unshare", "--net", "sh", "-c", waiting, "sh", *command]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    stack.callback(end, process)
    if namespaces:
        expect(process, "waiting")
        wire_up(process, index)
        assert process.stdin is not None
        process.stdin.write("go\n")
    return process


def expect(process: Process, start: str) -> str:
    """Return the rest of the line that the process prints next, which must begin with `start`."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith(start):
        raise RuntimeError(f"expected a line that starts with {start!r}, got {line!r}")
    return line.removeprefix(start).strip()


def end(process: Process) -> None:
    process.terminate()
    try:
        process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def namespace_of(process_id: int) -> str:
    return os.readlink(f"/proc/{process_id}/ns/net")


def main() -> None:
    namespaces, output = sys.argv[1] == "namespaces", sys.argv[2]
    if namespaces:
        make_bridge()
    with ExitStack() as stack:
        stages = [start_stage(stack, index, namespaces) for index in range(3)]
        endpoints = [expect(stage, "listening on ") for stage in stages]
        where = [namespace_of(stage.pid) for stage in stages]
        command = [sys.executable, str(SCRIPT), "--endpoints", *endpoints]
        command += ["--epochs", EPOCHS, "--output", output]
        subprocess.run(command, check=True, timeout=TRAINER_SECONDS)
    facts = {"endpoints": endpoints, "namespaces": [*where, namespace_of(os.getpid())]}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
