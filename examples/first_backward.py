"""Bob computes a part of Alice's loss; each finds its own gradients.  Here in one process."""

import asyncio

import torch

import zmq_autograd as za

bob = za.Worker("bob", listen="tcp://127.0.0.1:0")  # port 0: any free one
weight = torch.tensor(3.0, requires_grad=True)  # Bob's, and nobody else's


@bob.register  # from now on, who is connected to bob may call this, and nothing else
def scale(x: torch.Tensor) -> torch.Tensor:
    return weight * x


@bob.register
def gradient() -> torch.Tensor:
    return za.current_context().gradients()[weight]


async def main() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    async with bob, za.Worker("alice") as alice:
        remote = await alice.connect(bob.endpoints[0])
        async with alice.context() as ctx:
            loss = await remote.call("scale", x) ** 2  # (3 * 2) ** 2
            await ctx.backward(loss)
            print(ctx.gradients()[x])  # tensor(36.)
            print(await remote.call("gradient"))  # tensor(24.)


asyncio.run(main())
