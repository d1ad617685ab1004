"""The end of a residual block that downsamples: two branches, both with frozen statistics, added
and activated in one pass. What :mod:`frozen_bn.functional` is for one branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import functional, node, ops, reference
from .checks import (
    ACTIVATIONS,
    SMOOTH,
    Statistics,
    check_forward,
    check_history,
    check_inplace,
)
from .functional import _code, _is_batched, _shares_storage, _takes_plain_path, frozen_batch_norm

if "cpu" in ops.live:
    _forward_pair, _backward = ops.forward_pair, ops.backward

#: What no gradient flows to: both statistics, activation code, negative_slope, inplace.
_Constants = tuple[Statistics, Statistics, int, float, bool]


class _FrozenBatchNormPair(torch.autograd.Function):
    """Saves the channel coefficients, one bit an element behind a piecewise-linear activation, and
    both branches only behind a smooth one."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor, constants: _Constants) -> Tensor:
        statistics, residual_statistics, code, negative_slope, inplace = constants
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(input)
        output, coefficients, mask = _forward_pair(
            input,
            *statistics,
            residual,
            *residual_statistics,
            code,
            negative_slope,
            inplace,
            True,
        )
        branches = (input, residual) if code in SMOOTH else (None, None)
        ctx.save_for_backward(coefficients, mask, *branches)
        ctx.plan = (code, negative_slope, output.stride())
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None
        coefficients, mask, input, residual = ctx.saved_tensors
        code, negative_slope, strides = ctx.plan
        needs_input, needs_residual, _ = ctx.needs_input_grad
        grad_input: Tensor | None
        grad_residual: Tensor | None
        if torch.is_grad_enabled() or _is_batched(grad_output):
            grad_input, _, _, grad_residual = _differentiable_backward(
                *(grad_output, coefficients, mask, input, residual, None, None),
                *(strides, code, negative_slope),
            )
            return grad_input if needs_input else None, grad_residual, None
        grad_input, grad_residual = _backward(
            grad_output,
            coefficients,
            mask,
            input,
            residual,
            code,
            negative_slope,
            None,
            None,
            strides,
            needs_input or mask is not None,  # the mask is in the order of its storage
            needs_residual,
        )
        return grad_input if needs_input else None, grad_residual, None


def _differentiable_backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    weight: None,
    bias: None,
    strides: tuple[int, ...],
    code: int,
    negative_slope: float,
) -> tuple[Tensor, None, None, Tensor]:
    """What :func:`frozen_bn.functional._differentiable_backward` is for one branch."""
    saved = (coefficients, mask, input, residual)
    grad_input, grad_residual = reference.pair_backward(
        grad_output, *saved, strides, ACTIVATIONS[code], negative_slope
    )
    return grad_input, None, None, grad_residual


def _run(
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
) -> Tensor:
    """By the kernels, and recorded by autograd where a gradient is wanted of ``input`` or
    ``residual``. ``code`` is that of the activation."""
    statistics = Statistics(running_mean, running_var, weight, bias, eps)
    residual_statistics = Statistics(
        residual_mean, residual_var, residual_weight, residual_bias, residual_eps
    )
    constants = (statistics, residual_statistics, code, negative_slope, inplace)
    if inplace:
        check_inplace(input, "forward_pair")
        if _shares_storage(residual, input):
            residual = residual.clone()
    if torch.is_grad_enabled() and (input.requires_grad or residual.requires_grad):
        if inplace:
            check_history(input, "forward_pair")
            # Where the gradient needs the input's values, they have to outlive the overwriting.
            if code in SMOOTH:
                constants = (statistics, residual_statistics, code, negative_slope, False)
                source = input.clone()
                return input.copy_(_FrozenBatchNormPair.apply(source, residual, constants))
        result: Tensor = _FrozenBatchNormPair.apply(input, residual, constants)
        return result
    output, _, _ = _forward_pair(
        input,
        *statistics,
        residual,
        *residual_statistics,
        code,
        negative_slope,
        inplace,
        False,
    )
    if inplace:
        torch.autograd.graph.increment_version(input)
    return output


#: Either node's, of the signature of :func:`_run`.
run: Callable[..., Tensor] = _run
if node.compiled is not None:
    run = node.compiled.run_pair
    node.compiled.bind(
        functional._run,
        _run,
        functional._differentiable_backward,
        _differentiable_backward,
        check_inplace,
        check_history,
        functional._CODES,
        "cuda" in ops.live,
    )


def frozen_batch_norm_pair(
    input: Tensor,
    statistics: Statistics,
    residual: Tensor,
    residual_statistics: Statistics,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> Tensor:
    """Two batch normalizations with fixed statistics, their sum, and an activation, in one pass.

    .. math:: y = act((x - mean_x) scale_x + bias_x + (r - mean_r) scale_r + bias_r),
              scale = weight / sqrt(var + eps)

    Arithmetic is in float32 (float64 for float64 inputs), and the sum is rounded once.

    Args:
        input: ``[N, C, ...]``, as :func:`frozen_bn.frozen_batch_norm` takes it.
        statistics: running_mean, running_var, weight, bias (``[C]`` each, float16, bfloat16,
            float32 or float64; the last two or ``None``) and eps: of ``input``.
        residual: the other branch; shape, dtype and device of ``input``.
        residual_statistics: of ``residual``, likewise.
        activation: as in :func:`frozen_bn.frozen_batch_norm`.
        negative_slope: of ``"leaky_relu"``.
        inplace: write the result over ``input`` and return it. Saves memory except where the
            gradient of a smooth activation needs the input, of which a copy is then kept.

    Returns:
        A tensor of the shape and dtype of ``input``: contiguous, or channels_last where it is.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, an eps is negative or not finite, or
            ``inplace`` would overwrite a leaf that requires grad or an expanded tensor. Nothing has
            been modified then.
        ValueError: an unknown ``activation``.

    Gradients flow to ``input`` and ``residual``, each only if needed. Where a weight or a bias
    requires grad, they flow there too: then this is a composition of two calls of
    :func:`frozen_bn.frozen_batch_norm`, which rounds the residual branch to its dtype in between.
    """
    affine = (*statistics[2:4], *residual_statistics[2:4])
    relevant = (input, residual, *affine)
    overridden = has_torch_function_variadic(*relevant)
    if (
        overridden
        or _takes_plain_path(input, *statistics[:2])
        or residual_statistics[0].requires_grad
        or residual_statistics[1].requires_grad
    ):
        arguments = (input, statistics, residual, residual_statistics)
        options: dict[str, Any] = {
            "activation": activation,
            "negative_slope": negative_slope,
            "inplace": inplace,
        }
        if overridden:
            return handle_torch_function(frozen_batch_norm_pair, relevant, *arguments, **options)
        return reference.frozen_batch_norm_pair(*arguments, **options)
    code = _code(activation, "forward_pair")
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in affine):
        # Their gradients are channel sums, which the kernels of a pair do not take.
        check_forward(input, statistics, residual, residual_statistics)
        if inplace:
            check_inplace(input, "forward_pair")
        return frozen_batch_norm(
            input,
            *statistics,
            activation=activation,
            negative_slope=negative_slope,
            residual=frozen_batch_norm(residual, *residual_statistics),
            inplace=inplace,
        )
    if not inplace:
        input = reference.in_torchs_order(input)
    return run(input, *statistics, residual, *residual_statistics, code, negative_slope, inplace)
