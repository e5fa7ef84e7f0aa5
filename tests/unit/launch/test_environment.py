"""A launcher's variables: written and read alike, and nonsense told by name."""

from __future__ import annotations

import re

import pytest

from zmq_autograd.errors import ConfigurationError
from zmq_autograd.launch.environment import Environment, rank_variables, read_environment

BY_HAND = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_what_is_written_is_read() -> None:
    variables = rank_variables(1, 3, master_port=1234, run_id="run")
    assert read_environment(variables) == Environment(
        rank=1,
        world_size=3,
        local_world_size=3,
        master_addr="127.0.0.1",
        master_port=1234,
        agent_store=True,
        run_id="run",
        restart_count=0,
    )
    assert read_environment(variables).one_machine


def test_four_variables_are_enough() -> None:
    environment = read_environment(BY_HAND)
    assert environment.master_addr == "10.0.0.1"
    assert not environment.agent_store
    assert not environment.one_machine


def test_missing_variables_are_named_with_the_way_to_launch() -> None:
    with pytest.raises(ConfigurationError, match=r"RANK, MASTER_PORT: start .*zmq-autograd launch"):
        read_environment({"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "three"),
        ("RANK", "3"),
        ("RANK", "-1"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "1.5"),
        ("MASTER_PORT", "70000"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("TORCHELASTIC_RESTART_COUNT", ""),
    ],
)
def test_a_garbled_variable_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"{name}: expected .* got {re.escape(repr(value))}"
    ):
        read_environment({**BY_HAND, name: value})
