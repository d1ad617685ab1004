"""Freezing the batch normalizations of a model, and thawing them again."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .checks import fail
from .fuse import ACTIVATION_MODULES, fuse_forwards, unfuse_forwards
from .modules import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, _FrozenBatchNorm

_VECTORS = ("weight", "bias", "running_mean", "running_var")

_FROZEN_CLASSES: dict[type[nn.Module], type[_FrozenBatchNorm]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenBatchNorm2d,
}

#: Classes of other libraries that become FrozenBatchNorm2d too: module, name.
_LIBRARY_CLASSES = (
    ("torchvision.ops.misc", "FrozenBatchNorm2d"),
    ("timm.layers.norm_act", "BatchNormAct2d"),
)


class _CannotFreeze(Exception):
    """Why a module is left alone."""


def _is_library_class(kind: type[nn.Module]) -> bool:
    # A model can only contain the class if its library has been imported.
    return any(
        kind is getattr(sys.modules.get(module), name, None) for module, name in _LIBRARY_CLASSES
    )


def is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or _is_library_class(type(module))


def _frozen_class(module: nn.Module) -> type[_FrozenBatchNorm]:
    kind = type(module)
    if _is_library_class(kind):
        return FrozenBatchNorm2d
    if isinstance(module, LazyModuleMixin):
        raise _CannotFreeze("it is lazy and not initialized, there are no statistics to freeze")
    if kind not in _FROZEN_CLASSES:
        raise _CannotFreeze(f"{kind.__name__} is a subclass that may compute something else")
    return _FROZEN_CLASSES[kind]


def _check_unaltered(module: nn.Module) -> None:
    """Pruning, weight norm, observers and the like register more than the class does, and take
    part in what the layer computes; so does a ``forward`` of its own."""
    usual = {*_VECTORS, "num_batches_tracked"}
    if _is_library_class(type(module)):
        usual |= {"act", "drop"}
    registered = {*module._parameters, *module._buffers, *module._modules}
    altered = (registered - usual) | (set(_VECTORS) - registered) | ({"forward"} & {*vars(module)})
    if altered:
        names = ", ".join(sorted(altered))
        raise _CannotFreeze(f"it was altered ({names}) and may compute something else")
    if module.running_mean is None or module.running_var is None:
        raise _CannotFreeze("track_running_stats=False, there are no statistics to freeze")


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if "hooks" in name)


def _activation(module: nn.Module) -> dict[str, Any]:
    """The activation that timm's BatchNormAct2d carries, as arguments of ours."""
    act = module._modules.get("act") or nn.Identity()
    drop = module._modules.get("drop") or nn.Identity()
    if not isinstance(drop, nn.Identity):
        raise _CannotFreeze("it has a dropout between normalization and activation")
    if type(act) not in ACTIVATION_MODULES:
        raise _CannotFreeze(f"its activation {type(act).__name__} has no fused form")
    if _has_hooks(act) or _has_hooks(drop):
        raise _CannotFreeze("its activation or dropout has hooks, which would no longer be called")
    return {
        "activation": ACTIVATION_MODULES[type(act)],
        "negative_slope": getattr(act, "negative_slope", 0.01),
    }


def _check_statistics(name: str, module: nn.Module) -> None:
    op = "convert_frozen_bn"
    mean, var, eps = module.running_mean, module.running_var, float(module.eps)  # type: ignore[arg-type]
    assert isinstance(mean, Tensor) and isinstance(var, Tensor)
    if not 0 <= eps < math.inf:
        raise fail(op, f"eps of {name!r} to be finite and >= 0", f"{eps:g}")
    if mean.is_meta or mean.numel() == 0:
        return
    for vector, values in (("running_mean", mean), ("running_var", var)):
        if not torch.isfinite(values).all():
            raise fail(op, f"{vector} of {name!r} to be finite", "NaN or infinity")
    least = var.min().item()
    if least < 0 or least + eps <= 0:
        raise fail(
            op,
            f"{name!r} to have running_var >= 0 and running_var + eps > 0",
            f"running_var {least:g} and eps {eps:g}",
        )


def _never_trained(module: nn.Module) -> bool:
    count = getattr(module, "num_batches_tracked", None)
    if not isinstance(count, Tensor) or count.is_meta or count.item() > 0:
        return False
    mean, var = module.running_mean, module.running_var
    assert isinstance(mean, Tensor) and isinstance(var, Tensor)
    return not mean.any() and bool((var == 1).all())


def why_not_frozen(layer: nn.Module) -> str | None:
    """Why :func:`convert_frozen_bn` leaves a batch normalization alone, if it does."""
    try:
        _frozen_class(layer)
        _check_unaltered(layer)
        _activation(layer)
    except _CannotFreeze as reason:
        return str(reason)
    return None


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    for attribute, value in vars(source).items():
        if "hook" in attribute:
            setattr(target, attribute, value)


def _freeze(original: nn.Module, freeze_affine: bool) -> _FrozenBatchNorm:
    frozen_class = _frozen_class(original)
    _check_unaltered(original)
    new = frozen_class(
        original.running_mean.numel(),  # type: ignore[operator]
        original.eps,  # type: ignore[arg-type]
        affine=original.weight is not None,
        freeze_affine=freeze_affine,
        device="meta",
        **_activation(original),
    )
    for name in _VECTORS:
        value = getattr(original, name)
        if name in new._parameters:
            if value is not None and not isinstance(value, Parameter):
                value = Parameter(value.detach().clone())
            new._parameters[name] = value
        else:
            # A copy: an optimizer made earlier still holds the original, and may go on changing it.
            new._buffers[name] = None if value is None else value.detach().clone()
    if isinstance(original, nn.SyncBatchNorm):
        new._ranks = ()
    new.training = original.training
    _share_hooks(original, new)
    for attribute, value in vars(original).items():
        if attribute != "_compiled_call_impl":  # that of original.compile() calls the original
            vars(new).setdefault(attribute, value)  # qconfig and the like
    new._original = [original]
    return new


