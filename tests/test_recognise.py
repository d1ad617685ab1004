"""Which modules of which library convert_frozen_bn freezes, and which it leaves alone. On the CPU.

Torch's own classes are in test_convert.py and test_convert_refused.py, models in test_ecosystem.py.
"""

from __future__ import annotations

import copy
import importlib
import pathlib
import pickle
import re
import types

import pytest
import torch
from batch_norms import messages
from helpers import (
    ACTIVATIONS,
    VECTORS,
    assert_close_in_norm,
    assert_same_bits,
    merged,
    outputs_and_gradients,
    randomize_,
    snapshot,
)
from torch import Tensor, nn

from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn, summary, unfreeze_bn

C = 4
IMAGE = (2, C, 5, 5)
TIMM = ["BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"]

every_timm_class = pytest.mark.parametrize("kind", TIMM)


def assert_freezes(layer: nn.Module, x: Tensor | None = None) -> nn.Module:
    """``layer`` is frozen without a warning, computes what it did in eval mode, keeps its keys, and
    comes back bit for bit. Returns the frozen form."""
    net = nn.Sequential(layer).eval()
    x = torch.randn(IMAGE) * 4 if x is None else x
    before, expected = snapshot(net), net(x)
    assert messages(lambda: convert_frozen_bn(net)) == []
    frozen = copy.deepcopy(net[0])
    assert isinstance(frozen, FrozenBatchNorm2d)
    torch.testing.assert_close(net.train()(x), expected)
    assert list(net.state_dict()) == [key for key in before if "num_batches" not in key]
    assert_same_bits(snapshot(net), {key: before[key] for key in net.state_dict()})
    net.eval()
    assert messages(lambda: unfreeze_bn(net)) == []
    assert net[0] is layer
    assert_same_bits(snapshot(net), before)
    assert not any(module.training for module in net.modules())
    return frozen


def assert_left_alone(layer: nn.Module, reason: str) -> None:
    """... with one warning, and named by summary."""
    net = nn.Sequential(layer)
    before = snapshot(net)
    (text,) = messages(lambda: convert_frozen_bn(net))
    assert "'0' is left as it is" in text
    assert reason in text
    assert net[0] is layer
    assert_same_bits(snapshot(net), before)
    assert f"skipped: {text.partition('it is: ')[2]}" in summary(net)


# torch


def test_a_lazy_layer_filled_from_a_checkpoint_has_to_run_once():
    """Its class is that of a lazy layer until then."""
    net = nn.Sequential(nn.LazyBatchNorm2d()).eval()
    net.load_state_dict(nn.Sequential(randomize_(nn.BatchNorm2d(C))).state_dict())
    assert_left_alone(net[0], "it is lazy and not initialized, run the model once before")
    net(torch.randn(IMAGE))
    assert_freezes(net[0])


# timm


def timm_layer(kind: str, **options: object) -> nn.Module:
    """One of timm's classes, made as timm makes it."""
    layers = pytest.importorskip("timm.layers")
    layer = randomize_(layers.BatchNormAct2d(C, eps=0.1, **options))
    if kind == "SyncBatchNormAct":
        layer = layers.convert_sync_batchnorm(layer)
    elif kind == "FrozenBatchNormAct2d":
        layer = layers.freeze_batch_norm_2d(layer)
    assert type(layer).__name__ == kind
    return layer


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_timm_class
def test_timms_activation_goes_into_the_kernel(kind, activation):
    classes = dict(
        relu=nn.ReLU, relu6=nn.ReLU6, leaky_relu=nn.LeakyReLU, silu=nn.SiLU, hardswish=nn.Hardswish
    )
    act_kwargs = {"negative_slope": 0.3} if activation == "leaky_relu" else None
    layer = timm_layer(
        kind,
        apply_act=activation is not None,
        act_layer=classes.get(activation),
        act_kwargs=act_kwargs,
    )
    frozen = assert_freezes(layer)
    assert type(frozen) is FrozenBatchNorm2d
    assert frozen.activation == activation
    assert list(frozen.state_dict()) == VECTORS


@pytest.mark.parametrize(("name", "expected"), [("Swish", "silu"), ("HardSwish", "hardswish")])
def test_timms_own_activations_go_into_the_kernel_too(name, expected):
    activations = pytest.importorskip("timm.layers.activations")
    frozen = assert_freezes(timm_layer("BatchNormAct2d", act_layer=getattr(activations, name)))
    assert type(frozen) is FrozenBatchNorm2d
    assert frozen.activation == expected


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        ("timm.layers.activations", "Swish", "silu"),
        ("timm.layers.activations", "HardSwish", "hardswish"),
        ("transformers.activations", "SiLUActivation", "silu"),
    ],
)
def test_activations_of_other_libraries_are_merged(library, name, expected):
    activation = getattr(pytest.importorskip(library), name)()
    net = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), activation)
    x = torch.randn(IMAGE, dtype=torch.float64)
    plain = convert_frozen_bn(randomize_(net).double())
    fused = convert_frozen_bn(copy.deepcopy(plain), fuse=True)
    assert merged(fused) == {"1": expected}
    assert_close_in_norm(outputs_and_gradients(fused, x), outputs_and_gradients(plain, x), 1e-12)


