"""Freezing the batch normalizations of a model, and thawing them again."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .checks import fail
from .export import is_near_zero
from .fusion.classes import fuse as fuse_classes
from .fusion.classes import is_enabled, only_holds, unfuse
from .fusion.fold import is_sharded
from .modules import FrozenBatchNormAct2d, _FrozenBatchNorm
from .probe import COUNTERS, EVERY_RANK, VECTORS
from .recognise import (
    NO_SUBMODULE,
    LeftAlone,
    give_eps,
    is_batch_norm,
    is_probed,
    live_form,
    recognise,
    unregistered,
)


def _check_statistics(name: str, frozen: _FrozenBatchNorm) -> None:
    op = "convert_frozen_bn"
    mean, var, eps = frozen.running_mean, frozen.running_var, float(frozen.eps)
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


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    for attribute, value in vars(source).items():
        if "hook" in attribute:
            setattr(target, attribute, value)


def _profilers_counters(layer: nn.Module) -> list[str]:
    """The names of buffers that belong to neither formula, and that hooks may go on writing to."""
    return [name for name in COUNTERS if name != "num_batches_tracked" and name in layer._buffers]


def _freeze(original: nn.Module, freeze_affine: bool) -> _FrozenBatchNorm:
    kind = recognise(original)
    new = kind.frozen_class(
        original.running_mean.numel(),  # type: ignore[operator]
        kind.eps,
        affine=original.weight is not None,
        freeze_affine=freeze_affine,
        activation=kind.activation,
        negative_slope=kind.negative_slope,
        device="meta",
    )
    for name in VECTORS:
        value = getattr(original, name)
        if name in new._parameters:
            if value is not None and not isinstance(value, Parameter):
                value = Parameter(value.detach().clone())
            new._parameters[name] = value
        else:
            # A copy: an optimizer made earlier still holds the original, and may go on changing it.
            new._buffers[name] = None if value is None else value.detach().clone()
    new._modules.update(kind.submodules)
    new._buffers.update((name, original._buffers[name]) for name in _profilers_counters(original))
    new._non_persistent_buffers_set = original._non_persistent_buffers_set & {*new._buffers}
    if is_probed(original):
        new._version = original._version  # of its checkpoints, which it may ask for
    if kind.ranks not in (None, new._ranks):
        new._ranks = kind.ranks if kind.ranks != EVERY_RANK else ()
    _share_hooks(original, new)
    for attribute, value in vars(original).items():
        if not hasattr(type(new), attribute):  # "forward" and the like, which would replace ours
            vars(new).setdefault(attribute, value)  # qconfig and the like
    new._original = [original]
    return new


def _replace(root: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    for new in replacements.values():
        for hook in new._load_state_dict_pre_hooks.values():
            if getattr(hook, "with_module", False):  # it hands over the module it was made for
                hook.module = weakref.ref(new)  # type: ignore[attr-defined]
    return replacements.get(root, root)


def convert_frozen_bn(
    module: nn.Module,
    *,
    freeze_affine: bool = True,
    fuse: bool = True,
    fold_conv: bool = False,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Replace the batch normalizations in ``module`` by frozen ones that compute what they compute
    in ``eval()`` mode, whatever mode the model is in later.

    >>> import torch, frozen_bn
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = model(torch.randn(4, 3, 9, 9))  # it has been trained
    >>> model = frozen_bn.convert_frozen_bn(model).train()
    >>> print(frozen_bn.summary(model))
    name  class              state
    1     FrozenBatchNorm2d  frozen, merged with relu, in place
    <BLANKLINE>
    1 frozen, 0 skipped
    1 merged with relu

    Converts torch's, timm's (with their activation), and frozen ones of other projects, which are
    recognised by what they compute: ``forward`` is tried on made-up values. Names, order, eps,
    dtype, device, hooks and sharing are kept. What cannot be frozen is left alone, with a warning
    that says why. Converting twice changes nothing; ``unfreeze_bn`` undoes it.

    Make optimizer groups before, or by ``norm_parameters``: frozen layers are no ``_BatchNorm``.

    Args:
        module: changed in place.
        freeze_affine: weight and bias become buffers, which no optimizer sees. If false, they stay
            the same Parameters, so that an optimizer made before goes on working.
        fuse: merge the activation, the sum and the second branch that follow a layer into its
            kernel, and write over the output of a convolution that nothing else reads: methods that
            call frozen layers are rewritten, in a derived class (``fused_source`` shows them), and
            decide as they run. Does nothing where the environment has ``FROZEN_BN_FUSE=0``.
        fold_conv: the same, but fold layers into the convolutions before them, at every call, with
            exact gradients. For weights that are final there is ``fold_for_inference``.
        where: ``where(name, module)`` picks the layers; all by default.

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
                raise LeftAlone("torch.compile holds on to it, freeze before compiling")
            if is_sharded(layer):
                raise LeftAlone("FSDP holds on to it, freeze before sharding")
            frozen = _freeze(layer, freeze_affine)
        except LeftAlone as reason:
            left_alone[layer] = f"frozen_bn: {name!r} is left as it is: {reason}"
            continue
        _check_statistics(name, frozen)
        frozen.near_zero = is_near_zero(frozen.running_mean, frozen.running_var, frozen.eps)
        replacements[layer] = frozen
        if _never_trained(layer):
            never_trained.append(name)
    elsewhere = [name for name, layer in unregistered(module) if layer not in left_alone]
    for text in left_alone.values():
        warnings.warn(text, stacklevel=2)
    for name in elsewhere:
        warnings.warn(f"frozen_bn: {name!r} is left as it is: {NO_SUBMODULE}", stacklevel=2)
    if never_trained:
        others = len(never_trained) - 1
        subject = f"{never_trained[0]!r} " + (f"and {others} more were" if others else "was")
        warnings.warn(
            f"frozen_bn: {subject} never trained (mean 0, variance 1, no batch seen): frozen like "
            "that, it normalizes nothing",
            stacklevel=2,
        )
    module = _replace(module, replacements)
    if (fuse or fold_conv) and is_enabled():
        fuse_classes(module, fold_conv)
    return module


def _check_thawable(frozen: _FrozenBatchNorm) -> None:
    if is_sharded(frozen):
        raise LeftAlone("FSDP holds on to it, unfreeze before sharding")
    kept = {"act", "drop"} if isinstance(frozen, FrozenBatchNormAct2d) else set()
    registered = {*frozen._parameters, *frozen._buffers, *frozen._modules}
    altered = (registered ^ {*VECTORS}) - kept - {*_profilers_counters(frozen)}
    if altered:  # by pruning, a parametrization and the like, which unfreezing would lose
        raise LeftAlone(f"it was altered ({', '.join(sorted(altered))})")


def _thawed_vectors(frozen: _FrozenBatchNorm) -> dict[str, Any]:
    """The vectors as a live layer can have them: no mixture of half precision and float32."""
    vectors = {name: getattr(frozen, name) for name in VECTORS}
    dtype = vectors["weight"].dtype if isinstance(vectors["weight"], Parameter) else None
    if dtype is None or not frozen.kept_wide:
        return vectors
    for name in ("running_mean", "running_var"):
        wide, narrowed = vectors[name], vectors[name].to(dtype)
        fits = narrowed.is_meta or bool(torch.isfinite(narrowed).all())
        if fits and name == "running_var" and not narrowed.is_meta:  # or a small one has become 0
            before, after = torch.rsqrt(torch.stack([wide.float(), narrowed.float()]) + frozen.eps)
            fits = torch.allclose(before, after, rtol=0.02, atol=0.0)
        if not fits:
            raise LeftAlone(f"{name} does not fit in {str(dtype).removeprefix('torch.')}")
        vectors[name] = narrowed
    return vectors


def _thaw(frozen: _FrozenBatchNorm, training: bool) -> nn.Module:
    _check_thawable(frozen)
    original = frozen._original[0] if frozen._original else live_form(frozen)
    vectors = _thawed_vectors(frozen)
    give_eps(original, frozen.eps)
    for name, value in vectors.items():
        old = getattr(original, name)
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
    _share_hooks(frozen, original)
    original._modules.update(frozen._modules)
    original._buffers.update((name, frozen._buffers[name]) for name in _profilers_counters(frozen))
    for part in {*original.modules()} - {*frozen.modules()}:
        part.training = training
    return original


def _surrounding_modes(root: nn.Module) -> dict[nn.Module, bool]:
    """Whether the first module around it that has a ``forward`` is in training mode, by the module
    held. (What torch.fx makes to hold others has none, and its mode means nothing.)"""
    modes: dict[nn.Module, bool] = {root: root.training}
    for parent in root.modules():
        holder = only_holds(parent)
        for child in parent._modules.values():
            if child is not None:
                modes.setdefault(child, modes[parent] if holder else parent.training)
    return modes


def unfreeze_bn(module: nn.Module) -> nn.Module:
    """Undo ``convert_frozen_bn``: the original modules return, with their class, momentum,
    ``num_batches_tracked`` and ``requires_grad``, and the values that the frozen ones have now.
    Each gets the mode (``training``) of the module that holds it. After ``half()`` a frozen affine
    and its statistics are still float32, which torch's layers take; behind a trained affine the
    statistics get its dtype, and the layer is left alone, with a warning, where they do not fit.

    Frozen modules that were not converted become ``torch.nn.BatchNorm1d/2d/3d``; one that was made
    with an activation is left alone, with a warning.

    Args:
        module: changed in place.

    Returns:
        ``module``, or its replacement where it is itself a frozen batch normalization.
    """
    unfuse(module)
    modes = _surrounding_modes(module)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _FrozenBatchNorm):
            try:
                own = bool(layer._original) and layer._original[0].training
                replacements[layer] = _thaw(layer, modes.get(layer, own))
            except LeftAlone as reason:
                warnings.warn(f"frozen_bn: {name!r} is left as it is: {reason}", stacklevel=2)
    return _replace(module, replacements)
