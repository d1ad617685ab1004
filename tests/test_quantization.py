"""torch.ao.quantization: it knows the live layers, so unfreeze_bn comes first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.ao.quantization as quantization
from helpers import assert_same_bits, snapshot
from nets import EVERY_CONVERSION, images, live_network
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn, unfreeze_bn

FUSED = [["body.0", "body.1", "body.2"]]


class Quantizable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.body = live_network()[:3]

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.body(self.quant(x)))


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "x86" if "x86" in engines else "qnnpack"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations, and observers that saw little
        yield
    torch.backends.quantized.engine = before


def frozen_and_back(net: nn.Module, options: dict[str, bool]) -> nn.Module:
    convert_frozen_bn(net, **options)
    net(images())
    return unfreeze_bn(net)


def quantized(net: nn.Module) -> nn.Module:
    """Eager mode, after training."""
    net = quantization.fuse_modules(net.eval(), FUSED)
    net.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(net, inplace=True)
    net(images())
    return quantization.convert(net)


def quantized_in_training(net: nn.Module) -> nn.Module:
    """Eager mode, quantization-aware."""
    net = quantization.fuse_modules_qat(net.train(), FUSED)
    net.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
    quantization.prepare_qat(net, inplace=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for seed in range(2):
        optimizer.zero_grad()
        net(images(seed)).square().mean().backward()
        optimizer.step()
    return quantization.convert(net.eval())


@pytest.mark.parametrize("quantize", [quantized, quantized_in_training])
@EVERY_CONVERSION
def test_after_unfreezing_it_is_as_if_never_frozen(options, quantize):
    expected = quantize(Quantizable())
    net = quantize(frozen_and_back(Quantizable(), options))
    assert type(net.body[0]).__module__.startswith("torch.ao.nn.intrinsic.quantized")
    assert [type(m) for m in net.modules()] == [type(m) for m in expected.modules()]
    assert torch.equal(net(images()), expected(images()))
    live = Quantizable().eval()(images())
    if quantize is quantized:
        assert (net(images()) - live).abs().max() < 0.05 * live.abs().max()


@EVERY_CONVERSION
def test_unfreezing_again_after_quantization_of_a_copy(options):
    net = convert_frozen_bn(Quantizable(), **options)
    before = snapshot(net)
    quantized(unfreeze_bn(copy.deepcopy(net)))
    assert_same_bits(snapshot(net), before)


@pytest.mark.parametrize("fuse", [quantization.fuse_modules, quantization.fuse_modules_qat])
def test_a_frozen_layer_is_refused(fuse):
    net = convert_frozen_bn(Quantizable(), fuse=True)
    net.train(fuse is quantization.fuse_modules_qat)
    with pytest.raises((AssertionError, NotImplementedError), match="FrozenBatchNorm2d"):
        fuse(net, FUSED)


@EVERY_CONVERSION
def test_observers_and_fake_quantization_around_frozen_layers(options):
    """Not fused, a frozen layer stays float: what surrounds it is observed as with any module that
    quantization does not know."""
    net = convert_frozen_bn(Quantizable(), **options).eval()
    expected = net(images())
    net.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(net)
    assert torch.allclose(prepared(images()), expected, atol=1e-5)
    assert prepared.body[0].activation_post_process.max_val > 0
