"""Reinforcement learning with an agent and two observers, as in torch's tutorial on getting started
with RPC: each observer plays in an environment of its own, and asks the agent for each action.

The environment, a pole to be balanced on a cart, is part of this file.

    python examples/tutorials/reinforcement.py                # on zmq_autograd
    python examples/tutorials/reinforcement.py --on torch     # on torch.distributed.rpc
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn, optim
from torch.distributions import Categorical
from torch.nn import functional as F

if sys.argv[1:] == ["--on", "torch"]:
    import torch.distributed.rpc as rpc
else:
    from zmq_autograd.compat import rpc

    rpc.allow_module(__name__)

AGENT_NAME = "agent"
OBSERVER_NAME = "observer{}"
WORLD_SIZE, EPISODES, STEPS, GAMMA = 3, 10, 40, 0.99


def _call_method(method: Callable[..., Any], rref: rpc.RRef, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the object that an RRef refers to; runs on its owner."""
    return method(rref.local_value(), *args, **kwargs)


def _remote_method(method: Callable[..., Any], rref: rpc.RRef, *args: Any, **kwargs: Any) -> Any:
    return rpc.rpc_sync(rref.owner(), _call_method, args=(method, rref, *args), kwargs=kwargs)


class CartPole:
    """A pole of 1 m on a cart of 1 kg, pushed to the left or to the right every 20 ms."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.state = [0.0] * 4

    def reset(self) -> Tensor:
        self.state = [self.random.uniform(-0.05, 0.05) for _ in range(4)]
        return torch.tensor(self.state, dtype=torch.float64)

    def step(self, action: int) -> tuple[Tensor, float, bool]:
        """Push left (0) or right (1); return the state, the reward, and whether the pole fell."""
        x, speed, angle, turn = self.state
        sin, cos = math.sin(angle), math.cos(angle)
        push = (10.0 * (2 * action - 1) + 0.05 * turn**2 * sin) / 1.1
        turning = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        pushing = push - 0.05 * turning * cos / 1.1
        self.state = [
            *(x + 0.02 * speed, speed + 0.02 * pushing),
            *(angle + 0.02 * turn, turn + 0.02 * turning),
        ]
        fell = abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.21
        return torch.tensor(self.state, dtype=torch.float64), 1.0, fell


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.affine1 = nn.Linear(4, 32)
        self.affine2 = nn.Linear(32, 2)

    def forward(self, state: Tensor) -> Tensor:
        return F.softmax(self.affine2(F.relu(self.affine1(state))), dim=-1)


class Observer:
    """Plays in an environment of its own, by what the agent says."""

    def __init__(self) -> None:
        self.id = rpc.get_worker_info().id
        self.env = CartPole(self.id)

    def run_episode(self, agent_rref: rpc.RRef, n_steps: int) -> None:
        state = self.env.reset()
        for _ in range(n_steps):
            action = _remote_method(Agent.select_action, agent_rref, self.id, state)
            state, reward, done = self.env.step(action)
            _remote_method(Agent.report_reward, agent_rref, self.id, reward)
            if done:
                break


class Agent:
    """Has the policy, and trains it by what the observers see."""

    def __init__(self) -> None:
        self.agent_rref = rpc.RRef(self)
        self.ob_rrefs = []
        self.policy = Policy().double()
        self.optimizer = optim.Adam(self.policy.parameters(), lr=1e-2)
        self.rewards: dict[int, list[float]] = {}
        self.saved_log_probs: dict[int, list[Tensor]] = {}
        self.generators: dict[int, torch.Generator] = {}
        for rank in range(1, WORLD_SIZE):
            info = rpc.get_worker_info(OBSERVER_NAME.format(rank))
            self.ob_rrefs.append(rpc.remote(info, Observer))
            # One for each observer: who calls first does not change what the other draws.
            self.generators[info.id] = torch.Generator().manual_seed(info.id)
            self.rewards[info.id], self.saved_log_probs[info.id] = [], []

    def select_action(self, ob_id: int, state: Tensor) -> int:
        """Return an action; an observer calls this."""
        probs = self.policy(state)
        action = torch.multinomial(probs.detach(), 1, generator=self.generators[ob_id])[0]
        self.saved_log_probs[ob_id].append(Categorical(probs).log_prob(action))
        return action.item()

    def report_reward(self, ob_id: int, reward: float) -> None:
        """Take note of a reward; an observer calls this."""
        self.rewards[ob_id].append(reward)

    def run_episode(self, n_steps: int) -> None:
        futs = [
            rpc.rpc_async(
                ob_rref.owner(),
                _call_method,
                args=(Observer.run_episode, ob_rref, self.agent_rref, n_steps),
            )
            for ob_rref in self.ob_rrefs
        ]
        for fut in futs:
            fut.wait()

    def finish_episode(self) -> list[int]:
        """Step the policy by what was seen; return how many rewards each observer had."""
        returns = []
        for rewards in self.rewards.values():
            total, ahead = 0.0, []
            for reward in reversed(rewards):
                total = reward + GAMMA * total
                ahead.insert(0, total)
            returns += ahead
        log_probs = torch.stack([p for probs in self.saved_log_probs.values() for p in probs])
        scaled = torch.tensor(returns, dtype=torch.float64)
        scaled = (scaled - scaled.mean()) / (scaled.std() + 1e-6)
        self.optimizer.zero_grad()
        (-log_probs * scaled).sum().backward()
        self.optimizer.step()
        lengths = [len(rewards) for rewards in self.rewards.values()]
        for ob_id in self.rewards:
            self.rewards[ob_id], self.saved_log_probs[ob_id] = [], []
        return lengths


def run_agent() -> None:
    agent = Agent()
    for episode in range(EPISODES):
        agent.run_episode(STEPS)
        print(f"episode {episode}: the poles stood for {agent.finish_episode()} steps", flush=True)
    for name, weight in agent.policy.named_parameters():
        print(f"{name}: {weight.detach().norm().item()!r}")


def run_worker(rank: int, init_method: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    name = OBSERVER_NAME.format(rank) if rank else AGENT_NAME
    options = rpc.TensorPipeRpcBackendOptions(init_method=init_method)
    rpc.init_rpc(name, rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    if rank == 0:
        run_agent()
    rpc.shutdown()  # until then the observers do what they are asked for


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        init_method = f"file://{directory}/store"
        mp.start_processes(run_worker, (init_method,), WORLD_SIZE, start_method="fork")
