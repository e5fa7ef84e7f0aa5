"""Half of a model lives in another process, and is used as if it were here.

The trunk, with batch normalisation, is bob's; the head is a module of this process.  One optimizer
steps both.  Then the trunk is evaluated where it is, its state dict is fetched, and the model that
is put together of it here gives the same answers.  At the end the same model is trained in one
process, and the weights are compared.

    python examples/remote_module.py
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zmq_autograd as za

EPOCHS, BATCH, RATE = 10, 128, 3e-3


def load() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data / 16), torch.tensor(digits.target)


def make_trunk() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()).double()


def make_head() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(64, 10).double()


def batches() -> Iterator[Tensor]:
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        yield from torch.randperm(1500).split(BATCH)  # the others are for testing


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


async def serve() -> None:
    """Be bob, until a signal comes."""
    bob = za.Worker("bob", listen="tcp://127.0.0.1:0")
    bob.register(make_trunk(), "trunk", expose="module", allow={"alice"})
    async with bob:
        print(bob.endpoints[0], flush=True)
        await bob.serve_forever()


async def train(endpoint: str) -> nn.Module:
    """Train over two processes; return the model, put together here."""
    images, labels = load()
    head = make_head()
    async with za.Worker("alice") as alice:
        bob = await alice.connect(endpoint)
        trunk = await bob.module("trunk")
        for name, parameter in trunk.named_parameters():
            print(f"bob's {name}: {list(parameter.shape)}, {parameter.dtype}")
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.AdamW, [*trunk.parameters(), *head.parameters()], lr=RATE
        )
        for rows in batches():
            async with alice.context() as ctx:
                loss = nn.functional.cross_entropy(head(await trunk(images[rows])), labels[rows])
                await ctx.backward(loss)
                await optimizer.step(ctx)
        print(f"loss of the last batch: {loss.item():.4f}")

        await trunk.eval()
        with torch.no_grad():
            logits = head(await trunk(images[1500:]))
        print(f"test accuracy, the trunk at bob's: {accuracy(logits, labels[1500:]):.3f}")

        model = nn.Sequential(make_trunk(), head)
        model[0].load_state_dict(await trunk.state_dict())
        model.eval()
        with torch.no_grad():
            difference = (model(images[1500:]) - logits).abs().max().item()
        print(f"largest difference of a logit, all of it here: {difference:g}")
        assert difference < 1e-12
        return model


def train_alone() -> nn.Module:
    """Train the same in this process."""
    images, labels = load()
    model = nn.Sequential(make_trunk(), make_head())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for rows in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model


def main() -> None:
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE)
    try:
        model = asyncio.run(train(process.stdout.readline().decode().strip()))
    finally:
        process.terminate()
        process.communicate()
    ours, alone = model.state_dict(), train_alone().state_dict()
    difference = max((ours[key] - alone[key]).abs().max().item() for key in alone)
    print(f"largest difference of the state to training in one process: {difference:g}")
    assert difference < 1e-12


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that torch adds in the same order in both
    asyncio.run(serve()) if "--serve" in sys.argv else main()
