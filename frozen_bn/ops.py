"""Loads the compiled operators ``torch.ops.frozen_bn.*``, and gives them fakes."""

from __future__ import annotations

import sysconfig
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import checks

#: The devices that have kernels, and why the others of the two have none.
live: set[str] = set()
unavailable: dict[str, str] = {}


def _load_cpu() -> None:
    try:
        from . import _C  # noqa: F401  (importing it registers the operators)

        live.add("cpu")
    except ImportError as error:
        unavailable["cpu"] = str(error)
        unavailable["cuda"] = "the CPU half is missing"
        warnings.warn(
            f"frozen_bn: the compiled kernels could not be loaded ({error}); running plain PyTorch "
            "instead, which gives the same results more slowly",
            stacklevel=3,
        )


def _load_cuda() -> None:
    library = Path(__file__).with_name("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    if not library.exists():
        unavailable["cuda"] = "not built"
    elif torch.version.cuda is None:
        unavailable["cuda"] = "this torch has no CUDA"
    else:
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            live.add("cuda")
        except OSError as error:
            unavailable["cuda"] = str(error)
            warnings.warn(
                f"frozen_bn: the CUDA kernels could not be loaded ({error}); running plain "
                "PyTorch on CUDA tensors instead",
                stacklevel=3,
            )


_load_cpu()
if "cpu" in live:
    _load_cuda()


def _fake_forward(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
    output: Tensor,
    coefficients: Tensor | None,
    mask: Tensor | None,
) -> None:
    # The results are the caller's: there is nothing to make up.
    statistics = checks.Statistics(running_mean, running_var, weight, bias, eps)
    checks.check_forward(input, statistics, residual)
    checks.check_forward_outputs(input, activation, output, coefficients, mask)


def _fake_forward_pair(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    activation: int,
    negative_slope: float,
    output: Tensor,
    coefficients: Tensor | None,
    mask: Tensor | None,
) -> None:
    checks.check_forward(
        input,
        checks.Statistics(running_mean, running_var, weight, bias, eps),
        residual,
        checks.Statistics(
            residual_mean, residual_var, residual_weight, residual_bias, residual_eps
        ),
    )
    checks.check_forward_outputs(input, activation, output, coefficients, mask, pair=True)


def _fake_backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    activation: int,
    negative_slope: float,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_residual: Tensor | None,
) -> None:
    checks.check_backward(
        grad_output,
        coefficients,
        mask,
        input,
        residual,
        activation,
        grad_input,
        grad_weight,
        grad_bias,
        grad_residual,
    )


#: A forward operator's output, and what its backward takes of it.
Forward = tuple[Tensor, Tensor | None, Tensor | None]


def _results(input: Tensor, rows: int, code: int, inplace: bool, save: bool) -> Forward:
    """Tensors that a forward operator fills: output, coefficients, mask."""
    coefficients = mask = None
    # Before the output: behind it, they would keep malloc from giving its place to the next call.
    if save:
        # All that the backward needs of the channels, in the dtype of the arithmetic: unlike the
        # buffers, nobody can change it in the meantime.
        channels = input.shape[1] if input.dim() > 1 else 0
        coefficients = input.new_empty((rows, channels), dtype=checks.arithmetic_dtype(input))
    if save and code in checks.MASKED:
        mask = input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)
    return input if inplace else torch.empty_like(input), coefficients, mask


def forward(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    code: int,
    negative_slope: float,
    inplace: bool,
    save: bool,
) -> Forward:
    statistics = (running_mean, running_var, weight, bias)
    results = _results(input, checks.ROWS, code, inplace, save)
    _forward_operator(input, *statistics, residual, eps, code, negative_slope, *results)
    return results


def forward_pair(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
    residual_mean: Tensor,
    residual_var: Tensor,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    code: int,
    negative_slope: float,
    inplace: bool,
    save: bool,
) -> Forward:
    statistics = (running_mean, running_var, weight, bias, eps)
    residual_statistics = (residual_mean, residual_var, residual_weight, residual_bias)
    results = _results(input, checks.PAIR_ROWS, code, inplace, save)
    _forward_pair_operator(
        input,
        *statistics,
        residual,
        *residual_statistics,
        residual_eps,
        code,
        negative_slope,
        *results,
    )
    return results


def backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    code: int,
    negative_slope: float,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    strides: tuple[int, ...],
    with_grad_input: bool,
    with_grad_residual: bool,
) -> tuple[Tensor | None, Tensor | None]:
    def gradient(wanted: bool) -> Tensor | None:
        return grad_output.new_empty_strided(grad_output.shape, strides) if wanted else None

    grad_input, grad_residual = gradient(with_grad_input), gradient(with_grad_residual)
    saved = (coefficients, mask, input, residual)
    gradients = (grad_input, grad_weight, grad_bias, grad_residual)
    _backward_operator(grad_output, *saved, code, negative_slope, *gradients)
    return grad_input, grad_residual


if "cpu" in live:
    torch.library.register_fake("frozen_bn::forward")(_fake_forward)
    torch.library.register_fake("frozen_bn::forward_pair")(_fake_forward_pair)
    torch.library.register_fake("frozen_bn::backward")(_fake_backward)

    # Where the functions above look for them; the emulator of the tests puts its own there.
    _forward_operator = torch.ops.frozen_bn.forward.default
    _forward_pair_operator = torch.ops.frozen_bn.forward_pair.default
    _backward_operator = torch.ops.frozen_bn.backward.default
