"""fold_for_inference: copies that need no frozen_bn; and networks that torch.fx took apart. On the
CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from batch_norms import messages
from fresh import run_fresh
from helpers import ACTIVATIONS, assert_same_bits, calm_, randomize_, snapshot
from nets import EVERY_CONVERSION, images, live_network, network
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from frozen_bn import (
    FrozenBatchNorm2d,
    convert_frozen_bn,
    fold_for_inference,
    summary,
    unfreeze_bn,
)
from frozen_bn.modules import _FrozenBatchNorm

C = 4


def frozen_layers(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, _FrozenBatchNorm)]


def layers(**options: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Conv2d(3, C, 3, **options), randomize_(nn.BatchNorm2d(C, eps=1e-3))


@EVERY_CONVERSION
def test_a_copy_in_eval_mode_of_plain_modules(options):
    net = network(**options).train()
    modules, before = [*net.modules()], snapshot(net)
    with torch.no_grad():
        expected = net(images())
        copied = fold_for_inference(net, images())
        torch.testing.assert_close(copied(images()), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in net.named_modules()]
    assert not any(module.training for module in copied.modules())
    identities = {n for n, m in copied.named_modules() if type(m) is nn.Identity}
    assert identities == {"1", "3.bn1", "3.bn2", "3.down_bn"}
    assert {type(m).__module__.split(".")[0] for m in copied.modules()} == {"torch", "nets"}
    assert not any("forward" in vars(module) for module in copied.modules())
    # The model itself is as it was.
    assert [*net.modules()] == modules and net.training
    assert_same_bits(snapshot(net), before)
    with torch.no_grad():
        assert torch.equal(net(images()), expected)


def test_it_loads_where_there_is_no_frozen_bn(tmp_path):
    x = torch.randn(2, 3, 9, 9)
    net = convert_frozen_bn(nn.Sequential(*layers(), nn.ReLU()), fold_conv=True)
    with torch.no_grad():
        torch.save((fold_for_inference(net), x, net(x)), tmp_path / "net.pt")
    run_fresh(
        "import sys, torch; sys.modules['frozen_bn'] = None\n"
        f"net, x, y = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)"
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_that_the_layer_carried_stays(activation):
    conv, bn = layers()
    layer = FrozenBatchNorm2d(C, 1e-3, activation=activation, negative_slope=0.3)
    layer.load_state_dict(bn.state_dict())
    net, x = nn.Sequential(conv, layer), torch.randn(2, 3, 9, 9)
    copied = fold_for_inference(net)
    torch.testing.assert_close(copied(x), net(x), rtol=1e-4, atol=1e-5)
    assert frozen_layers(copied) == []


@pytest.mark.parametrize("options", [{"bias": False}, {"padding": 1, "padding_mode": "reflect"}])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_of_every_kind(kind, options):
    if kind is nn.ConvTranspose2d:
        options = {name: value for name, value in options.items() if name != "padding_mode"}
    conv, bn = kind(4, C, 3, groups=2, **options), randomize_(nn.BatchNorm2d(C))
    net, x = convert_frozen_bn(nn.Sequential(conv, bn)), torch.randn(2, 4, 9, 9)
    copied = fold_for_inference(net)
    torch.testing.assert_close(copied(x), net(x), rtol=1e-4, atol=1e-5)
    assert frozen_layers(copied) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_folded_in_float32_and_rounded_once(dtype):
    net = convert_frozen_bn(nn.Sequential(*layers())).to(dtype)
    copied = fold_for_inference(net)
    exact = fold_for_inference(copy.deepcopy(net).double())
    assert {p.dtype for p in copied.parameters()} == {dtype}
    for got, want in zip(copied.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got, want.float().to(dtype) if dtype.itemsize < 4 else want)


def test_a_weight_that_another_convolution_shares_is_not_changed_there():
    conv, bn = layers()
    other = nn.Conv2d(3, C, 3)
    other.weight = conv.weight
    net = nn.ModuleDict({"a": nn.Sequential(conv, bn), "b": other})
    copied = fold_for_inference(convert_frozen_bn(net))
    assert torch.equal(copied["b"].weight, net["b"].weight)
    assert not torch.equal(copied["a"][0].weight, copied["b"].weight)


# What cannot be folded


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = layers(padding=1)
        self.other = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class ReadTwice(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + x


class ConvolvedTwice(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x)


class NormalizedTwice(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.bn(self.conv(x)))


class ByMode(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.training else self.bn(x)


class Optional(Owner):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        x = self.conv(x)
        return x if raw else self.bn(x)


class ByData(Owner):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) if x.sum() > 0 else x


class AnotherMethod(Owner):
    def features(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ByItsWeight(Owner):
    def features(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight)


class BeforeIt(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.bn(F.relu(self.conv(x))))


class WithAResidual(Owner):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y, y)


def hooked() -> nn.Module:
    net = Owner()
    net.bn.register_forward_hook(lambda module, inputs, output: output * 2)
    return net


def convolution_hooked() -> nn.Module:
    net = Owner()
    net.conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return net


def parametrized() -> nn.Module:
    net = Owner()
    parametrizations.weight_norm(net.conv)
    return net


def shared() -> nn.Module:
    net = Owner()
    net.again = net.conv
    return net


def too_large() -> nn.Module:
    net = Owner()
    net.bn.weight.data.fill_(6e4)
    net.bn.running_var.fill_(1e-4)
    return net.half()


LEFT = [ReadTwice, ConvolvedTwice, NormalizedTwice, ByMode, Optional, ByData, AnotherMethod]
LEFT += [ByItsWeight, BeforeIt, WithAResidual, hooked, convolution_hooked, parametrized, shared]


@pytest.mark.parametrize("make", LEFT)
def test_what_cannot_be_folded_stays_a_frozen_layer_and_is_named(make):
    net, x = convert_frozen_bn(make()).eval(), torch.randn(2, 3, 9, 9)
    made: list[nn.Module] = []
    (text,) = messages(lambda: made.append(fold_for_inference(net)))
    assert text.startswith("frozen_bn: not folded, left as they are: 'bn': ")
    (copied,) = made
    assert type(copied.bn) is FrozenBatchNorm2d
    assert_same_bits(snapshot(copied), snapshot(net))
    torch.testing.assert_close(copied(x), net(x))
    for mode in (True, False):
        torch.testing.assert_close(copied.train(mode)(x), net.train(mode)(x))


def test_weights_that_would_not_fit_are_not_folded():
    net = convert_frozen_bn(too_large())
    made: list[nn.Module] = []
    (text,) = messages(lambda: made.append(fold_for_inference(net)))
    assert "the folded weight does not fit in float16" in text
    assert frozen_layers(*made) == ["bn"]


def test_a_convolution_whose_size_alone_is_asked_for_is_folded():
    class Sized(Owner):
        @property
        def width(self) -> int:
            return self.conv.out_channels

    assert messages(lambda: fold_for_inference(convert_frozen_bn(Sized()))) == []


def test_what_is_live_is_named_too():
    net = nn.Sequential(*layers())
    (text,) = messages(lambda: fold_for_inference(net))
    assert "'1': it is not frozen, call convert_frozen_bn before" in text


class Reaching(nn.Module):
    """A parent that calls the convolution itself, which no code near the layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"stem": Owner()})

    def forward(self, x: Tensor) -> Tensor:
        return next(self.body["stem"].children())(x)


