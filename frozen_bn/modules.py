"""Modules: batch normalization whose statistics are constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import export, functional, reference
from .checks import Statistics, activation_code, fail, mismatch
from .functional import frozen_batch_norm

_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]


def _upgrade(
    original: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Does to ``state_dict`` what the class of ``original`` does before it loads one: detectron2
    corrects the variances of old versions. What it loads goes nowhere."""
    kind = type(original)
    if kind._load_from_state_dict is not nn.Module._load_from_state_dict:
        shell = nn.Module.__new__(kind)
        vars(shell).update(vars(original), _parameters={}, _buffers={}, _modules={})
        vars(shell)["_load_state_dict_pre_hooks"] = {}
        shell._load_from_state_dict(state_dict, prefix, metadata, False, [], [], [])


class _FrozenBatchNorm(nn.Module):
    """What the modules of all ranks share. ``train()`` and ``eval()`` change nothing."""

    if TYPE_CHECKING:  # TorchScript takes no buffer for one whose type it is told to be optional
        weight: Tensor | None
        bias: Tensor | None
        running_mean: Tensor
        running_var: Tensor
        _original: list[nn.Module]

    __constants__ = ("_ranks",)
    __jit_ignored_attributes__ = ("_original", "fold_conv", "__module__", "kept_wide", "near_zero")

    #: Whether half() or the like has been told to narrow the statistics, and was not obeyed.
    kept_wide: bool = False

    #: Whether torch's operator keeps the digits of its statistics: for exporters.
    near_zero: bool = False

    #: Whether it is folded into the convolution before it, where its caller is rewritten.
    fold_conv: bool = False

    #: The numbers of input dimensions taken; empty for any.
    _ranks: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = None,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        freeze_affine: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        activation_code(activation)
        if not track_running_stats:  # there would be no statistics, and made-up ones would be used
            raise ValueError(
                mismatch(type(self).__name__, "track_running_stats to be True", "False")
            )
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        self.freeze_affine = freeze_affine
        self.activation = activation
        self.negative_slope = negative_slope
        self.inplace = inplace
        self.track_running_stats = True  # for code that asks, as it asks for ``training``
        self.training = False
        # torch.fx takes a module for a leaf by the module path that the *instance* has. Looked
        # into, it would be a call of a function, and gone with its name and its fate.
        self.__module__ = "torch.nn"
        # What convert_frozen_bn replaced, for unfreeze_bn; in a list, so as not to be a submodule.
        self._original = []

        def constant(value: float) -> Tensor:
            return torch.full([num_features], value, device=device, dtype=dtype)

        self._register_affine("weight", constant(1.0) if affine else None)
        self._register_affine("bias", constant(0.0) if affine else None)
        self.register_buffer("running_mean", constant(0.0))
        self.register_buffer("running_var", constant(1.0))
        self.near_zero = True

    def _register_affine(self, name: str, value: Tensor | None) -> None:
        if self.freeze_affine:
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, None if value is None else Parameter(value))

    def __setattr__(self, name: str, value: Any) -> None:
        # Never in training: somebody hands it to F.batch_norm, which then moves the statistics.
        super().__setattr__(name, cast(Any, False) if name == "training" else value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("weight", "bias", "running_mean", "running_var"):
            old, new = before.get(name), self._buffers.get(name)
            if old is None or new is None:
                continue
            # Half precision has less range: a variance of raw pixels would be inf, a small one 0;
            # so has one kind of it than the other.
            if new.is_floating_point() and old.dtype != new.dtype and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device, torch.float32)
                self.kept_wide = True
        return self

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input``, add ``residual`` (same shape and dtype), apply the activation."""
        if _is_scripting():
            return self._scripted_forward(input, residual)
        if not functional.is_compiling():
            output = functional.call_layer(
                input,
                self._buffers,
                self._parameters,
                self.eps,
                self.activation,
                self.negative_slope,
                residual,
                self.inplace,
                self._ranks,
            )
            if output is not NotImplemented:
                return cast(Tensor, output)
        return self.normalize(input, residual, self.activation, self.negative_slope, self.inplace)

    def _scripted_forward(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """:meth:`forward` in TorchScript's part of Python."""
        takes, ranks = len(self._ranks) == 0, ""
        for rank in self._ranks:
            takes = takes or rank == input.dim()
            ranks += f" or {rank}" if len(ranks) else f"{rank}"
        if not takes:
            expected = f"input to have {ranks} dimensions"
            raise RuntimeError(mismatch("forward", expected, f"shape {input.shape}"))
        return reference.positional(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.eps,
            self.activation,
            self.negative_slope,
            residual,
            self.inplace,
        )

    def normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        negative_slope: float,
        inplace: bool,
    ) -> Tensor:
        """:meth:`forward` with other options than the module's own."""
        self.check_rank(input)
        if self.near_zero and not inplace and export.is_exporting() and isinstance(input, Tensor):
            statistics = self.statistics()
            if export.takes(input, statistics):
                return export.batch_norm(input, statistics, activation, negative_slope, residual)
        return frozen_batch_norm(
            input,
            *self._vectors(),
            self.eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
            inplace=inplace,
        )

    def _vectors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        # nn.Module looks for an attribute in three places, which takes longer than all else here.
        buffers: dict[str, Any] = self._buffers
        try:
            return (
                buffers["running_mean"],
                buffers["running_var"],
                buffers["weight"],
                buffers["bias"],
            )
        except KeyError:  # trained, or parametrized
            return self.running_mean, self.running_var, self.weight, self.bias

    def statistics(self) -> Statistics:
        """What it normalizes with."""
        return Statistics(*self._vectors(), self.eps)

    def trains_affine(self) -> bool:
        """Whether a gradient is wanted of weight or bias."""
        _, _, weight, bias = self._vectors()
        return torch.is_grad_enabled() and any(
            vector is not None and vector.requires_grad for vector in (weight, bias)
        )

    def check_rank(self, input: Tensor) -> None:
        """Raises what ``forward`` raises for an input of another rank."""
        # What torch.fx traces with is no Tensor.
        if self._ranks and isinstance(input, Tensor) and input.dim() not in self._ranks:
            ranks = " or ".join(map(str, self._ranks))
            raise fail("forward", f"input to have {ranks} dimensions", f"shape {list(input.shape)}")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # With assign=True, a Parameter in it would take a buffer's place, for optimizers to see.
        state_dict = {
            key: value.detach()
            if isinstance(value, Parameter) and key.removeprefix(prefix) in self._buffers
            else value
            for key, value in state_dict.items()
        }
        for original in self._original:
            if not isinstance(original, nn.modules.batchnorm._BatchNorm):
                _upgrade(original, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.near_zero = export.is_near_zero(self.running_mean, self.running_var, self.eps)
        # Checkpoints of a live BatchNorm count its batches; only unfreeze_bn has a use for that.
        key = prefix + "num_batches_tracked"
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        for original in self._original:
            if key in state_dict and "num_batches_tracked" in original._buffers:
                original.num_batches_tracked = state_dict[key].detach().clone()

    def extra_repr(self) -> str:
        text = (
            f"{self.num_features}, eps={self.eps}, affine={self.affine}, "
            f"freeze_affine={self.freeze_affine}"
        )
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text + (", inplace=True" if self.inplace else "")


class FrozenBatchNorm1d(_FrozenBatchNorm):
    """Batch normalization of ``[N, C]`` or ``[N, C, L]`` inputs with fixed statistics.

    See ``FrozenBatchNorm2d``.
    """

    _ranks = (2, 3)


class FrozenBatchNorm2d(_FrozenBatchNorm):
    """Batch normalization of ``[N, C, H, W]`` inputs with fixed statistics.

    A drop-in for ``torchvision.ops.FrozenBatchNorm2d`` (also as ``norm_layer=``) and for a
    ``torch.nn.BatchNorm2d`` whose statistics must not move; ``state_dict`` keys are the same, and
    checkpoints load strictly with or without ``num_batches_tracked``. The formula is that of
    ``frozen_bn.frozen_batch_norm``.

    ``training`` stays False, whatever ``train()`` is told. The statistics, and a frozen affine,
    stay float32 under ``half()``, ``bfloat16()`` and ``to(dtype)``: others have not their range.

    It is no ``torch.nn.modules.batchnorm._BatchNorm``, or ``convert_sync_batchnorm`` and
    ``update_bn`` would revive it. So optimizer groups made by ``isinstance`` take a trained affine
    for any other parameter: make them before converting, or by ``frozen_bn.norm_parameters``.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: has no meaning here; taken because ``torch.nn.BatchNorm2d`` takes it.
        affine: whether there are weight and bias.
        track_running_stats: likewise; has to be true.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers; need not be the input's.
        freeze_affine: they are buffers, which no optimizer sees; else trainable parameters.
        activation: applied in the same pass; see ``frozen_bn.frozen_batch_norm``.
        negative_slope: of ``"leaky_relu"``.
        inplace: write the output over the input.

    Raises:
        ValueError: an unknown ``activation``, or ``track_running_stats=False``.
        RuntimeError: from ``forward``, for an input of another rank, or as
            ``frozen_bn.frozen_batch_norm``.
    """

    _ranks = (4,)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """What convert_frozen_bn makes of a layer of timm with a dropout, or with an activation that
    there is no kernel for: these stay modules, called after it."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = super().forward(input, residual)
        for name in ("drop", "act"):
            module = self._modules.get(name)
            output = output if module is None else module(output)
        return output


class FrozenBatchNorm3d(_FrozenBatchNorm):
    """Batch normalization of ``[N, C, D, H, W]`` inputs with fixed statistics.

    See ``FrozenBatchNorm2d``.
    """

    _ranks = (5,)