def hooked(layer: nn.Module) -> nn.Module:
    layer.act.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def patched(layer: nn.Module) -> nn.Module:
    layer.act.forward = types.MethodType(lambda self, x: x.square(), layer.act)
    return layer


def limited(layer: nn.Module) -> nn.Module:
    layer.act.max_val = 3.0
    return layer


#: Activations that there is no kernel for, or that somebody would miss.
KEPT = {
    "gelu": lambda kind: timm_layer(kind, act_layer="gelu"),
    "mish": lambda kind: timm_layer(kind, act_layer="mish"),
    "sigmoid-in-place": lambda kind: timm_layer(kind, act_layer="sigmoid", inplace=True),
    "prelu": lambda kind: timm_layer(kind, act_layer="prelu"),
    "another limit": lambda kind: limited(timm_layer(kind, act_layer="relu6")),
    "hooked": lambda kind: hooked(timm_layer(kind)),
    "patched": lambda kind: patched(timm_layer(kind)),
}


@pytest.mark.parametrize("name", KEPT)
@every_timm_class
def test_any_other_activation_stays_a_module_behind_the_frozen_layer(kind, name):
    layer = KEPT[name](kind)
    act = layer.act
    frozen = assert_freezes(layer)
    assert type(frozen).__name__ == "FrozenBatchNormAct2d"
    assert type(frozen.act) is type(act)
    assert layer.act is act


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fold_conv": True}], ids=str)
@pytest.mark.parametrize("name", KEPT)
def test_what_follows_a_kept_activation_is_not_merged_past_it(name, options):
    net = nn.Sequential(nn.Conv2d(C, C, 1), KEPT[name]("BatchNormAct2d"), nn.ReLU()).double().eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    expected = outputs_and_gradients(net, x)
    convert_frozen_bn(net, freeze_affine=False, **options).train()
    assert_close_in_norm(outputs_and_gradients(net, x), expected, 1e-12)
    assert merged(net) == {}
    if options:
        reason = "frozen, not fused: FrozenBatchNormAct2d has a forward of its own"
        assert reason in summary(net)


@every_timm_class
def test_a_dropout_before_the_activation_goes_on_dropping(kind):
    layer = timm_layer(kind, act_layer="relu", drop_layer=nn.Dropout)
    net, x = nn.Sequential(layer).train(), torch.randn(IMAGE)
    live = copy.deepcopy(layer).eval()
    live.drop.train()
    torch.manual_seed(1)
    expected = live(x)
    torch.manual_seed(1)
    torch.testing.assert_close(convert_frozen_bn(net)(x), expected)
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x))
    net[0].drop.train()
    assert unfreeze_bn(net)[0] is layer
    assert (layer.training, layer.drop.training, layer.act.training) == (False, True, False)


def test_a_kept_activation_trains_while_the_affine_is_frozen():
    net = nn.Sequential(timm_layer("BatchNormAct2d", act_layer="prelu"))
    slope = net[0].act.weight
    convert_frozen_bn(net)(torch.randn(IMAGE)).sum().backward()
    assert [name for name, _ in net.named_parameters()] == ["0.act.weight"]
    assert net[0].act.weight is slope
    assert slope.grad is not None


def test_an_activation_exchanged_on_the_frozen_layer_is_carried_back():
    net = convert_frozen_bn(nn.Sequential(timm_layer("BatchNormAct2d", act_layer="gelu")).eval())
    net[0].act = nn.Tanh()
    x = torch.randn(IMAGE)
    expected = net(x)
    torch.testing.assert_close(unfreeze_bn(net)(x), expected)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_of_a_layer_with_a_kept_activation_has_its_own(clone):
    net = convert_frozen_bn(nn.Sequential(timm_layer("BatchNormAct2d", act_layer="prelu")))
    twin = clone(net)
    with torch.no_grad():
        twin[0].act.weight.fill_(5)
    assert unfreeze_bn(twin)[0].act.weight == 5
    assert unfreeze_bn(net)[0].act.weight != 5


def test_a_layer_of_timm_that_never_saw_a_batch_is_worth_a_warning():
    layers = pytest.importorskip("timm.layers")
    (text,) = messages(lambda: convert_frozen_bn(nn.Sequential(layers.BatchNormAct2d(C))))
    assert "'0' was never trained" in text


