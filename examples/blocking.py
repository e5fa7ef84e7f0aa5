"""Split learning by plain scripts: no `async`, and no event loop to be seen.

A clinic has pictures that it gives to nobody, scikit-learn's handwritten digits, and the first
layers of a model; this script has the labels and the last ones.  Features come from the clinic,
gradients go back to it, each in a process of its own.  At the end the same model is trained in one
process, and the weights are compared.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zmq_autograd as za

ROUNDS, BATCH, RATE = 20, 128, 0.5


def load() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data / 16), torch.tensor(digits.target)


def make_layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    shapes = [(64, 32), (32, 10)][seed]
    return nn.Sequential(nn.Linear(*shapes), nn.Tanh() if seed == 0 else nn.Identity()).double()


def batches() -> Iterator[Tensor]:
    torch.manual_seed(2)
    for _ in range(ROUNDS):
        yield from torch.randperm(1797).split(BATCH)


def serve() -> None:
    """Be the clinic, until a signal comes."""
    pictures, _ = load()
    layers = make_layers(0)
    optimizer = torch.optim.SGD(layers.parameters(), lr=RATE)
    clinic = za.blocking.Worker("clinic", listen="tcp://127.0.0.1:0")

    @clinic.register
    def features(rows: Tensor) -> Tensor:
        return layers(pictures[rows])

    @clinic.register
    def step() -> None:
        gradients = za.blocking.current_context().gradients()  # of the clinic's own weights
        for weight in layers.parameters():
            weight.grad = gradients[weight]
        optimizer.step()

    @clinic.register
    def state() -> dict[str, Tensor]:
        return dict(layers.state_dict())

    with clinic:
        print(clinic.endpoints[0], flush=True)
        clinic.serve_forever()


def train(clinic: za.blocking.RemoteWorker) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train over two processes; return the weights of both parts."""
    _, labels = load()
    layers = make_layers(1)
    optimizer = torch.optim.SGD(layers.parameters(), lr=RATE)
    for rows in batches():
        with clinic.context() as ctx:
            guesses = layers(clinic.call("features", rows))
            loss = nn.functional.cross_entropy(guesses, labels[rows])
            ctx.backward(loss)
            clinic.call("step")
            for weight in layers.parameters():
                weight.grad = ctx.gradients()[weight]
            optimizer.step()
    print(f"loss of the last batch: {loss.item():.4f}")
    return clinic.call("state"), dict(layers.state_dict())


def train_alone() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train the same in this process."""
    pictures, labels = load()
    model = nn.Sequential(make_layers(0), make_layers(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for rows in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pictures[rows]), labels[rows]).backward()
        optimizer.step()
    return model[0].state_dict(), model[1].state_dict()


def main() -> None:
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE)
    try:
        endpoint = process.stdout.readline().decode().strip()
        with za.blocking.connect(endpoint) as clinic:
            parts = train(clinic)
    finally:
        process.terminate()
        process.communicate()
    pairs = [
        (part[key], alone[key])
        for part, alone in zip(parts, train_alone(), strict=True)
        for key in alone
    ]
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"largest difference of a weight to training in one process: {difference:g}")
    assert difference < 1e-12


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that torch adds in the same order in both
    serve() if "--serve" in sys.argv else main()
