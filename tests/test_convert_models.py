"""convert_frozen_bn and unfreeze_bn on whole models of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from batch_norms import frozen_names
from helpers import assert_same_bits, make_generator, randomize_, snapshot
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from frozen_bn import convert_frozen_bn, unfreeze_bn

pytestmark = pytest.mark.usefixtures("device")


def resnet50() -> nn.Module:
    return pytest.importorskip("torchvision.models").resnet50(num_classes=10)


def mobilenet_v3() -> nn.Module:
    return pytest.importorskip("torchvision.models").mobilenet_v3_large(num_classes=10)


def r3d_18() -> nn.Module:
    return pytest.importorskip("torchvision.models").video.r3d_18(num_classes=10)


SMALL = dict(
    min_size=128,
    max_size=192,
    rpn_post_nms_top_n_train=50,
    rpn_post_nms_top_n_test=50,
    box_batch_size_per_image=32,
)


def faster_rcnn() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    return detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **SMALL)


def faster_rcnn_on_a_frozen_backbone() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=pytest.importorskip("torchvision.ops").FrozenBatchNorm2d,
        trainable_layers=5,
    )
    return detection.FasterRCNN(backbone, 91, **SMALL)


def timm_mobilenet() -> nn.Module:
    """Of timm's BatchNormAct2d."""
    return pytest.importorskip("timm").create_model("mobilenetv3_small_050", num_classes=10)


MODELS = [
    pytest.param(resnet50, (2, 3, 64, 64), id="resnet50"),
    pytest.param(mobilenet_v3, (2, 3, 64, 64), id="mobilenet_v3_large"),
    # In test_models.py, too.
    pytest.param(r3d_18, (2, 3, 4, 32, 32), id="r3d_18", marks=pytest.mark.long),
    pytest.param(faster_rcnn, None, id="faster_rcnn", marks=pytest.mark.long),
    pytest.param(
        faster_rcnn_on_a_frozen_backbone, None, id="faster_rcnn-frozen", marks=pytest.mark.long
    ),
    pytest.param(timm_mobilenet, (2, 3, 64, 64), id="timm_mobilenetv3_small"),
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small operators: faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = randomize_(make()).double()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def sample(shape: tuple[int, ...] | None) -> tuple[object, ...]:
    """The arguments of a model in train mode: images, or for a detector images and targets."""
    generator = make_generator(2)
    if shape:
        return (torch.rand(shape, generator=generator, dtype=torch.float64),)
    sizes = [(3, 128, 160), (3, 120, 150)]
    images = [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]
    boxes = torch.tensor([[10.0, 10, 60, 70], [40, 30, 140, 110]], dtype=torch.float64)
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]


def losses_and_gradients(model: nn.Module, arguments: tuple[object, ...]) -> dict[str, Tensor]:
    """In train mode but for the batch normalizations."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
    torch.manual_seed(1)  # a detector draws its samples
    result = model(*arguments)
    losses = result if isinstance(result, dict) else {"loss": result.square().mean()}
    model.zero_grad()
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**losses, **gradients}


def outputs(model: nn.Module, arguments: tuple[object, ...]) -> object:
    with torch.no_grad():
        return model.eval()(arguments[0])


@pytest.mark.long_emulated
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_a_whole_model_computes_what_it_did_with_the_same_gradients(make, shape):
    model, arguments = built(make), sample(shape)
    expected = outputs(model, arguments), losses_and_gradients(model, arguments)
    convert_frozen_bn(model, freeze_affine=False)
    actual = outputs(model, arguments), losses_and_gradients(model, arguments)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-9)
    for name, value in expected[1].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(actual[1][name], value, rtol=1e-9, atol=1e-9 * scale)
    assert any(name.endswith("weight") and value.any() for name, value in expected[1].items())


@pytest.mark.long_emulated
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_a_whole_model_has_no_batch_norm_left_and_round_trips(make, shape):
    model = built(make).float()
    layers, before = list(model.modules()), snapshot(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    convert_frozen_bn(model)
    assert not any(isinstance(layer, _BatchNorm) for layer in model.modules())
    assert len(frozen_names(model)) == sum(name.endswith("running_var") for name in before)
    keys = [name for name in before if not name.endswith("num_batches_tracked")]
    assert_same_bits(snapshot(model), {name: before[name] for name in keys})
    unfreeze_bn(model)
    assert list(model.modules()) == layers
    assert_same_bits(snapshot(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
