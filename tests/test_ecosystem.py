"""Models of other libraries (in ecosystem.py), trained the way these do it, unmodified but for
convert_frozen_bn. On the CPU, in float64."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator

import pytest
import torch
from ecosystem import CASES, Case, made, sgd, timm_losses
from helpers import VECTORS, assert_close_in_norm, assert_same_bits, calm_, merged, snapshot
from torch import Tensor, nn

from frozen_bn import convert_frozen_bn, summary, unfreeze_bn
from frozen_bn.modules import _FrozenBatchNorm
from frozen_bn.recognise import is_batch_norm

WAYS = {
    "plain": {"fuse": False},
    "fuse": {"fuse": True},
    "fold_conv": {"fold_conv": True},
    "fold_conv-affine": {"fold_conv": True, "freeze_affine": False},
}


#: One of a kind; the others are marked `long`.
SOON = (
    "torchvision-faster_rcnn",
    "timm-mobilenetv3",
    "transformers-detr-timm",
    "transformers-rt_detr",
    "smp-resnet18",
)
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOON else pytest.mark.long) for name in CASES]
)
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def in_float64_by_one_thread() -> Iterator[None]:
    """Losses of transformers make tensors of the default dtype."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if is_batch_norm(layer)}


def frozen_layers(model: nn.Module) -> dict[str, nn.Module]:
    kind = _FrozenBatchNorm
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


# What they compute


def losses_and_gradients(case: Case, model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)  # of the data, the dropouts, and the samples that a detector draws
    model.zero_grad()
    losses = case.losses(model)
    sum(losses.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    # A softmax does not see the bias of its keys: these gradients are rounding errors around zero.
    gradients = {n: value for n, value in gradients.items() if not n.endswith("k_proj.bias")}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


@functools.cache
def of_the_original(name: str) -> dict[str, Tensor]:
    """In train mode, but for its batch normalizations."""
    model = made(CASES[name]).train()
    for layer in batch_norms(model).values():
        layer.eval()
    return losses_and_gradients(CASES[name], model)


def take_a_step(case: Case, model: nn.Module) -> None:
    optimizer = case.optimizer(model)
    optimizer.step()  # with the gradients that are there
    optimizer.zero_grad()
    sum(case.losses(model.train()).values()).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "way", ["fuse", *(pytest.param(way, marks=pytest.mark.long) for way in WAYS if way != "fuse")]
)
@every_case
def test_trains_unmodified(name, way):
    """The losses and gradients are those of the original model with its BN in eval mode, and
    training, in train mode, moves what it should and nothing else."""
    case, model = CASES[name], made(CASES[name])
    assert len(batch_norms(model)) == case.layers
    convert_frozen_bn(model, **WAYS[way]).train()
    layers = frozen_layers(model)
    assert len(layers) == case.layers
    assert batch_norms(model) == {}

    actual, expected = losses_and_gradients(case, model), of_the_original(name)
    trains_affine = not WAYS[way].get("freeze_affine", True)
    only_one_trains = actual.keys() ^ expected.keys()
    assert {n.rpartition(".")[0] for n in only_one_trains} <= {*layers}
    assert not trains_affine or expected.keys() <= actual.keys()
    shared = [n for n in actual if n in expected]
    assert_close_in_norm({n: actual[n] for n in shared}, {n: expected[n] for n in shared}, 1e-9)

    before = snapshot(model)
    take_a_step(case, model)
    after = snapshot(model)
    moved = {n for n, value in before.items() if not torch.equal(after[n], value)}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n in actual}
    assert trained <= moved
    vectors = VECTORS[2:] if trains_affine else VECTORS
    constants = {f"{layer}.{vector}" for layer in layers for vector in vectors}
    assert constants <= {n for n, _ in model.named_buffers()} - moved


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", ["plain", "fuse", "fold_conv"])
@every_case
def test_summary_names_the_fate_of_each_layer(name, way):
    case, model = CASES[name], made(CASES[name])
    names = [*batch_norms(model)]
    table, totals = summary(convert_frozen_bn(model, **WAYS[way])).split("\n\n")
    rows = [line.split(maxsplit=2) for line in table.split("\n")[1:]]
    assert [row[0] for row in rows] == names
    assert all(state.startswith("frozen") for _, _, state in rows)
    assert totals.split("\n")[0] == f"{case.layers} frozen, 0 skipped"
    assert len(merged(model)) == (case.merged if way != "plain" else 0)
    if way != "plain":
        assert all(state != "frozen" for _, _, state in rows), "none without a reason"


