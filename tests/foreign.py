"""Batch normalizations that projects carry themselves, as they are written there."""

from __future__ import annotations

import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Of those that look like one: how often their code ran.
RAN: list[str] = []


def _register(layer: nn.Module, n: int) -> None:
    layer.register_buffer("weight", torch.ones(n))
    layer.register_buffer("bias", torch.zeros(n))
    layer.register_buffer("running_mean", torch.zeros(n))
    layer.register_buffer("running_var", torch.ones(n))


class Buffers(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        _register(self, n)


class Detectron2(Buffers):
    """Two ways, by whether a gradient is wanted."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.num_features, self.eps = num_features, eps
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale, bias = scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
            return x * scale.to(x.dtype) + bias.to(x.dtype)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
        )


class MaskRCNNBenchmark(Buffers):
    """Without an eps."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            self.weight, self.bias = self.weight.half(), self.bias.half()
        scale = self.weight * self.running_var.rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class DETR(Buffers):
    """With one that is written in ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        eps = 1e-5
        scale = w * (rv + eps).rsqrt()
        return x * scale + (b - rm * scale)


class DeformableDETR(DETR):
    """With an attribute too."""

    def __init__(self, n: int, eps: float = 1e-5) -> None:
        super().__init__(n)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + self.eps).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class Torchvision(Buffers):
    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class Trainable(nn.Module):
    """Of any rank, in float32 whatever comes, with a trained affine and an eps of its own."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.variance_epsilon = 1e-3
        self.eps = 1e-3
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.running_mean, self.running_var, self.weight, self.bias
        mean, var, weight, bias = (v.float() for v in vectors)
        y = F.batch_norm(x.float(), mean, var, weight, bias, False, 0.0, self.eps)
        return y.to(x.dtype)


class OneDimensional(Buffers):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / torch.sqrt(self.running_var + 1e-5)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        assert x.dim() in (2, 3)
        return (x - self.running_mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


#: What becomes of ``[2, C, 5, 5]``, by class: its eps.
THE_FORMULA = {
    Detectron2: 1e-5,
    MaskRCNNBenchmark: 0.0,
    DETR: 1e-5,
    DeformableDETR: 1e-5,
    Torchvision: 1e-5,
    Trainable: 1e-3,
}


# Not the formula


class Shifted(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3


class EpsOutside(Buffers):
    """Of the root."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight / (self.running_var.sqrt() + 1e-5)).view(1, -1, 1, 1)
        mean, bias = self.running_mean.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        return (x - mean) * scale + bias


class Activated(Torchvision):
    """As inplace_abn's layers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x))


class Writing(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return y


class Live(Torchvision):
    """In training it is what it looks like."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.1, self.eps)
        return super().forward(x)


class WithoutGradient(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.requires_grad else x


class OverItsInput(Torchvision):
    def forward(self, x: Tensor) -> Tensor:
        return x.copy_(super().forward(x))


class Raising(Buffers):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


class Random(Torchvision):
    """Draws from every generator, and leaves its mark wherever it can."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.calls: list[int] = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        self.count += 1
        RAN.append(type(self).__name__)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.rand()
        torch.set_grad_enabled(False)
        return super().forward(x) + torch.rand(()) + random.random()


NOT_THE_FORMULA = [
    Shifted,
    EpsOutside,
    Activated,
    Writing,
    Live,
    WithoutGradient,
    OverItsInput,
    Raising,
    Random,
]