def _replace(root: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(root, root)


def convert_frozen_bn(
    module: nn.Module,
    *,
    freeze_affine: bool = True,
    fuse: bool = False,
    fold_conv: bool = False,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Replace the batch normalizations in ``module`` by frozen ones that compute what they compute
    in ``eval()`` mode, whatever mode the model is in later.

    Converts BatchNorm1d/2d/3d, SyncBatchNorm (no process group needed), torchvision's
    FrozenBatchNorm2d, and timm's BatchNormAct2d with its activation. Names, order, eps, dtype,
    device (meta too), ``training``, hooks and sharing are kept. What cannot be frozen is left
    alone, each with a warning that says why. Converting twice changes nothing.

    Args:
        module: changed in place.
        freeze_affine: weight and bias become buffers, which no optimizer sees. If false, they stay
            the same Parameter objects, with their ``requires_grad``.
        fuse: also merge what stands next to a frozen layer in the ``forward`` that calls it into
            its kernel: the activation after it, a sum with another tensor (or with another frozen
            layer) and the activation after that; and overwrite the output of a convolution that
            nothing else reads. See :func:`summary` for what was merged, or why not.
        fold_conv: the same, but fold what follows a convolution into its weight and bias, at every
            call, so that gradients reach the weight and a trainable affine as before. Where no
            gradient is wanted the folded weights are kept until a parameter changes (a write
            through ``.data`` is not noticed).
        where: ``where(name, module)`` picks the layers, by their qualified name; all by default.

    Returns:
        ``module``, or its replacement where it is itself a batch normalization.

    Raises:
        RuntimeError: a layer's statistics or eps are not finite, or a variance or eps is negative,
            or both are zero. Nothing has been modified then.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    left_alone: dict[nn.Module, str] = {}
    never_trained: list[str] = []
    for name, layer in module.named_modules(remove_duplicate=False):
        if not is_batch_norm(layer) or layer in replacements or layer in left_alone:
            continue
        if where is not None and not where(name, layer):
            continue
        name = name or type(layer).__name__
        try:
            if name.endswith("_orig_mod"):
                raise _CannotFreeze("torch.compile holds on to it, freeze before compiling")
            frozen = _freeze(layer, freeze_affine)
        except _CannotFreeze as reason:
            left_alone[layer] = f"frozen_bn: {name!r} is left as it is: {reason}"
            continue
        _check_statistics(name, layer)
        replacements[layer] = frozen
        if _never_trained(layer):
            never_trained.append(name)
    for text in left_alone.values():
        warnings.warn(text, stacklevel=2)
    if never_trained:
        others = len(never_trained) - 1
        subject = f"{never_trained[0]!r} " + (f"and {others} more were" if others else "was")
        warnings.warn(
            f"frozen_bn: {subject} never trained (mean 0, variance 1, no batch seen): frozen like "
            "that, it normalizes nothing",
            stacklevel=2,
        )
    module = _replace(module, replacements)
    if fuse or fold_conv:
        fuse_forwards(module, fold_conv)
    return module


def _thaw(frozen: _FrozenBatchNorm) -> nn.Module:
    if frozen._original:
        original = frozen._original[0]
    else:
        if frozen.activation is not None:
            raise _CannotFreeze(f"it was made with activation={frozen.activation!r}")
        live = next((k for k, v in _FROZEN_CLASSES.items() if v is type(frozen)), None)
        if live is None:
            raise _CannotFreeze(f"{type(frozen).__name__} is a subclass, made by hand")
        original = live(frozen.num_features, frozen.eps, affine=frozen.affine)
    for name in _VECTORS:
        value, old = getattr(frozen, name), getattr(original, name)
        if name in original._buffers:
            original._buffers[name] = value if value is None else value.detach()
        elif value is None or isinstance(value, Parameter):
            original._parameters[name] = value
        elif old.is_meta != value.is_meta:
            original._parameters[name] = Parameter(value.clone(), old.requires_grad)
        else:
            old.data = value.detach().clone()  # the same Parameter: an optimizer may know it
            if old.grad is not None:
                old.grad.data = old.grad.to(old)
    count = getattr(original, "num_batches_tracked", None)
    if isinstance(count, Tensor):
        device = frozen.running_mean.device
        moved = torch.zeros_like(count, device=device) if count.is_meta else count.to(device)
        original._buffers["num_batches_tracked"] = moved
    original.eps = frozen.eps  # type: ignore[assignment]
    _share_hooks(frozen, original)
    for part in original.modules():
        part.training = frozen.training
    return original


def unfreeze_bn(module: nn.Module) -> nn.Module:
    """Undo :func:`convert_frozen_bn`: the original modules return, with their class, momentum,
    ``num_batches_tracked`` and ``requires_grad``, and the values that the frozen ones have now.

    Frozen modules that were not converted become ``torch.nn.BatchNorm1d/2d/3d``; one that was made
    with an activation is left alone, with a warning.

    Args:
        module: changed in place.

    Returns:
        ``module``, or its replacement where it is itself a frozen batch normalization.
    """
    unfuse_forwards(module)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _FrozenBatchNorm):
            try:
                replacements[layer] = _thaw(layer)
            except _CannotFreeze as reason:
                warnings.warn(f"frozen_bn: {name!r} is left as it is: {reason}", stacklevel=2)
    return _replace(module, replacements)
