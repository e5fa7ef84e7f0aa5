"""The environment variables by which a launcher tells a process its place in the world.

Owns their names, how they are written and how they are read: the names are torchrun's, so that one
script runs under either launcher.  Knows neither processes nor sockets.  Written by
`launch.local`, read by `launch.world`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from zmq_autograd.errors import ConfigurationError

__all__ = ["Environment", "rank_variables", "read_environment"]

HOW_TO_LAUNCH: Final = (
    "start the script with `zmq-autograd launch -n N script.py` or `torchrun --nproc-per-node N "
    "script.py`"
)


@dataclass(frozen=True, slots=True)
class Environment:
    """One process's place in the world.

    Attributes:
        rank: this process's number, from 0.
        world_size: number of processes.
        local_world_size: how many of them run on this machine, None if it is not said.
        master_addr: host of the rendezvous store.
        master_port: its TCP port.
        agent_store: whether the launcher hosts that store; otherwise rank 0 does.
        run_id: name of the run, the same in every process.
        restart_count: how often the launcher has started this world before.
    """

    rank: int
    world_size: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    agent_store: bool
    run_id: str
    restart_count: int

    @property
    def hosts_store(self) -> bool:
        """Whether this process is the one that hosts the rendezvous store."""
        return self.rank == 0 and not self.agent_store

    @property
    def one_machine(self) -> bool:
        """Whether the whole world is known to run on this machine."""
        return self.local_world_size == self.world_size


def rank_variables(rank: int, world_size: int, *, master_port: int, run_id: str) -> dict[str, str]:
    """Return the variables for one process of a world that runs on this machine alone.

    Args:
        rank: the process's number, from 0.
        world_size: number of processes.
        master_port: port of the store that the launcher hosts on 127.0.0.1.
        run_id: name of the run.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(master_port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def read_environment(variables: Mapping[str, str]) -> Environment:
    """Read a process's place from its environment.

    Args:
        variables: the environment, as in ``os.environ``.

    Raises:
        ConfigurationError: a variable is missing or makes no sense; the text names it and says how
            to launch.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not variables.get(name)]
    if missing:
        raise ConfigurationError(
            f"expected a launcher's environment variables, got none for {', '.join(missing)}: "
            f"{HOW_TO_LAUNCH}"
        )
    world_size = _number(variables, "WORLD_SIZE", 1, 2**31 - 1)
    local_world_size = None
    if variables.get("LOCAL_WORLD_SIZE"):
        local_world_size = _number(variables, "LOCAL_WORLD_SIZE", 1, world_size)
    return Environment(
        rank=_number(variables, "RANK", 0, world_size - 1),
        world_size=world_size,
        local_world_size=local_world_size,
        master_addr=variables["MASTER_ADDR"],
        master_port=_number(variables, "MASTER_PORT", 1, 65535),
        # Spelled by the agent as `str(True)`, and compared in that spelling by torch.
        agent_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == str(True),
        run_id=variables.get("TORCHELASTIC_RUN_ID", "none"),
        restart_count=_number(variables, "TORCHELASTIC_RESTART_COUNT", 0, 2**31 - 1, default="0"),
    )


def _number(
    variables: Mapping[str, str], name: str, lowest: int, highest: int, default: str = ""
) -> int:
    text = variables.get(name, default)
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or not lowest <= number <= highest:
        raise ConfigurationError(
            f"environment variable {name}: expected a number from {lowest} to {highest}, got "
            f"{text!r}: {HOW_TO_LAUNCH}"
        )
    return number
