"""Three stages of one model in three processes, trained by one `await ctx.backward(loss)` a step.

    forward:    trainer -> stage 0 -> stage 1 -> stage 2, and the logits return the same way
    backward:   each gradient goes back over the message that carried its tensor

Every arrow is a message over ZeroMQ.  Each stage has its own weights and its own Adam, and finds
its gradients in the context that the call to `step` brings along.  `multi_node_reference.py`
trains the same model in one process; this script checks that it ends with the same weights.

On one machine:
    python examples/multi_node.py
On several: stage 0, 1 and 2 wherever they shall run, then the trainer, which needs no open port:
    python examples/multi_node.py --serve 0 --listen tcp://10.0.0.2:5001 --insecure
    python examples/multi_node.py --endpoints tcp://10.0.0.2:5001 tcp://10.0.0.3:5001 ...
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import torch
from multi_node_reference import (
    EPOCHS,
    STAGES,
    accuracy,
    batches,
    load_data,
    make_optimizer,
    make_stage,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import zmq_autograd as za

TOLERANCE = 1e-12
START_SECONDS = 60
STOP_SECONDS = 10


# A stage: what each of the three worker processes runs.


def make_worker(index: int, listen: str, insecure: bool) -> za.Worker:
    worker = za.Worker(f"stage{index}", listen=listen, insecure=insecure)
    net = make_stage(index)
    optimizer = make_optimizer(net)
    next_stage: za.RemoteWorker | None = None

    @worker.register
    async def link(endpoint: str) -> None:
        nonlocal next_stage
        next_stage = await worker.connect(endpoint, timeout=START_SECONDS)

    @worker.register
    async def forward(x: Tensor) -> Tensor:
        output = await za.compute(net, x)  # in a thread: the worker goes on answering meanwhile
        return output if next_stage is None else await next_stage.call("forward", output)

    @worker.register
    def step() -> None:
        gradients = za.current_context().gradients()  # of this stage's weights
        for weight in net.parameters():
            weight.grad = gradients[weight]
        optimizer.step()

    @worker.register
    def state() -> dict[str, Tensor]:
        return dict(net.state_dict())

    return worker


async def serve(index: int, listen: str, insecure: bool) -> None:
    async with make_worker(index, listen, insecure) as worker:
        print(f"listening on {worker.endpoints[0]}", flush=True)
        await worker.serve_forever()


# The trainer: it has the data and the loss, and nothing of the model.


async def train(endpoints: list[str], epochs: int, console: Console) -> dict[str, np.ndarray]:
    """Train over the stages at `endpoints`; return weights, loss of each epoch and accuracy."""
    images, labels, test_images, test_labels = load_data()
    losses = []
    async with za.Worker("trainer") as trainer:
        stages = [await trainer.connect(endpoint, timeout=START_SECONDS) for endpoint in endpoints]
        for stage, following in zip(stages, endpoints[1:], strict=False):
            await stage.call("link", following)
        console.print(f"training over {', '.join(stage.name for stage in stages)}")
        first = stages[0]
        with progress_bar(console) as progress:
            bar = progress.add_task("three workers", total=epochs, loss="")
            for epoch in range(epochs):
                total = 0.0
                for x, y in batches(images, labels, epoch):
                    async with trainer.context() as ctx:
                        loss = nn.functional.cross_entropy(await first.call("forward", x), y)
                        await ctx.backward(loss)
                        await asyncio.gather(*(stage.call("step") for stage in stages))
                    total += loss.item() * len(y)
                losses.append(total / len(labels))
                progress.update(bar, advance=1, loss=f"loss {losses[-1]:.6f}")
        with torch.no_grad():  # goes along with the call, to every stage
            score = accuracy(await first.call("forward", test_images), test_labels)
        states = [await stage.call("state") for stage in stages]
    weights = {
        f"{index}.{name}": weight.numpy()
        for index, state in enumerate(states)
        for name, weight in state.items()
    }
    return weights | {"losses": np.array(losses), "accuracy": np.array(score)}


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TextColumn("epochs  {task.fields[loss]}"), TimeElapsedColumn(), console=console
    )


# Around them: the processes, the comparison, the picture.


@asynccontextmanager
async def local_workers() -> AsyncIterator[list[str]]:
    """Start a process for each stage on this machine and yield their endpoints; end them all."""
    processes: list[Process] = []
    try:
        for index in range(STAGES):
            command = (sys.executable, __file__, "--serve", str(index))
            processes.append(await asyncio.create_subprocess_exec(*command, stdout=PIPE))
        yield [await asyncio.wait_for(endpoint_of(p), START_SECONDS) for p in processes]
    finally:
        await end(processes)


async def endpoint_of(process: Process) -> str:
    line = (await process.stdout.readline()).decode().strip()
    if not line.startswith("listening on "):
        raise RuntimeError(f"a stage did not start: expected 'listening on ...', got {line!r}")
    return line.removeprefix("listening on ")


@asynccontextmanager
async def one_process(epochs: int, weights: Path) -> AsyncIterator[Process]:
    """Run the reference meanwhile, in a process of its own, which never imports zmq_autograd."""
    script = Path(__file__).with_name("multi_node_reference.py")
    command = (sys.executable, script, "--epochs", str(epochs), "--output", weights)
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        await end([process])


async def result_of(process: Process, weights: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Wait for the reference and return what it printed and what it wrote."""
    output, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the reference failed: {errors.decode()}")
    with np.load(weights, allow_pickle=False) as file:
        return output.decode().strip(), dict(file)


