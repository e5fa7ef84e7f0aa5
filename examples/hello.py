"""Bob offers a function, Alice calls it.  Here both live in one process; they need not."""

import asyncio

import torch

import zmq_autograd as za

bob = za.Worker("bob", listen="tcp://127.0.0.1:0")  # port 0: any free one


@bob.register  # from now on, who is connected to bob may call this, and nothing else
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


async def main() -> None:
    async with bob, za.Worker("alice") as alice:
        remote = await alice.connect(bob.endpoints[0])
        print(await remote.call("double", torch.ones(3)))  # tensor([2., 2., 2.])


asyncio.run(main())
