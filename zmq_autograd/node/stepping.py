"""A coroutine with torch modes of its own, though it shares the event loop's thread with others.

Torch keeps grad mode, inference mode and autocast per thread.  A coroutine that suspends inside
``with torch.no_grad()`` would leave that mode on for whatever runs next, and find another's when it
goes on.  Here each step of a coroutine, from one suspension to the next, runs under the modes in
which its last step ended, and the thread gets back its own after it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextlib import nullcontext
from typing import Any

import torch

from zmq_autograd.autograd.anomaly import recording
from zmq_autograd.node.current import autocast_here, autocast_of, set_autocast, this_thread
from zmq_autograd.wire.messages import Modes


class Stepped:
    """Awaitable that runs a coroutine; see the module."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], modes: Modes) -> None:
        """Run `coroutine`, which begins under `modes`."""
        self._coroutine = coroutine
        self._modes = modes

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine, modes = self._coroutine, self._modes
        grad, inference = modes.grad_enabled, modes.inference_mode
        try:
            autocast = autocast_of(modes)
        except ValueError:  # no such modes: it never begins
            coroutine.close()
            raise
        go_on: Callable[[Any], Any] = coroutine.send
        sent: Any = None
        while True:
            threads = autocast_here()
            taken_down = nullcontext() if modes.check_nan is None else recording()
            # On leaving, inference mode gives back grad mode too.
            with taken_down, torch._C._InferenceMode(inference):
                torch._C._set_grad_enabled(grad)
                if autocast != threads:
                    set_autocast(autocast)
                before, this_thread.has_own_modes = this_thread.has_own_modes, True
                try:
                    awaited = go_on(sent)
                except StopIteration as done:
                    return done.value
                finally:
                    sent = None  # an error holds this frame, which must not hold it
                    this_thread.has_own_modes = before
                    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                    autocast = autocast_here()
                    if autocast != threads:
                        set_autocast(threads)
            try:
                sent, go_on = (yield awaited), coroutine.send
            except BaseException as error:  # noqa: BLE001  # it is the coroutine's
                sent, go_on = error, coroutine.throw
            del awaited  # nor what ended with it