async def end(processes: Sequence[Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.terminate()
    for process in processes:
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def draw(ours: np.ndarray, reference: np.ndarray, difference: float, path: Path) -> None:
    from matplotlib.figure import Figure  # here, as only the trainer draws

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    epochs = range(1, len(ours) + 1)
    # The first is wide and pale and the second thin and dashed: both show where they coincide.
    axes.semilogy(epochs, reference, color="tab:orange", linewidth=6, alpha=0.45)
    axes.semilogy(epochs, ours, color="tab:blue", linestyle="--", marker="o", markersize=4)
    axes.legend(["one process, torch alone", "three workers, zmq_autograd"])
    axes.set_title(f"Digits, three stages; largest difference of a final weight: {difference:.1e}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean training loss (cross entropy)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


async def run(endpoints: list[str] | None, epochs: int, output: Path) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    console, weights = Console(highlight=False), output / "reference.npz"
    async with AsyncExitStack() as stack:
        if endpoints is None:
            console.print(f"starting {STAGES} workers, each a process with one stage of the model")
            endpoints = await stack.enter_async_context(local_workers())
        process = await stack.enter_async_context(one_process(epochs, weights))
        ours = await train(endpoints, epochs, console)
        console.print(
            f"three workers: loss {ours['losses'][-1]:.6f}, test accuracy {ours['accuracy']:.4f}"
        )
        said, reference = await result_of(process, weights)
        console.print(said)
    np.savez(output / "multi_node.npz", **ours)

    names = sorted(reference.keys() - {"losses", "accuracy"})
    difference = max(float(np.abs(ours[name] - reference[name]).max()) for name in names)
    picture = output / "multi_node.png"
    draw(ours["losses"], reference["losses"], difference, picture)
    console.print(f"largest difference of a weight: {difference:.1e} (of {len(names)} tensors)")
    console.print(f"loss curves: {picture}", soft_wrap=True)
    if not difference <= TOLERANCE:  # a NaN is not small either
        sys.exit(f"the weights differ: expected at most {TOLERANCE}, got {difference}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", type=int, choices=range(STAGES), help="be this stage")
    parser.add_argument("--listen", default="tcp://127.0.0.1:0", help="where the stage listens")
    parser.add_argument(
        "--insecure", action="store_true", help="listen beyond this machine: the network is trusted"
    )
    parser.add_argument("--endpoints", nargs=STAGES, help="train over these stages")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--output", type=Path, default=Path("output"))
    arguments = parser.parse_args()
    # Sums are taken in another order with more threads, and then the last bits differ.
    torch.set_num_threads(1)
    try:
        if arguments.serve is not None:
            asyncio.run(serve(arguments.serve, arguments.listen, arguments.insecure))
        else:
            arguments.output.mkdir(parents=True, exist_ok=True)
            asyncio.run(run(arguments.endpoints, arguments.epochs, arguments.output))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("stopped")


if __name__ == "__main__":
    main()
