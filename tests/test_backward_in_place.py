"""``frozen_bn::backward`` with the gradient of the input written over the one that comes in."""

from __future__ import annotations

import pytest
import torch
from helpers import ACTIVATIONS
from torch import Tensor

from frozen_bn import ops
from frozen_bn.checks import MASKED, PAIR_ROWS, ROWS, SMOOTH

pytestmark = pytest.mark.every_cpu_level

SHAPES = [(2, 37, 7, 7), (2, 64, 2, 2), (1, 8, 10, 95)]
#: The gradients besides that of the input: of weight, bias, residual; p, of a pair.
OTHERS = ["", "wb", "r", "wbr", "p", "pr"]


def arguments_of(grad_output: Tensor, code: int, others: str) -> list[Tensor | int | float | None]:
    """Of the operator, without the gradient of the input."""
    channels, dtype = grad_output.shape[1], grad_output.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pair = "p" in others
    coefficients = torch.randn(PAIR_ROWS if pair else ROWS, channels).to(wide)
    mask = torch.randint(256, ((grad_output.numel() + 7) // 8,), dtype=torch.uint8)
    needs_input = code in SMOOTH or "w" in others
    return [
        coefficients,
        mask if code in MASKED else None,
        torch.randn_like(grad_output) if needs_input else None,
        torch.randn_like(grad_output) if code in SMOOTH and (pair or "r" in others) else None,
        code,
        0.2,
    ]


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_it_is_the_same_as_elsewhere(activation, shape, channels_last, dtype, device):
    code = ACTIVATIONS.index(activation)
    grad_output = torch.randn(shape).to(dtype)
    if channels_last:
        grad_output = grad_output.to(memory_format=torch.channels_last)
    for others in OTHERS:
        given = arguments_of(grad_output, code, others)
        outcomes = []
        for own in (False, True):
            over = grad_output.clone()
            grad_input = over if own else torch.empty_like(over)
            gradients = [
                grad_input,
                torch.empty(shape[1]) if "wb" in others else None,
                torch.empty(shape[1]) if "wb" in others else None,
                torch.empty_like(over) if "r" in others else None,
            ]
            ops._backward_operator(over, *given, *gradients)
            outcomes.append([g for g in gradients if g is not None])
        torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_ones_and_thread_counts(channels_last, threads):
    """Large enough for streaming stores."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_output = torch.randn(2, 37, 317, 331).to(memory_format=layout)
    given = arguments_of(grad_output, 1, "")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outcomes = []
        for grad_input in (torch.empty_like(grad_output), grad_output):
            rest = (None, None, None)
            ops._backward_operator(grad_output, *given, grad_input, *rest)
            outcomes.append(grad_input)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)
