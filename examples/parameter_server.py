"""One model on a parameter server, trained by several processes at once, each with its own data.

    trainer 0   digits 0, 3, 6, ...  ─┐
    trainer 1   digits 1, 4, 7, ...   ├─  net(x), backward(loss), step(ctx)  ─  server: the net
    trainer 2   digits 2, 5, 8, ...  ─┘

The trainers hold no weights, and the server no data.  Nobody tells them to take turns: the server
applies a step between the passes of the other trainers, never under one.  So no update is lost and
no gradient is of weights that have changed meanwhile, which the last line checks.

    python examples/parameter_server.py
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from asyncio.subprocess import Process

import torch
from multi_node_reference import accuracy, batches, load_data
from torch import Tensor, nn

import zmq_autograd as za

TRAINERS = 3
EPOCHS = 4
LEARNING_RATE = 0.2
TOLERANCE = 1e-9
STOP_SECONDS = 10


# A trainer: what each of the other processes runs.


async def train(rank: int, endpoint: str, epochs: int) -> None:
    images, labels, _, _ = load_data()
    images, labels = images[rank::TRAINERS], labels[rank::TRAINERS]
    applied: dict[str, Tensor] = {}
    async with za.Worker(f"trainer{rank}") as worker:
        server = await worker.connect(endpoint)
        net = await server.module("net")
        optimizer = await za.DistributedOptimizer.create(
            torch.optim.SGD, net.parameters(), lr=LEARNING_RATE
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        for epoch in range(epochs):
            for x, y in batches(images, labels, epoch):
                async with worker.context() as ctx:
                    loss = nn.functional.cross_entropy(await net(x), y)
                    await ctx.backward(loss)
                    await optimizer.clip_grad_norm(ctx, 1.0)
                    gradients = await net.gradients(ctx)
                    await optimizer.step(ctx)
                for name, gradient in gradients.items():  # to check the server, below
                    update = optimizer.param_groups[0]["lr"] * gradient
                    applied[name] = applied.get(name, 0) + update
            scheduler.step()
            print(f"trainer {rank}: epoch {epoch + 1}, loss {loss.item():.3f}", flush=True)
        await server.call("finished", applied)


# The server: it owns the model.


class Server:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
        self.expected = {name: w.detach().clone() for name, w in self.net.named_parameters()}
        self.worker = za.Worker("server", listen="tcp://127.0.0.1:0")
        self.worker.register(self.net, "net", expose="module")
        self.worker.register(self.finished)

    async def finished(self, applied: dict[str, Tensor]) -> None:
        """Take note of the sum of all that a trainer has subtracted from the weights."""
        for name, update in applied.items():
            self.expected[name] -= update

    def difference(self) -> float:
        """Return how far a weight is from what it was at first, less all updates."""
        weights = dict(self.net.named_parameters())
        return max((weights[name] - w).abs().max().item() for name, w in self.expected.items())

    def score(self) -> float:
        _, _, images, labels = load_data()
        with torch.no_grad():
            return accuracy(self.net(images), labels)


async def run(epochs: int) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    server, trainers = Server(), []
    print(f"before: test accuracy {server.score():.3f}", flush=True)
    try:
        async with server.worker as worker:
            for rank in range(TRAINERS):
                options = ("--rank", str(rank), "--endpoint", worker.endpoints[0])
                command = (sys.executable, __file__, *options, "--epochs", str(epochs))
                trainers.append(await asyncio.create_subprocess_exec(*command))
            codes = await asyncio.gather(*(trainer.wait() for trainer in trainers))
    finally:
        await end(trainers)
    if any(codes):
        sys.exit("a trainer failed")
    print(f"after: test accuracy {server.score():.3f}")
    difference = server.difference()
    print(f"largest difference of a weight from the sum of all updates: {difference:.0e}")
    if not difference <= TOLERANCE:  # a NaN is not small either
        sys.exit(f"an update was lost: expected at most {TOLERANCE}, got {difference}")


async def end(processes: list[Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.terminate()
    for process in processes:
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rank", type=int, choices=range(TRAINERS), help="be this trainer")
    parser.add_argument("--endpoint", help="where the trainer finds the server")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # there are enough processes for the processors
    try:
        if arguments.rank is not None:
            asyncio.run(train(arguments.rank, arguments.endpoint, arguments.epochs))
        else:
            asyncio.run(run(arguments.epochs))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("stopped")


if __name__ == "__main__":
    main()
