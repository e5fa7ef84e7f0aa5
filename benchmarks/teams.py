"""Teams that train a split model: a trainer and the workers it calls, of one implementation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from harness import Process, turn
from peers.model import Model
from rich.console import Console
from rich.progress import track

TOLERANCE = 1e-5  # float32: sums may be taken in another order than in one process


@dataclass(frozen=True)
class Implementation:
    """A module of `peers` that trains a split model, and what the tables call it."""

    name: str
    module: str


OURS = Implementation("zmq_autograd", "split_this_package")
BY_HAND = Implementation("by hand", "split_by_hand")
TORCH = Implementation("torch", "split_torch")
LOCAL = Implementation("one process", "split_local")


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes:
        name: the row in the table.
        model: what each stage computes.
        workers: how many processes there are in the chain, beyond the trainer.
        use_gradients: after `backward`, ask every worker to read its gradients.
    """

    name: str
    model: Model
    workers: int = 1
    use_gradients: bool = False


class Team:
    """The processes of one implementation, ended with the `ExitStack` that they are given."""

    def __init__(self, implementation: Implementation, workers: int, stack: ExitStack) -> None:
        """Start the workers; the trainer waits for `start_trainer`."""
        self.name = implementation.name
        self._module, self._stack = implementation.module, stack
        self._arguments = (stack.enter_context(tempfile.TemporaryDirectory()), str(workers))
        self._workers = [
            Process(stack, self._module, "worker", *self._arguments, str(index + 1))
            for index in range(workers if implementation is not LOCAL else 0)
        ]

    def start_trainer(self) -> None:
        endpoints = [worker.endpoint() for worker in self._workers]
        self._trainer = Process(self._stack, self._module, "trainer", *self._arguments, *endpoints)

    def check(self, task: Task) -> float:
        """Return the largest relative difference from the gradients of one process.

        Raises:
            RuntimeError: it is more than rounding can explain.
        """
        differences = self._trainer.ask(self._command(task) | {"check": True})["differences"]
        if len(differences) != task.workers + 1 or not max(differences) < TOLERANCE:
            raise RuntimeError(f"{self.name}, {task.name}: wrong gradients, off by {differences}")
        return float(max(differences))

    def measure(self, task: Task, seconds: float) -> dict[str, float]:
        """Return the medians of a step and of its parts, in seconds."""
        return self._trainer.ask(self._command(task) | {"seconds": seconds}, seconds)

    def _command(self, task: Task) -> dict[str, Any]:
        return {
            "model": asdict(task.model),
            "workers": task.workers,
            "use_gradients": task.use_gradients,
            "check": False,
        }


def start_teams(
    implementations: Sequence[Implementation], workers: int, stack: ExitStack
) -> list[Team]:
    """Start all processes at once, as far as they do not wait for each other."""
    teams = [Team(implementation, workers, stack) for implementation in implementations]
    for team in teams:
        team.start_trainer()
    return teams


# Seconds by task, team and part of a step, one for each round.
Measurements = dict[str, dict[str, dict[str, list[float]]]]


def check_all(teams: list[Team], tasks: list[Task]) -> dict[str, dict[str, float]]:
    """Return the differences from the gradients of one process, by task and team."""
    return {task.name: {team.name: team.check(task) for team in teams} for task in tasks}


def measure_all(teams: list[Team], tasks: list[Task], rounds: int, seconds: float) -> Measurements:
    """Let the teams take turns at each task."""
    results: Measurements = {task.name: {team.name: {} for team in teams} for task in tasks}
    order = [(task, index) for task in tasks for index in range(rounds)]
    for task, index in track(order, "measuring", console=Console(stderr=True)):
        for team in turn(teams, index):
            for part, value in team.measure(task, seconds).items():
                results[task.name][team.name].setdefault(part, []).append(value)
    return results
