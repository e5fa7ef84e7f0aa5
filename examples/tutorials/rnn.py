"""A language model whose embedding table and decoder live on a parameter server, as in torch's
tutorial on training an RNN by RPC: the LSTM is the trainer's, one optimizer steps all three.

    python examples/tutorials/rnn.py                # on zmq_autograd
    python examples/tutorials/rnn.py --on torch     # on torch.distributed.rpc
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn, optim

if sys.argv[1:] == ["--on", "torch"]:
    import torch.distributed.autograd as dist_autograd
    import torch.distributed.rpc as rpc
    from torch.distributed.optim import DistributedOptimizer
else:
    from zmq_autograd.compat import autograd as dist_autograd
    from zmq_autograd.compat import rpc
    from zmq_autograd.compat.optim import DistributedOptimizer

    rpc.allow_module(__name__)

WORLD_SIZE, EPOCHS = 2, 3
EMBEDDING, HIDDEN, LAYERS, DROPOUT = 8, 16, 2, 0.2
BATCH, STEPS_BACK = 4, 10
TEXT = """\
the gradient of a sum is the sum of the gradients, and the gradient of a chain is the product of
the gradients of its links. whoever holds a link needs to know nothing of the others: what comes
back from behind is multiplied by what was kept, and goes on to whoever stands in front.
"""

Hidden = tuple[Tensor, Tensor]


def _call_method(method: Callable[..., Any], rref: rpc.RRef, *args: Any, **kwargs: Any) -> Any:
    """Call a method of the object that an RRef refers to; runs on its owner."""
    return method(rref.local_value(), *args, **kwargs)


def _remote_method(method: Callable[..., Any], rref: rpc.RRef, *args: Any, **kwargs: Any) -> Any:
    return rpc.rpc_sync(rref.owner(), _call_method, args=(method, rref, *args), kwargs=kwargs)


def _parameter_rrefs(module: nn.Module) -> list[rpc.RRef]:
    return [rpc.RRef(parameter) for parameter in module.parameters()]


class EmbeddingTable(nn.Module):
    """Embeds tokens; too large for a trainer, in earnest."""

    def __init__(self, tokens: int, size: int, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(tokens, size)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.drop(self.encoder(tokens))


class Decoder(nn.Module):
    """Scores each token of the table."""

    def __init__(self, tokens: int, size: int, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.decoder = nn.Linear(size, tokens)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, output: Tensor) -> Tensor:
        return self.decoder(self.drop(output))


class RNNModel(nn.Module):
    def __init__(self, server: str, tokens: int) -> None:
        super().__init__()
        # The server makes one, then the other, of its one random generator.
        self.emb_table_rref = rpc.remote(server, EmbeddingTable, args=(tokens, EMBEDDING, DROPOUT))
        table = _remote_method(_parameter_rrefs, self.emb_table_rref)
        self.rnn = nn.LSTM(EMBEDDING, HIDDEN, LAYERS, dropout=DROPOUT)
        self.decoder_rref = rpc.remote(server, Decoder, args=(tokens, HIDDEN, DROPOUT))
        decoder = _remote_method(_parameter_rrefs, self.decoder_rref)
        self._rrefs = [*table, *_parameter_rrefs(self.rnn), *decoder]

    def forward(self, tokens: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        embedded = _remote_method(EmbeddingTable.forward, self.emb_table_rref, tokens)
        output, hidden = self.rnn(embedded, hidden)
        return _remote_method(Decoder.forward, self.decoder_rref, output), hidden

    def parameter_rrefs(self) -> list[rpc.RRef]:
        """Return RRefs to all parameters, of both workers."""
        return self._rrefs


def batches(tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of the text, several side by side, each with what comes next."""
    length = (len(tokens) - 1) // BATCH
    inputs, targets = (tokens[i : i + length * BATCH].view(BATCH, length).t() for i in (0, 1))
    for start in range(0, length - STEPS_BACK + 1, STEPS_BACK):
        rows = slice(start, start + STEPS_BACK)
        yield inputs[rows].contiguous(), targets[rows].contiguous()


def run_trainer() -> None:
    letters = sorted(set(TEXT))
    tokens = torch.tensor([letters.index(letter) for letter in TEXT])
    model = RNNModel("ps", len(letters))
    criterion = nn.CrossEntropyLoss()
    opt = DistributedOptimizer(optim.SGD, model.parameter_rrefs(), lr=1.0)
    for epoch in range(EPOCHS):
        zeros = torch.zeros(LAYERS, BATCH, HIDDEN)
        hidden = zeros, zeros
        for number, (data, target) in enumerate(batches(tokens)):
            with dist_autograd.context() as context_id:
                # Nothing goes back beyond this piece of the text.
                hidden = hidden[0].detach(), hidden[1].detach()
                output, hidden = model(data, hidden)
                loss = criterion(output.flatten(0, 1), target.flatten())
                dist_autograd.backward(context_id, [loss])
                opt.step(context_id)
            print(f"epoch {epoch}, batch {number}: loss {loss.item()!r}")
    for rref in model.parameter_rrefs():
        weight = rref.to_here().detach()
        place = f"{list(weight.shape)} on {rref.owner().name}"
        print(f"parameter {place}: {weight.double().norm().item()!r}", flush=True)


def run_worker(rank: int, init_method: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    name = ("ps", "trainer")[rank]
    options = rpc.TensorPipeRpcBackendOptions(init_method=init_method)
    rpc.init_rpc(name, rank=rank, world_size=WORLD_SIZE, rpc_backend_options=options)
    if name == "trainer":
        run_trainer()
    rpc.shutdown()  # until then the server does what it is asked for


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(run_worker, args=(f"file://{directory}/store",), nprocs=WORLD_SIZE)
