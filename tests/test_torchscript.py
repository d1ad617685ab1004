"""torch.jit: frozen layers scripted and traced, against the same layers run by the kernels."""

from __future__ import annotations

import io

import pytest
import torch
from helpers import ACTIVATIONS, assert_close_in_norm, calm_, outputs_and_gradients, randomize_
from nets import IMAGES, ONE_A_KIND, images, network
from torch import Tensor, nn

import frozen_bn
from frozen_bn import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    convert_frozen_bn,
    unfreeze_bn,
)

C = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def reloaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_equals_eager(compiled: nn.Module, eager: nn.Module, *inputs: Tensor) -> None:
    """Values and gradients, in several calls: the first ones only record what tensors there are,
    by which TorchScript then specializes."""
    for _ in range(3):
        actual = outputs_and_gradients(compiled, *inputs)
        assert_close_in_norm(actual, outputs_and_gradients(eager, *inputs), 1e-5)


# Scripting


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("options", [{}, {"freeze_affine": False}, {"affine": False}], ids=str)
def test_script_a_layer(options, activation):
    x, r = torch.randn(2, 2, C, 5, 3)
    for inplace in (False, True):
        layer = FrozenBatchNorm2d(
            C, 1e-3, activation=activation, negative_slope=0.3, inplace=inplace, **options
        )
        randomize_(layer)
        scripted = torch.jit.script(layer)
        for module in (scripted, reloaded(scripted)):
            assert [*module.state_dict()] == [*layer.state_dict()]
            assert [n for n, _ in module.named_buffers()] == [n for n, _ in layer.named_buffers()]
            assert_equals_eager(module, layer, x)
            assert_equals_eager(module, layer, x, r)


@pytest.mark.parametrize(
    "kind, shape",
    [
        (FrozenBatchNorm1d, (3, C)),
        (FrozenBatchNorm1d, (3, C, 5)),
        (FrozenBatchNorm2d, (3, C, 5, 2)),
        (FrozenBatchNorm3d, (3, C, 5, 2, 2)),
    ],
)
def test_script_layers_of_every_rank(kind, shape):
    layer = randomize_(kind(C))
    assert_equals_eager(torch.jit.script(layer), layer, torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_script_keeps_the_dtype_of_the_input(dtype):
    layer = randomize_(FrozenBatchNorm2d(C, activation="silu"))
    x = torch.randn(2, C, 5, 3, dtype=dtype)
    y = torch.jit.script(layer)(x)
    torch.testing.assert_close(y, layer(x))


def test_script_writes_in_place():
    x = torch.randn(2, C, 5, 3)
    y = torch.jit.script(FrozenBatchNorm2d(C, inplace=True))(x)
    assert y.data_ptr() == x.data_ptr()


def test_script_a_call_of_the_function():
    class Module(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return frozen_bn.frozen_batch_norm(
                x, mean, var, eps=1e-3, activation="relu6", residual=x
            )

    inputs = torch.randn(2, C, 5, 3), torch.randn(C), torch.rand(C)
    scripted = torch.jit.script(Module())
    torch.testing.assert_close(scripted(*inputs), Module()(*inputs))


def test_script_leaves_the_layer_as_it_was():
    """Kernels, reprs and copies: the eager layer goes on."""
    net = network()
    kinds, text, x = [type(m) for m in net.modules()], repr(net), images()
    expected = net(x)
    torch.jit.script(net)
    assert [type(m) for m in net.modules()] == kinds and repr(net) == text
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    unfreeze_bn(net)
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in net.modules())


@pytest.mark.parametrize(
    "kind, shape, residual, text",
    [
        (2, (2, C), None, "expected input to have 4 dimensions, but got shape [2, 4]"),
        (1, (2, C, 1, 1), None, "expected input to have 2 or 3 dimensions"),
        (2, (2, 1, 3, 3), None, "expected running_mean to have shape [1], but got [4]"),
        (2, (2, C, 3, 3), (2, C, 3, 1), "expected residual to have shape [2, 4, 3, 3], but got"),
    ],
)
def test_scripted_shape_errors(kind, shape, residual, text):
    """What PyTorch would broadcast is refused, in the words of the eager layer."""
    layer = {1: FrozenBatchNorm1d, 2: FrozenBatchNorm2d}[kind](C)
    inputs = [torch.randn(s) for s in (shape, residual) if s]
    for module in (layer, torch.jit.script(layer)):
        with pytest.raises((RuntimeError, torch.jit.Error)) as error:
            module(*inputs)
        assert f"frozen_bn::forward: {text}" in str(error.value)


def test_scripted_dtype_error():
    with pytest.raises(torch.jit.Error, match="expected input to be float16, bfloat16, float32"):
        torch.jit.script(FrozenBatchNorm2d(C))(torch.ones(2, C, 3, 3, dtype=torch.int32))


def test_scripted_unknown_activation():
    class Module(nn.Module):
        def forward(self, x: Tensor, mean: Tensor) -> Tensor:
            return frozen_bn.frozen_batch_norm(x, mean, mean, activation="gelu")

    with pytest.raises(torch.jit.Error, match="unknown activation gelu"):
        torch.jit.script(Module())(torch.randn(2, C, 3, 3), torch.ones(C))


@pytest.mark.parametrize("freeze_affine", [True, False])
def test_script_a_network(freeze_affine):
    net, x = network(freeze_affine=freeze_affine), images()
    scripted = torch.jit.script(net)
    for module in (scripted, reloaded(scripted)):
        assert_equals_eager(module, net, x)


def test_freeze_a_scripted_network():
    net, x = network().eval(), images()
    frozen = torch.jit.freeze(torch.jit.script(net))
    for _ in range(3):
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-5)