@every_case
def test_checkpoints_fit_both_ways_and_unfreezing_restores(name):
    case = CASES[name]
    model, twin = made(case), made(case)
    before, kinds = snapshot(model), [type(module) for module in model.modules()]
    convert_frozen_bn(model, fuse=True)
    model.load_state_dict(before, strict=True)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert_same_bits(snapshot(twin), before)
    unfreeze_bn(model)
    assert [type(module) for module in model.modules()] == kinds
    assert_same_bits(snapshot(model), before)


# What else belongs to a training script


@every_way
def test_timms_scheduler_and_moving_average(way):
    timm = pytest.importorskip("timm")
    scheduler_of = pytest.importorskip("timm.scheduler").create_scheduler_v2
    case = CASES["timm-mobilenetv3"]
    model = convert_frozen_bn(made(case), **WAYS[way]).train()
    optimizer = case.optimizer(model)
    scheduler, _ = scheduler_of(optimizer, sched="cosine", num_epochs=3, warmup_epochs=1)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = snapshot(model)
    for epoch in range(2):
        losses_and_gradients(case, model)
        optimizer.step()
        average.update(model)
        scheduler.step(epoch + 1)

    averaged = snapshot(average.module)
    names = [f"{n}.{v}" for n in frozen_layers(model) for v in ("running_mean", "running_var")]
    assert_same_bits({n: averaged[n] for n in names}, {n: before[n] for n in names})
    assert not torch.equal(averaged["conv_stem.weight"], before["conv_stem.weight"])
    live = made(case)
    live.load_state_dict(averaged, strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(average.module.eval()(x), live.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["plain", "fuse", "fold_conv"])
def test_all_but_the_last_stage_frozen(way):
    """The last one goes on using and tracking the statistics of its batches."""
    models = pytest.importorskip("torchvision.models")

    def is_early(name: str, _: nn.Module) -> bool:
        return not name.startswith("layer4")

    original = calm_(models.resnet18(num_classes=5)).train()
    model = copy.deepcopy(original)
    for name, layer in batch_norms(original).items():
        layer.train(not is_early(name, layer))
    convert_frozen_bn(model, where=is_early, **WAYS[way]).train()
    case = Case(lambda: model, timm_losses, sgd, 20, 0)
    pytest.importorskip("timm")
    expected = losses_and_gradients(case, original)
    actual = losses_and_gradients(case, model)
    assert any(n.startswith("layer4.0.bn1") for n in actual)
    assert_close_in_norm(actual, {n: expected[n] for n in actual}, 1e-9)
    buffers = dict(original.named_buffers())
    for name, layer in batch_norms(model).items():
        assert layer.num_batches_tracked == 8
        for vector in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(layer, vector), buffers[f"{name}.{vector}"])
    text = summary(model)
    assert text.count("BatchNorm2d        skipped: not converted") == 5
    assert "15 frozen, 5 skipped" in text


def test_summary_measures_what_a_unet_saves():
    model = convert_frozen_bn(made(CASES["smp-resnet18"]), fuse=True).train()
    last = summary(model, torch.randn(1, 3, 64, 64)).split("\n")[-1]
    before, now = map(float, re.findall(r"[\d.]+(?= MiB)", last))
    assert now < 0.7 * before
