"""The functional form, and the autograd node over the compiled operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import node, ops, reference
from .checks import (
    ACTIVATIONS,
    SMOOTH,
    activation_code,
    check_history,
    check_inplace,
)

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

if "cpu" in ops.live:
    _forward, _backward = ops.forward, ops.backward

is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # autograd.grad(is_grads_batched=True)

#: What no gradient flows to: running_mean, running_var, eps, activation code, negative_slope,
#: inplace, and whether the statistics are those of an identity. In one tuple, because autograd
#: looks at every argument of a Function.
_Constants = tuple[Tensor, Tensor, float, int, float, bool, bool]


class _FrozenBatchNorm(torch.autograd.Function):
    """Saves the channel coefficients, one bit an element behind a piecewise-linear activation, and
    the input only where the gradient of the weight or of a smooth activation needs it."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        constants: _Constants,
    ) -> Tensor:
        running_mean, running_var, eps, code, negative_slope, inplace, identity = constants
        _, weight_gradient, bias_gradient, _, _ = ctx.needs_input_grad
        smooth = code in SMOOTH
        kept = input if weight_gradient or smooth else None
        ctx.set_materialize_grads(False)
        if inplace:
            ctx.mark_dirty(input)
        output, coefficients, mask = _forward(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            eps,
            code,
            negative_slope,
            inplace,
            True,
        )
        ctx.save_for_backward(
            coefficients,
            mask,
            kept,
            residual if smooth else None,
            weight if weight_gradient else None,
            bias if bias_gradient and smooth else None,
        )
        ctx.plan = (
            code,
            negative_slope,
            output.stride(),
            weight.dtype if weight_gradient else None,  # type: ignore[union-attr]
            bias.dtype if bias_gradient else None,  # type: ignore[union-attr]
            code == 0 or identity,  # the gradient of the residual is one that exists anyway
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        code, negative_slope, strides, weight_dtype, bias_dtype, shares = ctx.plan
        needs_input, _, _, needs_residual, _ = ctx.needs_input_grad
        grad_weight = grad_bias = None
        if torch.is_grad_enabled() or _is_batched(grad_output):
            gradients = _differentiable_backward(
                *(grad_output, *ctx.saved_tensors, strides, code, negative_slope)
            )
            return (
                gradients[0] if needs_input else None,
                gradients[1].to(weight_dtype) if weight_dtype else None,  # type: ignore[union-attr]
                gradients[2].to(bias_dtype) if bias_dtype else None,
                gradients[3] if needs_residual else None,
                None,
            )
        coefficients, mask, input, residual, _, _ = ctx.saved_tensors
        if weight_dtype is not None:
            grad_weight = grad_output.new_empty(grad_output.shape[1], dtype=weight_dtype)
        if bias_dtype is not None:
            grad_bias = grad_output.new_empty(grad_output.shape[1], dtype=bias_dtype)
        grad_input, grad_residual = _backward(
            grad_output,
            coefficients,
            mask,
            input,
            residual,
            code,
            negative_slope,
            grad_weight,
            grad_bias,
            strides,
            needs_input or mask is not None or (needs_residual and shares and code != 0),
            needs_residual and not shares,
        )
        if needs_residual and shares:
            grad_residual = grad_output if code == 0 else grad_input
        return grad_input if needs_input else None, grad_weight, grad_bias, grad_residual, None


def _differentiable_backward(
    grad_output: Tensor,
    coefficients: Tensor,
    mask: Tensor | None,
    input: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    strides: tuple[int, ...],
    code: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """What both nodes call for a gradient that is to be differentiated again, or is a batch of
    them."""
    saved = (coefficients, mask, input, residual, weight, bias)
    return reference.backward(grad_output, *saved, strides, ACTIVATIONS[code], negative_slope)


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def is_transformed() -> bool:
    """Whether a compiler, a tracer or a transform of functions has to see PyTorch's operators."""
    return (
        is_compiling()
        or _functorch_active()
        or _tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def has_kernels(input: Tensor) -> bool:
    """Whether there are kernels for its device and dtype."""
    device = "cuda" if input.is_cuda else "cpu" if input.is_cpu else input.device.type
    return device in ops.live and not (device == "cuda" and input.dtype == torch.float64)


def _takes_plain_path(input: Tensor, running_mean: Tensor, running_var: Tensor) -> bool:
    return (
        is_transformed()
        or running_mean.requires_grad
        or running_var.requires_grad
        or not has_kernels(input)
    )


def _code(activation: str | None, op: str = "forward") -> int:
    try:
        return _CODES[activation]
    except (KeyError, TypeError):
        return activation_code(activation, op)  # raises


def _run(
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
    identity: bool,
) -> Tensor:
    """By the kernels, and recorded by autograd where a gradient is wanted. ``code`` is that of the
    activation; ``identity``: the statistics are those of one."""
    constants = (running_mean, running_var, eps, code, negative_slope, inplace, identity)
    if inplace:
        check_inplace(input)
        if residual is not None and _shares_storage(residual, input):
            residual = residual.clone()
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if inplace:
            check_history(input)
            # Where the gradient needs the input's values, they have to outlive the overwriting.
            if code in SMOOTH or (weight is not None and weight.requires_grad):
                constants = (running_mean, running_var, eps, code, negative_slope, False, identity)
                source = input.clone()
                return input.copy_(
                    _FrozenBatchNorm.apply(source, weight, bias, residual, constants)
                )
        output: Tensor = _FrozenBatchNorm.apply(input, weight, bias, residual, constants)
        return output
    output, _, _ = _forward(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        eps,
        code,
        negative_slope,
        inplace,
        False,
    )
    if inplace:
        torch.autograd.graph.increment_version(input)
    return output


def _not_called(*arguments: Any) -> Any:
    return NotImplemented


#: Either node's. ``run`` has the signature of :func:`_run`. ``call`` takes (input, running_mean,
#: running_var, weight, bias, eps, activation, negative_slope, residual, inplace, ranks), does what
#: :func:`frozen_batch_norm` does, and returns ``NotImplemented`` unless all are plain tensors,
#: nobody watches, and the input has one of these numbers of dimensions (``()``: any). So does
#: ``call_layer`` (input, buffers, parameters, eps, ...), with the vectors of a module.
run: Callable[..., Tensor] = _run
call: Callable[..., Any] = _not_called
call_layer: Callable[..., Any] = _not_called
if node.compiled is not None:
    run = node.compiled.run
    call, call_layer = node.compiled.call, node.compiled.call_layer


def frozen_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Batch normalization with fixed statistics, a residual and an activation, in one pass.

        y = act((x - mean) * weight / sqrt(var + eps) + bias + residual)

    This is the inference form of Ioffe & Szegedy, "Batch Normalization" (2015), algorithm 2. The
    mean is subtracted before scaling, which keeps digits where it is large. Arithmetic is in
    float32 (float64 for a float64 input) whatever the dtypes.

    Args:
        input: ``[N, C, ...]``, float16, bfloat16, float32 or float64, any strides. Full speed where
            it is contiguous or ``channels_last``; else it is copied.
        running_mean: ``[C]``, any of those dtypes, also another than the input's.
        running_var: ``[C]``, likewise; not negative (not checked: it would stall a GPU).
        weight: ``[C]`` or ``None`` for ones.
        bias: ``[C]`` or ``None`` for zeros.
        eps: added to the variance; finite, at least 0.
        activation: ``None``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"`` or
            ``"hardswish"``.
        negative_slope: of ``"leaky_relu"``.
        residual: added before the activation; shape, dtype and device of ``input``.
        inplace: write the result over ``input`` and return it. Saves memory unless the gradient of
            the weight or of a smooth activation needs the input, of which a copy is then kept.

    Returns:
        A tensor of the shape and dtype of ``input``: contiguous, or channels_last (also
        channels_last_3d) where ``input`` is, as the output of ``torch.nn.BatchNorm2d``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, ``eps`` is negative or not finite, or
            ``inplace`` would overwrite a leaf that requires grad or an expanded tensor. Nothing has
            been modified then.
        ValueError: an unknown ``activation``.

    Gradients flow to ``input``, ``weight``, ``bias`` and ``residual``, each only if needed.
    """
    if not is_compiling():
        output: Tensor = call(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            eps,
            activation,
            negative_slope,
            residual,
            inplace,
            (),
        )
        if output is not NotImplemented:
            return output
    # Tracers (torch.fx) and tensor subclasses.
    overridden = has_torch_function_variadic(input, residual, weight, bias)
    if overridden or _takes_plain_path(input, running_mean, running_var):
        arguments = (input, running_mean, running_var, weight, bias, eps)
        options: dict[str, Any] = {
            "activation": activation,
            "negative_slope": negative_slope,
            "residual": residual,
            "inplace": inplace,
        }
        if overridden:
            relevant = (input, residual, weight, bias)
            return handle_torch_function(frozen_batch_norm, relevant, *arguments, **options)
        return reference.frozen_batch_norm(*arguments, **options)
    code = _code(activation)
    ordered = input if inplace or input.is_contiguous() else reference.in_torchs_order(input)
    vectors = (running_mean, running_var, weight, bias)
    return run(ordered, *vectors, residual, eps, code, negative_slope, inplace, False)


# What torch.jit.script takes instead.
frozen_batch_norm.__prepare_scriptable__ = lambda: reference.positional  # type: ignore[attr-defined]


@functools.cache
def _identity(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A mean and a variance that change nothing."""
    with torch.inference_mode(False):
        zeros = torch.zeros(channels, dtype=dtype, device=device)
        return zeros, torch.ones_like(zeros)


def activate(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """``act(input + bias + residual)`` by the same kernels, with a bias ``[C]``, written over
    ``input`` where autograd does not need it."""
    if is_transformed() or not has_kernels(input):
        total = input
        if bias is not None:
            total = total + bias.to(input.dtype).reshape([-1] + [1] * (input.dim() - 2))
        if residual is not None:
            total = total + residual
        return reference.activate(total, activation, negative_slope)
    code = _code(activation)
    kept = (code in SMOOTH and torch.is_grad_enabled()) or torch._C._len_torch_dispatch_stack() > 0
    inplace = not kept
    mean, var = _identity(input.shape[1], torch.float32, input.device)
    return run(input, mean, var, None, bias, residual, 0.0, code, negative_slope, inplace, True)
