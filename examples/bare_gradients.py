"""The training of `multi_node.py` one floor below contexts: backward by handlers of one's own.

    forward:    trainer -> stage 0 -> stage 1 -> stage 2, and the logits return the same way
    backward:   trainer -> stage 2 -> stage 1 -> stage 0, each with the gradient of its output

Only numbers travel.  Each stage keeps its piece of the graph under the id of the message, and its
handler for `PropagateGradientsRequest` joins the pieces again.  Here all workers live in one
process, which then trains the same model with torch alone and compares the weights.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from contextlib import AsyncExitStack

import numpy as np
import torch
from multi_node_reference import STAGES, batches, load_data, make_optimizer, make_stage
from multi_node_reference import train as train_with_torch_alone
from torch import Tensor, nn

import zmq_autograd as za

CONTEXT_ID = 1  # one training, one context: message ids tell its batches apart

Request = za.messages.PropagateGradientsRequest
Response = za.messages.PropagateGradientsResponse


def make_worker(index: int) -> za.Worker:
    worker = za.Worker(f"stage{index}", listen="tcp://127.0.0.1:0")
    net = make_stage(index)
    optimizer = make_optimizer(net)
    next_stage: za.RemoteWorker | None = None
    # By message id: the input, the output, and who sent the input.
    kept: dict[int, tuple[Tensor, Tensor, za.RemoteWorker]] = {}

    @worker.register
    async def link(endpoint: str) -> None:
        nonlocal next_stage
        next_stage = await worker.connect(endpoint)

    @worker.register
    async def forward(x: Tensor, message_id: int) -> Tensor:
        x.requires_grad_(index > 0)  # nobody asks for the gradient of an image
        output = await za.compute(net, x)  # in a thread: the worker goes on answering meanwhile
        kept[message_id] = x, output, za.current_peer()
        # Only numbers travel, so the graph is cut here; `backward` joins it again.
        if next_stage is None:
            return output.detach()
        return await next_stage.call("forward", output.detach(), message_id)

    @worker.handler(Request)
    async def backward(request: Request, peer: za.RemoteWorker) -> Response:
        context_id, message_id = request.metadata.context_id, request.metadata.message_id
        x, output, previous = kept.pop(message_id)
        await za.compute(torch.autograd.backward, [output], request.grads)
        if x.grad is not None:
            await previous.propagate_gradients(
                [x.grad], context_id=context_id, message_id=message_id
            )
        # Only now: whoever gets this response knows that all stages before have their gradients.
        return Response()

    @worker.register
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    @worker.register
    def state() -> dict[str, Tensor]:
        return dict(net.state_dict())

    return worker


async def train(epochs: int) -> dict[str, np.ndarray]:
    """Train over three workers and return the final weights."""
    images, labels, _, _ = load_data()
    message_ids = itertools.count(1)
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(make_worker(i)) for i in range(STAGES)]
        trainer = await stack.enter_async_context(za.Worker("trainer"))
        stages = [await trainer.connect(worker.endpoints[0]) for worker in workers]
        for stage, following in itertools.pairwise(stages):
            await stage.call("link", following.endpoint)
        for epoch in range(epochs):
            for x, y in batches(images, labels, epoch):
                message_id = next(message_ids)
                logits = await stages[0].call("forward", x, message_id)
                loss = nn.functional.cross_entropy(logits.requires_grad_(), y)
                loss.backward()  # as far as the logits: the rest of the graph is elsewhere
                await stages[-1].propagate_gradients(
                    [logits.grad], context_id=CONTEXT_ID, message_id=message_id
                )
                await asyncio.gather(*(stage.call("step") for stage in stages))
            print(f"epoch {epoch + 1}: loss {loss.item():.6f} on the last batch")
        states = [await stage.call("state") for stage in stages]
    return {f"{i}.{name}": w.numpy() for i, state in enumerate(states) for name, w in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    epochs = parser.parse_args().epochs
    # Sums are taken in another order with more threads, and then the last bits differ.
    torch.set_num_threads(1)
    ours = asyncio.run(train(epochs))
    reference = train_with_torch_alone(epochs)
    difference = max(float(np.abs(ours[name] - reference[name]).max()) for name in ours)
    print(f"largest difference of a weight: {difference:.1e} (of {len(ours)} tensors)")
    if not difference <= 1e-12:  # a NaN is not small either
        sys.exit(f"the weights differ by {difference}")


if __name__ == "__main__":
    main()
