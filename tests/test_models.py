"""Fusing and folding whole models: torchvision's and timm's. On the CPU."""

from __future__ import annotations

import copy
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import assert_close_in_norm, calm_, merged, outputs_and_gradients
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn, summary

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

RESNET50 = {"relu": 33, "add + relu": 12, "two branches + relu": 8}

#: What the frozen layers are merged with.
TORCHVISION = {
    "densenet121": {"relu": 121},
    "efficientnet_b0": {"silu": 33},
    "efficientnet_v2_s": {"silu": 72},
    "googlenet": {"relu": 59},
    "inception_v3": {"relu": 94},
    "maxvit_t": {},
    "mnasnet0_5": {"relu": 35, "add": 10},
    "mobilenet_v2": {"relu6": 35, "add": 10},
    "mobilenet_v3_large": {"hardswish": 20, "relu": 11, "add": 10},
    "mobilenet_v3_small": {"hardswish": 18, "relu": 5, "add": 6},
    "regnet_x_400mf": {"relu": 45, "add + relu": 18, "two branches + relu": 8},
    "regnet_y_400mf": {"relu": 33, "add + relu": 12, "two branches + relu": 8},
    "resnet18": {"relu": 9, "add + relu": 5, "two branches + relu": 6},
    "resnet50": RESNET50,
    "resnext50_32x4d": RESNET50,
    "shufflenet_v2_x0_5": {"relu": 37},
    "vgg11_bn": {"relu": 8},
    "wide_resnet50_2": RESNET50,
}

#: Besides the activations that timm's layers have themselves.
TIMM = {
    "cspresnet50": {"leaky_relu": 38},
    "densenet121": {"relu": 59},
    "dla34": {"relu": 21, "add + relu": 12},
    "efficientnet_b0": {"silu": 33, "add": 9},
    "ghostnet_100": {"relu": 34},
    "hrnet_w18_small": {"relu": 43, "add + relu": 18, "two branches + relu": 10},
    "mobilenetv3_large_100": {"hardswish": 20, "relu": 11, "add": 10},
    "regnety_008": {"relu": 29},
    "repvgg_a0": {},
    "res2net50_26w_4s": {"relu": 65, "add + relu": 12, "two branches + relu": 8},
    "resnet50": RESNET50,
    "selecsls42b": {"relu": 41},
    "skresnet18": {"relu": 25},
    "tf_efficientnet_b0": {"silu": 28, "add": 9},
    "vovnet39a": {"relu": 39},
    "xception41": {"relu": 8},
}
SIDES = {"inception_v3": 96, "maxvit_t": 224}


@pytest.fixture(autouse=True)
def collect() -> Iterator[None]:
    """A fused module and its forward refer to each other, and these are gigabytes."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where the cores are shared
    yield
    torch.set_num_threads(before)


def frozen(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, freeze_affine: bool = True
) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's about initialization
        net = calm_(make()).to(dtype).train()
    return convert_frozen_bn(net, freeze_affine=freeze_affine, fuse=False)


def from_torchvision(name: str, **options: object) -> nn.Module:
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = False
    if name == "inception_v3":
        options["aux_logits"] = False  # which need a larger image
    return torchvision.models.get_model(name, weights=None, **options)


def from_timm(name: str) -> nn.Module:
    return timm.create_model(name)


def assert_fusing_changes_nothing(net: nn.Module, *inputs: object, tolerance: float) -> nn.Module:
    """Returns the fused one."""
    expected = outputs_and_gradients(net, *inputs)
    assert sum(name.startswith("gradient") for name in expected) > 1
    for options in ({"fold_conv": True}, {"fuse": True}):
        fused = convert_frozen_bn(copy.deepcopy(net), **options)
        assert list(fused.state_dict()) == list(net.state_dict())
        assert_close_in_norm(outputs_and_gradients(fused, *inputs), expected, tolerance)
    return fused


def image(side: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=dtype)


def image_for(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of the least side that the model takes; one only where that is a large one."""
    return image(SIDES.get(name, 32), dtype)[: 1 if name == "maxvit_t" else 2]


#: One of each kind of block; the others are marked `long`.
SOON = ("resnet18", "mobilenet_v2", "googlenet", "efficientnet_b0", "timm-cspresnet50")


def model_param(make, name: str, id: str):
    return pytest.param(make, name, id=id, marks=() if id in SOON else pytest.mark.long)


def later(value: object):
    return pytest.param(value, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("make", "name"),
    [model_param(from_torchvision, name, name) for name in TORCHVISION]
    + [model_param(from_timm, name, f"timm-{name}") for name in TIMM],
)
def test_classification(make, name):
    expected = TORCHVISION[name] if make is from_torchvision else TIMM[name]
    net, x = frozen(lambda: make(name)), image_for(name)
    fused = assert_fusing_changes_nothing(net, x, tolerance=1e-9)
    assert Counter(merged(fused).values()) == expected


def test_stochastic_depth_draws_the_same():
    net = frozen(lambda: timm.create_model("efficientnet_b0", drop_path_rate=0.5, drop_rate=0.5))
    assert_fusing_changes_nothing(net, image(), tolerance=1e-9)


@pytest.mark.parametrize("name", ["resnet18", later("mobilenet_v3_small")])
def test_trainable_affine(name):
    net = frozen(lambda: from_torchvision(name), freeze_affine=False)
    assert_fusing_changes_nothing(net, image(), tolerance=1e-9)


@pytest.mark.parametrize("freeze_affine", [True, later(False)])
def test_float32(freeze_affine):
    """Of a smooth network: at the kink of a ReLU, rounding decides."""
    net = frozen(lambda: from_torchvision("efficientnet_b0"), torch.float32, freeze_affine)
    assert_fusing_changes_nothing(net, image(64, torch.float32), tolerance=1e-4)


def test_summary_of_resnet50():
    text = summary(convert_frozen_bn(frozen(lambda: from_torchvision("resnet50")), fuse=True))
    assert text.endswith(
        "53 frozen, 0 skipped\n"
        "12 merged with add + relu\n"
        "33 merged with relu\n"
        "8 merged with two branches + relu (4 pairs)"
    )


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", later("maskrcnn_resnet50_fpn")])
def test_detection(name):
    options = dict(weights_backbone=None, num_classes=5, min_size=64, max_size=96)
    net = frozen(lambda: from_torchvision(name, **options))
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 44.0]], dtype=torch.float64)
    masks = torch.zeros(2, 64, 80, dtype=torch.uint8)
    masks[:, 10:40, 22:38] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}] * 2
    images = [*torch.rand(2, 3, 64, 80, dtype=torch.float64)]

    fused = assert_fusing_changes_nothing(net, images, targets, tolerance=1e-9)
    assert Counter(merged(fused).values()) == RESNET50
    detections = [module.eval()(images) for module in (net, fused)]
    torch.testing.assert_close(*detections)


@pytest.mark.parametrize("name", [later("deeplabv3_resnet50"), "lraspp_mobilenet_v3_large"])
def test_segmentation(name):
    net = frozen(lambda: from_torchvision(name, weights_backbone=None))
    assert_fusing_changes_nothing(net, image(64), tolerance=1e-9)


def test_video():
    net = frozen(lambda: from_torchvision("r3d_18"))
    clip = torch.randn(1, 3, 4, 24, 24, dtype=torch.float64)
    fused = assert_fusing_changes_nothing(net, clip, tolerance=1e-9)
    assert Counter(merged(fused).values()) == TORCHVISION["resnet18"] | {"two branches + relu": 6}
