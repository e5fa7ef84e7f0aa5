"""The autograd graph of a small program across three workers, as Graphviz draws it.

Bob and Carol each have a layer.  Alice sends her input to Bob, who has Carol go on with what he
computed, and to Carol directly: two ways that meet in Carol's weights.  The graph is written to
`output/graph.dot`, and drawn to `output/graph.svg` if Graphviz is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor, nn

import zmq_autograd as za


async def program() -> str:
    """Run the program and return its graph as it was before backward."""
    bob_layer, carol_layer = nn.Linear(8, 8), nn.Linear(8, 1)
    async with (
        za.Worker("carol", listen="tcp://127.0.0.1:0") as carol,
        za.Worker("bob", listen="tcp://127.0.0.1:0") as bob,
        za.Worker("alice") as alice,
    ):
        bobs_carol = await bob.connect(carol.endpoints[0])
        alices_carol = await alice.connect(carol.endpoints[0])
        alices_bob = await alice.connect(bob.endpoints[0])

        @carol.register
        def score(h: Tensor) -> Tensor:
            return carol_layer(h)

        @bob.register
        async def score_further(x: Tensor) -> Tensor:
            return await bobs_carol.call("score", await za.compute(bob_layer, x))

        x = torch.randn(4, 8, requires_grad=True)
        async with alice.context() as ctx:
            scores = await alices_bob.call("score_further", x), await alices_carol.call("score", x)
            graph = await ctx.graph()
            await ctx.backward(torch.cat(scores).sum())  # and frees what it runs through
            return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    folder = parser.parse_args().output
    graph = asyncio.run(program())
    print(graph)
    folder.mkdir(parents=True, exist_ok=True)
    source, picture = folder / "graph.dot", folder / "graph.svg"
    source.write_text(graph)
    print(f"written: {source}")
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg", source, "-o", picture], check=True, timeout=60)
        print(f"drawn: {picture}")


if __name__ == "__main__":
    main()
