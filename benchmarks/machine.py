"""One line about the machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import zmq


def describe() -> str:
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{cores} cores of {processor()}, load {load:.1f} before the run, loopback TCP; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
    )


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
