"""`examples/multi_node.py` over several hosts: the same script, with endpoints given.

Over three network namespaces where this machine permits them, and over three loopback addresses
everywhere; each test says which one it ran.  `three_hosts.py` starts the processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HOSTS_SCRIPT = Path(__file__).with_name("three_hosts.py")
DEADLINE = 100

# As root, and as anybody where users may make namespaces of their own.
WAYS_IN = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])
WHAT_IS_NEEDED = """
ip link add name bridge type bridge && ip link add type veth && unshare --net nsenter --version
"""


def way_into_a_namespace() -> list[str] | None:
    """Return the command that runs another in a network of its own, None if nothing may."""
    if shutil.which("unshare") is None:
        return None
    for way_in in WAYS_IN:
        trial = [*way_in, "sh", "-c", WHAT_IS_NEEDED]
        if subprocess.run(trial, capture_output=True, timeout=10).returncode == 0:
            return way_in
    return None


def run_three_hosts(command: list[str]) -> dict[str, Any]:
    """Run `three_hosts.py`, end whatever it left, and return what its last line says."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not done after {DEADLINE} s:\n{output}")
    assert process.returncode == 0, output
    facts: dict[str, Any] = json.loads(output.splitlines()[-1])
    return facts


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Print past the capture: which way the test went is part of its result."""
    with capsys.disabled():
        sys.stdout.write(f" [{text}] ")


def check_training(output: Path) -> None:
    with np.load(output / "multi_node.npz", allow_pickle=False) as file:
        ours = dict(file)
    with np.load(output / "reference.npz", allow_pickle=False) as file:
        reference = dict(file)
    assert ours.keys() == reference.keys()
    assert len(ours["losses"]) == 2
    for name, weight in reference.items():
        np.testing.assert_allclose(ours[name], weight, rtol=0, atol=1e-12, err_msg=name)


def test_training_over_three_network_namespaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    way_in = way_into_a_namespace()
    if way_in is None:
        pytest.skip("network namespaces are not permitted here; three loopback addresses run")
    say(capsys, f"multi-host over three network namespaces, by {' '.join(way_in)}")
    facts = run_three_hosts(
        [*way_in, sys.executable, str(HOSTS_SCRIPT), "namespaces", str(tmp_path)]
    )
    hosts = [endpoint.rpartition(":")[0] for endpoint in facts["endpoints"]]
    assert hosts == ["tcp://10.77.0.2", "tcp://10.77.0.3", "tcp://10.77.0.4"]
    # The stages and the trainer, and none of them in ours.
    assert len({*facts["namespaces"], os.readlink("/proc/self/ns/net")}) == 5
    check_training(tmp_path)


def test_training_over_three_loopback_addresses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(capsys, "multi-host over three loopback addresses")
    facts = run_three_hosts([sys.executable, str(HOSTS_SCRIPT), "loopback", str(tmp_path)])
    hosts = [endpoint.rpartition(":")[0] for endpoint in facts["endpoints"]]
    assert hosts == ["tcp://127.0.0.2", "tcp://127.0.0.3", "tcp://127.0.0.4"]
    check_training(tmp_path)
