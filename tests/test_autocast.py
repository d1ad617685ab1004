"""Networks under autocast do no cast that the same network without batch normalizations does not
do."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from casts import Cast, Casts, without_norms
from helpers import randomize_
from nets import CONVERSIONS, EVERY_CONVERSION, Block
from torch import Tensor, nn

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn

HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


class Inverted(nn.Module):
    """As MobileNetV2 has it: the last layer is followed by neither an activation nor a sum, so that
    a folded bias goes into the convolution; the depthwise convolution has a bias of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU6(),
        )
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, groups=2 * channels)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.project = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.depthwise(self.expand(x)))
        return self.project_bn(self.project(x)).mean((2, 3))


class PreActivation(nn.Module):
    """A layer before the convolution, as in DenseNet, and a float32 input for the first one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.conv(torch.relu(self.norm(x)))] * 1, 1)).mean((2, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Block(8, nn.ReLU),
    "silu": lambda: Block(8, nn.SiLU),
    "inverted": lambda: Inverted(8),
    "pre-activation": lambda: PreActivation(8),
}


def casts(net: nn.Module, x: Tensor, dtype: torch.dtype, backward: bool = True) -> Counter[Cast]:
    """Of a step under autocast, with the gradient of the input."""
    x = x.clone().requires_grad_(backward)
    with Casts() as counted, torch.set_grad_enabled(backward):
        with torch.autocast("cpu", dtype):
            y = net(x)
        if backward:
            y.float().square().mean().backward()
    return counted.found


@pytest.mark.parametrize("backward", [True, False], ids=["step", "no gradients"])
@halves
@EVERY_CONVERSION
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_no_cast_that_is_not_there_without_the_layers(make, options, dtype, backward):
    live, x = randomize_(make()), torch.randn(2, 8, 6, 6)
    expected = casts(without_norms(live), x, dtype, backward)
    found = casts(convert_frozen_bn(copy.deepcopy(live), **options), x, dtype, backward)
    assert not found - expected
    # Nor does one less mean that a convolution ran in float32: only a bias is left out, where it
    # goes into the layer.
    assert all(len(shape) == 1 for _, _, shape in expected - found)


def test_casts_are_counted():
    """What torchvision's formula does under autocast: float32 vectors make the output float32, and
    the next convolution narrows it."""
    live, x = Inverted(8), torch.randn(2, 8, 6, 6)
    expected = casts(without_norms(live), x, torch.bfloat16)
    ops = pytest.importorskip("torchvision").ops
    for parent in [*live.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                parent._modules[name] = ops.FrozenBatchNorm2d(child.num_features)
    more = casts(live, x, torch.bfloat16) - expected
    maps = [cast for cast in more.elements() if len(cast[2]) == 4]
    # The product widens, and the gradient is narrowed again, 3 times; 2 layers have a convolution
    # behind them, which casts in both directions.
    assert Counter(name for name, _, _ in maps) == {"mul": 3, "_to_copy": 3 + 2 * 2}


@halves
@EVERY_CONVERSION
def test_no_cast_in_a_network_of_half_precision(options, dtype):
    """Without autocast. But a folded weight is computed in float32, and rounded once."""
    live, x = randomize_(Block(8, nn.ReLU)), torch.randn(2, 8, 6, 6, dtype=dtype)
    net = convert_frozen_bn(live, **options).to(dtype)
    with Casts() as counted:
        net(x).float().square().mean().backward()
    counted.found.subtract({("_to_copy", (str(dtype), "torch.float32"), torch.Size([2, 8])): 2})
    weights = [cast for cast, times in counted.found.items() if times and len(cast[2]) == 4]
    assert bool(weights) == options.get("fold_conv", False)
    assert all(shape[0] == shape[1] == 8 for _, _, shape in weights)


@halves
@pytest.mark.parametrize("conversion", ["folded, affine frozen", "folded, affine trained"])
def test_a_folded_weight_is_rounded_once(conversion, dtype):
    """A scale that half precision has not, times a weight that it has: rounding the scale as well
    would show in every weight."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    net = convert_frozen_bn(randomize_(net), **CONVERSIONS[conversion])
    seen: list[Tensor] = []

    class Weights(Casts):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                seen.extend(args[1:3])
            return super().__torch_dispatch__(function, types, args, kwargs)

    with Weights(), torch.autocast("cpu", dtype):
        net(torch.randn(2, 4, 3, 3))
    bn = net[1]
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    weight, bias = seen
    assert weight.dtype == bias.dtype == dtype
    exact = net[0].weight.double() * scale.reshape(-1, 1, 1, 1), bn.bias - bn.running_mean * scale
    eps = torch.finfo(dtype).eps
    for rounded, value in zip(seen, exact, strict=True):
        assert ((rounded.double() - value).abs() <= (eps / 2 + 1e-6) * value.abs() + 1e-6).all()


@pytest.mark.parametrize("enabled", [True, False])
@EVERY_CONVERSION
def test_convolutions_go_through_autocast_or_not_as_told(options, enabled):
    """A region with autocast turned off, inside of one with it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=False), FrozenBatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return torch.relu(self.bn(self.conv(x)))

    net, x = Net(), torch.randn(2, 4, 3, 3)
    net.bn = nn.BatchNorm2d(4)
    net = convert_frozen_bn(randomize_(net), **options)
    with torch.autocast("cpu", torch.float16):
        y = net(x)
    assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        expected = torch.relu(net.bn(nn.functional.conv2d(x, net.conv.weight)))
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03)


@EVERY_CONVERSION
def test_the_cache_of_autocast_goes_on_working(options):
    """Two calls in one region cast a weight once, but for a folded one, which is another tensor
    each time."""
    live, x = randomize_(Block(8, nn.ReLU)), torch.randn(2, 8, 6, 6)
    net = convert_frozen_bn(copy.deepcopy(live), **options)

    def weights(net: nn.Module) -> int:
        with Casts() as counted, torch.autocast("cpu", torch.bfloat16):
            net(x), net(x)
        return sum(n for (_, _, shape), n in counted.found.items() if shape[:2] == (8, 8))

    assert weights(net) == (2 if options.get("fold_conv") else 1) * weights(without_norms(live))
