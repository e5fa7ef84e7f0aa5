"""A coroutine with torch modes of its own, though it shares the event loop's thread with others.

Torch keeps grad mode, inference mode and autocast per thread.  A coroutine that suspends inside
``with torch.no_grad()`` would leave that mode on for whatever runs next, and find another's when it
goes on.  Here each step of a coroutine, from one suspension to the next, runs under the modes in
which its last step ended, and the thread gets back its own after it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any

import torch

from zmq_autograd.node.current import Call, autocast_here, autocast_of, set_autocast


class Stepped:
    """Awaitable that runs a coroutine; see the module."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], call: Call) -> None:
        """Run `coroutine`, which handles `call`, and so begins under the caller's modes."""
        self._coroutine = coroutine
        self._call = call

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine, call = self._coroutine, self._call
        grad, inference = call.modes.grad_enabled, call.modes.inference_mode
        try:
            autocast = autocast_of(call.modes)
        except ValueError:  # no such modes: it never begins
            coroutine.close()
            raise
        go_on: Callable[[Any], Any] = coroutine.send
        sent: Any = None
        while True:
            threads = autocast_here()
            with torch._C._InferenceMode(inference):  # on leaving it gives back grad mode too
                torch._C._set_grad_enabled(grad)
                if autocast != threads:
                    set_autocast(autocast)
                call.is_running = True
                try:
                    awaited = go_on(sent)
                except StopIteration as done:
                    return done.value
                finally:
                    call.is_running = False
                    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                    autocast = autocast_here()
                    if autocast != threads:
                        set_autocast(threads)
            try:
                sent, go_on = (yield awaited), coroutine.send
            except BaseException as error:  # noqa: BLE001  # it is the coroutine's
                sent, go_on = error, coroutine.throw
