"""Ways to a wrong number or a layer passed over, without a word, that a reader found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize_
from torch import Tensor, nn

import frozen_bn
from frozen_bn import convert_frozen_bn, fold_for_inference, unfreeze_bn


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


class ReadsTheWeight(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight)


class Decorated(Pair):
    @torch.no_grad()
    def features(self, x):
        return self.conv(x)


class ByAHelper(Pair):
    def raw(self, x):
        return self.conv(x)

    def features(self, x):
        return self.raw(x)

    def forward(self, x):
        return self.bn(self.raw(x))


class Sometimes(Pair):
    def features(self, x, normalized=False):
        y = self.conv(x)
        return self.bn(y) if normalized else y


class LayerAlone(Pair):
    def features(self, x):
        return self.bn(x)


def made(cls: type[nn.Module]) -> nn.Module:
    return randomize_(cls()).eval()


def image() -> Tensor:
    return torch.randn(2, 4, 7, 7)


@pytest.mark.parametrize("cls", [ReadsTheWeight, Decorated, ByAHelper, Sometimes, LayerAlone])
def test_a_convolution_that_is_used_otherwise_is_not_folded(cls):
    model, x = convert_frozen_bn(made(cls)), image()
    with pytest.warns(UserWarning, match="not folded"):
        folded = fold_for_inference(model)
    for method in {"forward", "features"} & {*dir(cls)}:
        torch.testing.assert_close(getattr(folded, method)(x), getattr(model, method)(x))


@dataclasses.dataclass
class Out:
    y: Tensor


class ReturnsADataclass(Pair):
    def forward(self, x):
        return Out(super().forward(x))


def test_an_example_that_shows_nothing_is_refused():
    model = convert_frozen_bn(made(ReturnsADataclass))
    with pytest.raises(RuntimeError, match="floating tensors to compare, but got Out"):
        fold_for_inference(model, image())


def test_unfreezing_what_fx_made_leaves_it_in_eval_mode():
    model, x = nn.Sequential(made(Pair), nn.ReLU()).eval(), image()
    want = model(x)
    thawed = unfreeze_bn(torch.fx.symbolic_trace(convert_frozen_bn(model)))
    assert not any(
        layer.training for layer in thawed.modules() if isinstance(layer, nn.BatchNorm2d)
    )
    torch.testing.assert_close(thawed(x), want)


def test_statistics_of_one_half_precision_do_not_get_the_range_of_the_other():
    model = made(Pair).bfloat16()
    model.bn.running_var.fill_(1e6)
    convert_frozen_bn(model).half()
    assert model.bn.running_var.dtype == torch.float32
    assert (model.bn.running_var / 1e6 - 1).abs().max() < 0.01


def test_small_variances_that_half_precision_takes_for_zero_are_not_thawed_into_it():
    model = made(Pair)
    model.bn.eps = 1e-10
    model.bn.running_var.fill_(1e-9)
    convert_frozen_bn(model, freeze_affine=False).half()
    with pytest.warns(UserWarning, match="does not fit in float16"):
        unfreeze_bn(model)
    assert isinstance(model.bn, frozen_bn.FrozenBatchNorm2d)


def test_another_forward_in_the_place_of_torchs(monkeypatch):
    torchs = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: torchs(self, x) * 2)
    with pytest.warns(UserWarning, match="has been replaced"):
        convert_frozen_bn(made(Pair))


class Formula(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class AbsoluteWeight(Formula):
    def forward(self, x):
        scale = self.weight.abs() * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class ClampedVariance(Formula):
    def forward(self, x):
        scale = self.weight * (self.running_var.clamp(max=10) + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class WarmingUp(Formula):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.tensor(5))

    def forward(self, x):
        return super().forward(x) * (1 + (self.num_batches_tracked > 0).to(x.dtype))


class CutOff(Formula):
    def forward(self, x):
        return super().forward(x.detach())


class Reversed(Formula):
    def forward(self, x):
        y = super().forward(x)
        return y.detach() * 2 - y if torch.is_grad_enabled() else y


@pytest.mark.parametrize("cls", [AbsoluteWeight, ClampedVariance, WarmingUp, CutOff, Reversed])
def test_what_is_not_quite_the_formula_is_left_alone(cls):
    model = nn.Sequential(cls())
    with pytest.warns(UserWarning, match="left as it is"):
        convert_frozen_bn(model)
    assert type(model[0]) is cls


def test_the_formula_is_converted():
    assert type(convert_frozen_bn(nn.Sequential(Formula()))[0]) is frozen_bn.FrozenBatchNorm2d


class FrozenBN(nn.Module):
    def __init__(self, shape=(1, 4, 1, 1), registered=True):
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            if registered:
                self.register_buffer(name, torch.ones(shape))
            else:
                setattr(self, name, torch.ones(shape))

    def forward(self, x):
        return x


class Holds(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value


@pytest.mark.parametrize("make", [FrozenBN, lambda: FrozenBN(registered=False)])
@pytest.mark.filterwarnings("ignore:frozen_bn")
def test_something_like_one_is_named(make):
    model = nn.Sequential(make())
    with pytest.warns(UserWarning, match="left as it is"):
        convert_frozen_bn(model)
    assert "1 skipped" in frozen_bn.summary(model)


@pytest.mark.parametrize("wrap", [lambda bn: [[bn]], lambda bn: {"a": [bn]}, lambda bn: bn.forward])
def test_layers_kept_deeper_in_containers_are_named(wrap):
    with pytest.warns(UserWarning, match="frozen_bn"):
        convert_frozen_bn(Holds(wrap(randomize_(nn.BatchNorm2d(4)))))


def test_a_parametrized_affine_is_one_of_the_norm_parameters():
    layer = frozen_bn.FrozenBatchNorm2d(4, freeze_affine=False)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert len(frozen_bn.norm_parameters(layer)) == 2
