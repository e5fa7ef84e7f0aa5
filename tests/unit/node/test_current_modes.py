"""The modes of torch of the running code, within those of the call that it serves."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

from zmq_autograd.node.current import Call, applied, current_call, current_modes, shortened
from zmq_autograd.wire.messages import Modes

BF16 = (("cpu", "bfloat16"),)
PLAIN = Modes()


def serve(deadline: float | None = None, modes: Modes = PLAIN) -> None:
    """Let the rest of the test run as a handler of such a call."""
    current_call.set(Call(worker=None, peer=None, node=None, deadline=deadline, modes=modes))


async def test_outside_a_call_they_are_the_threads() -> None:
    assert current_modes() == Modes(True, False, ())
    with torch.no_grad():
        assert current_modes() == Modes(False, False, ())
    with torch.inference_mode():
        assert current_modes() == Modes(False, True, ())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert current_modes() == Modes(True, False, BF16)
    with torch.autocast("cpu", enabled=False):
        assert current_modes() == Modes()


@pytest.mark.parametrize(
    "modes",
    [
        Modes(),
        Modes(grad_enabled=False),
        Modes(grad_enabled=False, inference_mode=True),
        Modes(autocast=BF16),
        Modes(autocast=(("cpu", "float16"),)),
        Modes(grad_enabled=False, autocast=BF16),
    ],
)
async def test_applying_and_reading_are_inverse(modes: Modes) -> None:
    with applied(modes):
        assert current_modes() == modes
        with applied(Modes(grad_enabled=False)):
            assert not torch.is_grad_enabled()
    assert current_modes() == Modes()


async def test_inside_a_call_its_modes_hold_too() -> None:
    serve(modes=Modes(grad_enabled=False, autocast=BF16))
    assert current_modes() == Modes(False, False, BF16)
    with torch.inference_mode():
        assert current_modes() == Modes(False, True, BF16)
    with torch.autocast("cpu", dtype=torch.float16):
        assert current_modes() == Modes(False, False, (("cpu", "float16"),))


@pytest.mark.parametrize("dtype", ["no_such_dtype", "", "load", "Tensor"])
async def test_an_unknown_dtype_is_refused_and_leaves_no_mode_behind(dtype: str) -> None:
    with (
        pytest.raises(ValueError, match="unknown dtype"),
        applied(Modes(grad_enabled=False, autocast=(("cpu", dtype),))),
    ):
        pass
    assert current_modes() == Modes()


@pytest.mark.parametrize("device", ["no_such_device", ""])
async def test_an_unknown_device_is_refused_and_leaves_no_mode_behind(device: str) -> None:
    with (
        pytest.raises((ValueError, RuntimeError)),
        applied(Modes(False, autocast=((device, "bfloat16"),))),
    ):
        pass
    assert current_modes() == Modes()


@pytest.mark.parametrize(
    ("left", "timeout", "expected"),
    [(None, None, None), (None, 5, 5), (10, None, 10), (10, 5, 5), (10, 50, 10), (-1, 5, -1)],
)
async def test_a_timeout_is_never_longer_than_what_its_call_has_left(
    left: Any, timeout: Any, expected: Any
) -> None:
    serve(None if left is None else asyncio.get_running_loop().time() + left)
    found = shortened(timeout)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert math.isclose(found, expected, abs_tol=0.5)
        assert found <= expected