def test_script_resnet18():
    models = pytest.importorskip("torchvision").models
    net, x = convert_frozen_bn(calm_(models.resnet18())), torch.randn(2, 3, 64, 64)
    scripted = reloaded(torch.jit.script(net))
    actual, expected = outputs_and_gradients(scripted, x), outputs_and_gradients(net, x)
    assert_close_in_norm(actual, expected, 1e-4)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:RCNN always returns:UserWarning")
def test_script_a_detector():
    """Losses with their gradients, and detections."""
    detection = pytest.importorskip("torchvision").models.detection
    net = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    )
    convert_frozen_bn(calm_(net))
    assert any(isinstance(m, FrozenBatchNorm2d) for m in net.modules())
    scripted = reloaded(torch.jit.script(net))
    image, boxes = torch.rand(3, 64, 64), torch.tensor([[4.0, 4.0, 40.0, 50.0]])
    losses = []
    for module in (net, scripted):
        torch.manual_seed(0)  # for the sampling of proposals
        returned = module.train()([image], [{"boxes": boxes, "labels": torch.tensor([3])}])
        loss = sum((returned[0] if isinstance(returned, tuple) else returned).values())
        loss.backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        losses.append({"loss": loss.detach()} | gradients)
    assert_close_in_norm(losses[1], losses[0], 1e-4)
    with torch.no_grad():
        (found,), (expected,) = scripted.eval()([image])[1], net.eval()([image])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"fuse": True}, {"fold_conv": True}], ids=str)
def test_script_a_network_that_is_fused_or_folded(options):
    """It compiles the methods that are written in the classes."""
    net, x = network(**options), images()
    scripted = torch.jit.script(net)
    for module in (scripted, reloaded(scripted)):
        assert_equals_eager(module, net, x)


# Tracing


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.jit asks
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("freeze_affine", [True, False])
def test_trace_a_layer(freeze_affine, inplace):
    layer = FrozenBatchNorm2d(
        C, activation="hardswish", freeze_affine=freeze_affine, inplace=inplace
    )
    x, r = torch.randn(2, 2, C, 5, 3)
    traced = torch.jit.trace(randomize_(layer), (x.clone(), r))
    for module in (traced, reloaded(traced)):
        for size in (5, 7):
            assert_equals_eager(module, layer, *torch.randn(2, 3, C, size, 2))


@ONE_A_KIND
def test_trace_a_network(options):
    net = network(**options)
    traced = torch.jit.trace(net, images())
    for module in (traced, reloaded(traced)):
        for shape in (IMAGES, (1, 3, 6, 9)):
            assert_equals_eager(module, net, torch.randn(shape))


def test_trace_resnet18_fused_and_folded():
    models = pytest.importorskip("torchvision").models
    net = convert_frozen_bn(calm_(models.resnet18()), fuse=True, fold_conv=True).eval()
    traced = reloaded(torch.jit.trace(net, torch.randn(1, 3, 64, 64)))
    x = torch.randn(2, 3, 64, 64)
    actual, expected = outputs_and_gradients(traced, x), outputs_and_gradients(net, x)
    assert_close_in_norm(actual, expected, 1e-4)
