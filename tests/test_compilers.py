"""torch.compile and AOTInductor: frozen layers, and networks converted in every way, against the
same run by the kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import calm_, merged, randomize_
from layers import EVERY_LAYER, C, assert_equals, layer, maps
from nets import ONE_A_KIND, images, network
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn

# torch.compile


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    """A backend that counts what it is asked to compile."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@EVERY_LAYER
def test_compile_a_layer_once(options, counter):
    net = layer(**options)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for _ in range(3):
        assert_equals(compiled, net, *maps())
    assert counter.frame_count == 1


@ONE_A_KIND
def test_compile_a_network_once_for_many_steps(options, counter):
    """Weights that change are no reason to compile again."""
    net, twin = network(**options), network(**options)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for seed in range(3):
        for module in (compiled, twin):
            module.zero_grad()
            module(images(seed)).square().mean().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(net.state_dict(), twin.state_dict())
    assert counter.frame_count == 1


@ONE_A_KIND
def test_compile_for_inference(options, counter):
    """Where fold_conv keeps folded weights from call to call; and a change of theirs is seen."""
    net = network(**options).eval()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in range(3):
            torch.testing.assert_close(compiled(images(seed)), net(images(seed)))
            net[0].weight.mul_(1.5)
            net[1].running_mean.add_(0.25)
    assert counter.frame_count == 1


@EVERY_LAYER
def test_compile_a_layer_for_every_shape(options, counter):
    net = layer(**options)
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    assert_equals(compiled, net, *maps())
    counter.clear()  # a float attribute as a symbol can take two tries
    for shape in ((3, C, 7, 4), (5, C, 2, 9)):
        assert_equals(compiled, net, *maps(*shape))
    assert counter.frame_count == 0


@ONE_A_KIND
def test_compile_a_network_for_every_shape(options, counter):
    net = network(**options)
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    # Not square: dynamic=True takes sizes that are equal at first for one.
    assert_equals(compiled, net, torch.randn(4, 3, 10, 11))
    counter.clear()
    for shape in ((2, 3, 9, 12), (3, 3, 15, 7)):
        assert_equals(compiled, net, torch.randn(shape))
    assert counter.frame_count == 0


def test_compile_many_layers_alike_once(counter):
    """One code for layers of one kind that differ in eps, in their vectors and in nothing else."""
    net = nn.Sequential(*(randomize_(FrozenBatchNorm2d(C, eps), 7) for eps in (0.1, 0.2, 0.3, 0.4)))
    assert_equals(torch.compile(net, fullgraph=True, backend=counter), net, maps()[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compile_in_half_precision(dtype, counter):
    net = layer(freeze_affine=False, activation="relu")
    x, r = (t.to(dtype) for t in maps())
    assert_equals(torch.compile(net, fullgraph=True, backend=counter), net, x, r, tolerance=1e-2)


@ONE_A_KIND
def test_compile_under_autocast(options, counter):
    net = network(**options)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(images()), net(images())
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_compile_resnet18_fused_and_folded(counter):
    models = pytest.importorskip("torchvision").models
    net = convert_frozen_bn(calm_(models.resnet18()), fuse=True, fold_conv=True)
    assert len(merged(net)) == 20
    compiled, x = torch.compile(net, fullgraph=True, backend=counter), torch.randn(2, 3, 64, 64)
    for _ in range(2):
        assert_equals(compiled, net, x, tolerance=1e-4)
    assert counter.frame_count == 1


def small_network(**options: bool) -> nn.Module:
    """For compilers that take seconds for a kernel."""
    net = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU())
    return convert_frozen_bn(randomize_(net), **options)


def test_compile_by_inductor():
    """The only backend that makes kernels of its own, by a C++ compiler."""
    torch._dynamo.reset()
    net = small_network(fuse=True, freeze_affine=False)
    assert_equals(torch.compile(net, fullgraph=True), net, images())


# AOTInductor


@pytest.mark.long
def test_aotinductor_package(tmp_path):
    net = small_network(fold_conv=True).eval()
    with torch.no_grad():
        program = torch.export.export(net, (images(),))
        path = str(tmp_path / "network.pt2")
        path = torch._inductor.aoti_compile_and_package(program, package_path=path)
        compiled = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(compiled(images(1)), net(images(1)), rtol=1e-4, atol=1e-5)