def test_a_subclass_of_the_frozen_layer_with_its_own_forward_is_not_fused():
    class Doubled(FrozenBatchNorm2d):
        def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
            return super().forward(input, residual) * 2

    net = nn.Sequential(nn.Conv2d(C, C, 1), randomize_(Doubled(C)), nn.ReLU())
    x = torch.randn(IMAGE)
    expected = net(x)
    for options in ({"fuse": True}, {"fold_conv": True}):
        torch.testing.assert_close(convert_frozen_bn(net, **options)(x), expected)
        assert "not fused: Doubled has a forward of its own" in summary(net)


# Hugging Face's transformers


def detr_layer() -> nn.Module:
    module = pytest.importorskip("transformers.models.detr.modeling_detr")
    return randomize_(module.DetrFrozenBatchNorm2d(C))


def test_each_frozen_class_of_transformers_is_known():
    """Every detector there has a copy of its own; the sources tell which are installed."""
    models = pathlib.Path(pytest.importorskip("transformers").__file__).parent / "models"
    found = []
    for path in sorted(models.glob("*/modeling_*.py")):
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        names = re.findall(r"^class (\w*Frozen\w*Norm\w*)\(", path.read_text(), re.MULTILINE)
        found += [getattr(importlib.import_module(module), name) for name in names]
    assert len(found) >= 10
    for kind in found:
        frozen = assert_freezes(randomize_(kind(C)))
        assert frozen.eps == 1e-5
        assert list(frozen.state_dict()) == VECTORS


def test_a_frozen_class_of_transformers_can_get_a_trainable_affine():
    net = convert_frozen_bn(nn.Sequential(detr_layer()), freeze_affine=False)
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias"]
    assert list(unfreeze_bn(net).parameters()) == []


def test_eps_that_the_class_of_transformers_cannot_have_keeps_the_layer_frozen():
    net = convert_frozen_bn(nn.Sequential(detr_layer()))
    net[0].eps = 0.5
    (text,) = messages(lambda: unfreeze_bn(net))
    assert text.endswith("'0' is left as it is: DetrFrozenBatchNorm2d has eps=1e-05 for good")
    assert type(net[0]) is FrozenBatchNorm2d


def test_a_frozen_class_of_transformers_that_holds_more_is_left_alone():
    layer = detr_layer()
    layer.register_buffer("gain", torch.ones(()))
    assert_left_alone(layer, "holds more (gain), which may take part")


def test_a_class_that_only_has_the_name_is_none_of_ours():
    forward = {"forward": lambda self, x: x}
    lookalike = type("DetrFrozenBatchNorm2d", (nn.BatchNorm2d,), forward)
    assert_left_alone(lookalike(C), "is a subclass that may compute something else")


# Frozen already, elsewhere

FROZEN_ELSEWHERE = [
    ("torchvision.ops", "FrozenBatchNorm2d"),
    ("timm.layers", "FrozenBatchNormAct2d"),
    ("transformers.models.detr.modeling_detr", "DetrFrozenBatchNorm2d"),
]


@pytest.mark.parametrize(("module", "name"), FROZEN_ELSEWHERE)
def test_a_subclass_of_another_librarys_class_is_left_alone(module, name):
    parent = getattr(pytest.importorskip(module), name)

    class Shifted(parent):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    reason = "is a subclass that may compute" if module == "timm.layers" else "but computes"
    assert_left_alone(Shifted(C), reason + " something else")


@pytest.mark.parametrize(("module", "name"), FROZEN_ELSEWHERE)
def test_frozen_layers_count_no_batches_so_none_is_called_untrained(module, name):
    layer = getattr(pytest.importorskip(module), name)(C)
    assert messages(lambda: convert_frozen_bn(nn.Sequential(layer))) == []


# torchvision's blocks


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fold_conv": True}], ids=str)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, "frozen"])
def test_conv_norm_activation(norm, options):
    ops = pytest.importorskip("torchvision.ops")
    norm = ops.FrozenBatchNorm2d if norm == "frozen" else norm
    block = ops.Conv2dNormActivation(3, C, norm_layer=norm, activation_layer=nn.Hardswish)
    block = randomize_(block).double().eval()
    net, x = nn.Sequential(block), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before, expected = snapshot(net), outputs_and_gradients(net, x)
    frozen = convert_frozen_bn(net, freeze_affine=norm is not nn.BatchNorm2d, **options).train()
    assert_close_in_norm(outputs_and_gradients(frozen, x), expected, 1e-12)
    assert merged(net) == {"0.1": "hardswish"}
    assert isinstance(net[0], ops.Conv2dNormActivation)
    assert_same_bits(snapshot(unfreeze_bn(net)), before)
    assert type(net[0]) is ops.Conv2dNormActivation
