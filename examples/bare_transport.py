"""The bare transport: gradients travel to another process, where a handler of yours takes them."""

import asyncio
import subprocess
import sys

import torch

import zmq_autograd as za

Request = za.messages.PropagateGradientsRequest
Response = za.messages.PropagateGradientsResponse


async def serve() -> None:
    bob = za.Worker("bob", listen="tcp://127.0.0.1:0")
    weight = torch.tensor(3.0, requires_grad=True)
    sent = {1: [weight**2, weight**3]}  # what bob computed for others, by message id

    @bob.handler(Request)
    async def backward(request: Request, peer: za.RemoteWorker) -> Response:
        outputs = sent[request.metadata.message_id]
        # None says "undefined": nothing depends on that output, so nothing flows back through it.
        defined = [(y, g) for y, g in zip(outputs, request.grads, strict=True) if g is not None]
        torch.autograd.backward(*zip(*defined, strict=True), retain_graph=request.retain_graph)
        print(f"bob: got {request.grads}, now weight.grad is {weight.grad}", file=sys.stderr)
        return Response()

    async with bob:
        print(bob.endpoints[0], flush=True)
        await bob.serve_forever()


async def alice(endpoint: str) -> None:
    one = torch.tensor(1.0)
    ids = {"context_id": 1, "message_id": 1}
    async with za.connect(endpoint) as bob:
        # d(w^2)/dw is 6 at w = 3.  The graph is retained, so the same may be sent once more: 12.
        for _ in range(2):
            await bob.propagate_gradients([one, None], **ids, retain_graph=True)
        # Through both outputs, 12 + 6 + 27 = 45, and not retained: this frees bob's graph ...
        await bob.propagate_gradients([one, one], **ids)
        try:  # ... so that now bob's torch raises, in bob's process, and alice hears all about it.
            await bob.propagate_gradients([one, one], **ids)
        except za.RemoteError as error:
            print(f"alice: {error}")


if sys.argv[1:] == ["--serve"]:
    asyncio.run(serve())
else:
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            asyncio.run(alice(process.stdout.readline().strip()))
        finally:
            process.terminate()