def test_an_example_input_tells_what_code_does_not():
    net = convert_frozen_bn(Reaching())
    with pytest.raises(RuntimeError, match="expected the folded model to return what the model"):
        fold_for_inference(net, torch.randn(1, 3, 9, 9))
    assert fold_for_inference(net) is not net


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "densenet121"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_networks_of_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name == "googlenet" else {}
    net = convert_frozen_bn(calm_(getattr(models, name)(**options)))
    copied: list[nn.Module] = []
    texts = messages(lambda: copied.append(fold_for_inference(net, torch.randn(1, 3, 64, 64))))
    left = frozen_layers(*copied)
    assert bool(texts) is bool(left)
    pre_activated = [n for n in left if n.endswith("norm1") or "transition" in n or "norm5" in n]
    assert left == (pre_activated if name == "densenet121" else [])


# Networks that torch.fx took apart


def traced_by_fx(net: nn.Module) -> nn.Module:
    return fx.symbolic_trace(net)


def traced_by_a_tracer(net: nn.Module) -> nn.Module:
    class Mine(fx.Tracer):
        pass

    return fx.GraphModule(net, Mine().trace(net))


def extracted(net: nn.Module) -> nn.Module:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    return extraction.create_feature_extractor(net, {"4": "out"})


@pytest.mark.parametrize("take_apart", [traced_by_fx, traced_by_a_tracer, extracted])
@EVERY_CONVERSION
def test_frozen_layers_are_still_there_after_fx(options, take_apart):
    net, live = network(**options), live_network().eval()
    graph = take_apart(net)
    assert "4 frozen, 0 skipped" in summary(graph)
    assert frozen_layers(graph) == frozen_layers(net)

    def run(module: nn.Module) -> Tensor:
        output = module(images())
        return output["out"] if isinstance(output, dict) else output

    torch.testing.assert_close(run(graph.train()), live(images()), rtol=1e-4, atol=1e-5)
    assert messages(lambda: unfreeze_bn(graph.eval())) == []
    assert sum(type(m) is nn.BatchNorm2d for m in graph.modules()) == 4
    torch.testing.assert_close(run(graph), live(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("take_apart", [traced_by_fx, traced_by_a_tracer, extracted])
@EVERY_CONVERSION
def test_what_fx_took_apart_is_converted_like_code(options, take_apart):
    live = live_network().eval()
    graph = take_apart(live)
    assert messages(lambda: convert_frozen_bn(graph, **options)) == []
    assert len(frozen_layers(graph)) == 4
    output = graph.train()(images())
    output = output["out"] if isinstance(output, dict) else output
    expected = live_network().eval()(images())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert "4 frozen, 0 skipped" in summary(graph)
