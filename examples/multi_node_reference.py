"""The training of `multi_node.py` in one process, with torch alone: what the other must reproduce.

It owns the model, the data and the order of batches, which both scripts share, and knows nothing
of zmq_autograd.  The digits come with scikit-learn, so nothing is downloaded.

    python examples/multi_node_reference.py --output output/multi_node_reference.npz
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

STAGES = 3
EPOCHS = 15
BATCH = 32
LEARNING_RATE = 5e-3
SEED = 7
TRAIN_SAMPLES = 1400  # of 1797; the rest is the test set


def make_stage(index: int) -> nn.Sequential:
    """Return one third of the model in float64; its weights depend on the seed and `index` only."""
    torch.manual_seed(SEED + index)
    layers = [
        (nn.Linear(64, 128), nn.ReLU()),
        (nn.Linear(128, 64), nn.ReLU()),
        (nn.Linear(64, 10),),
    ]
    return nn.Sequential(*layers[index]).double()


def make_optimizer(stage: nn.Module) -> torch.optim.Optimizer:
    # Adam treats every weight by itself: three Adams over three stages do what one does over all.
    return torch.optim.Adam(stage.parameters(), lr=LEARNING_RATE)


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images [1400, 64] and labels, test images [397, 64] and labels."""
    # Imported here: the stages of `multi_node.py` hold no data, and start sooner without.
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(SEED))
    images = torch.from_numpy(digits.data / 16.0)[order]
    labels = torch.from_numpy(digits.target)[order].long()
    train, test = slice(None, TRAIN_SAMPLES), slice(TRAIN_SAMPLES, None)
    return images[train], labels[train], images[test], labels[test]


def batches(images: Tensor, labels: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch, in an order that depends on the seed and `epoch` only."""
    generator = torch.Generator().manual_seed(1000 * SEED + epoch)
    for rows in torch.split(torch.randperm(len(images), generator=generator), BATCH):
        yield images[rows], labels[rows]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def train(epochs: int) -> dict[str, np.ndarray]:
    """Train in this process; return the final weights, the loss of each epoch, the accuracy."""
    images, labels, test_images, test_labels = load_data()
    # One after the other: each stage seeds torch's generator before it draws its weights.
    model = nn.Sequential(*(make_stage(index) for index in range(STAGES)))
    optimizer = make_optimizer(model)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for x, y in batches(images, labels, epoch):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        losses.append(total / len(labels))
    with torch.no_grad():
        score = accuracy(model(test_images), test_labels)
    result = {name: weight.numpy() for name, weight in model.state_dict().items()}
    return result | {"losses": np.array(losses), "accuracy": np.array(score)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=Path("output/multi_node_reference.npz"))
    arguments = parser.parse_args()
    # Sums are taken in another order with more threads, and then the last bits differ.
    torch.set_num_threads(1)
    result = train(arguments.epochs)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(arguments.output, **result)
    print(f"one process: loss {result['losses'][-1]:.6f}, test accuracy {result['accuracy']:.4f}")


if __name__ == "__main__":
    main()
