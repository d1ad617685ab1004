"""The life of a converted model in training: averages, parametrizations, pruning. See
test_life_loops.py for the loops of frameworks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close_in_norm, assert_same_bits, outputs_and_gradients, snapshot
from nets import EVERY_CONVERSION, images, network, plain_twin, train_step
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from frozen_bn import convert_frozen_bn, unfreeze_bn


def assert_same(net: nn.Module, other: nn.Module) -> None:
    """Up to rounding. Without gradients folded weights are kept."""
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(net(images()), other(images()), rtol=1e-4, atol=1e-5)
    expected = outputs_and_gradients(other, images())
    assert_close_in_norm(outputs_and_gradients(net, images()), expected, 1e-4)


# Averages


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
@EVERY_CONVERSION
def test_averaged_model(options, average, use_buffers):
    """Also evaluated between updates, which keeps folded weights; constants do not move."""
    averages = []
    for net in (network(**options), plain_twin(options)):
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        averaged = AveragedModel(net, multi_avg_fn=average, use_buffers=use_buffers)
        outputs = []
        for step in range(3):
            train_step(net, step)
            averaged.update_parameters(net)
            with torch.no_grad():
                outputs.append(averaged(images()))
        update_bn([images()], averaged)
        after = dict(averaged.module.named_buffers())
        assert_close_in_norm(after, before, 1e-6 if use_buffers else 0)
        averages.append((averaged, outputs))
    torch.testing.assert_close(averages[0][1], averages[1][1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(averages[0][1][1], averages[0][1][2])
    models = [snapshot(averaged.module) for averaged, _ in averages]
    assert_close_in_norm(*models, 1e-4)


# Parametrizations


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "convolution": lambda net: parametrize.register_parametrization(net[0], "weight", Squared()),
    "weight norm": lambda net: parametrizations.weight_norm(net[3].conv1),
    "spectral norm, which counts": lambda net: parametrizations.spectral_norm(net[3].conv2),
    "frozen layer": lambda net: parametrize.register_parametrization(net[1], "weight", Squared()),
    "its bias": lambda net: parametrize.register_parametrization(net[3].bn2, "bias", Squared()),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("before", [True, False], ids=["before fusing", "after fusing"])
@pytest.mark.parametrize("change", PARAMETRIZED.values(), ids=PARAMETRIZED)
@EVERY_CONVERSION
def test_parametrizations(options, change, before):
    net, plain = plain_twin(options), plain_twin(options)
    torch.manual_seed(0)
    change(plain)
    torch.manual_seed(0)
    if before:
        change(net)
        convert_frozen_bn(net, **options)
    else:
        convert_frozen_bn(net, **options)
        net(images())
        change(net)
    for step in range(2):
        train_step(net, step)
        train_step(plain, step)
    assert_same(net, plain)
    assert_close_in_norm(snapshot(net), snapshot(plain), 1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_folded_transposed_convolution_that_is_parametrized_later(rank):
    kinds = {1: (nn.ConvTranspose1d, nn.BatchNorm1d), 2: (nn.ConvTranspose2d, nn.BatchNorm2d)}
    kinds[3] = (nn.ConvTranspose3d, nn.BatchNorm3d)
    conv, norm = kinds[rank]
    net = nn.Sequential(conv(4, 6, 3, groups=2), norm(6))
    net[1].running_var.uniform_(0.5, 1.5)
    convert_frozen_bn(net, fold_conv=True)
    parametrize.register_parametrization(net[0], "weight", Squared())
    x = torch.randn(2, 4, *[5] * rank)
    torch.testing.assert_close(net(x), net[1](net[0](x)))


# Pruning


@pytest.mark.parametrize("before", [True, False], ids=["before fusing", "after fusing"])
@EVERY_CONVERSION
def test_pruned_convolutions(options, before):
    """Trained with the masks, which are then made permanent."""
    net, plain = plain_twin(options), plain_twin(options)

    def pruned(model: nn.Module) -> None:
        for layer in (model[0], model[3].conv1, model[3].down):
            prune.l1_unstructured(layer, "weight", 0.5)

    if before:
        pruned(net)
    convert_frozen_bn(net, **options)
    if not before:
        net(images())
        pruned(net)
    pruned(plain)
    for step in range(2):
        train_step(net, step)
        train_step(plain, step)
        assert_same(net, plain)
    for model in (net, plain):
        for layer in (model[0], model[3].conv1, model[3].down):
            prune.remove(layer, "weight")
    assert_same(net, plain)
    assert (net[0].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("fold_conv", [True, False])
def test_a_pruned_layer_with_a_trained_affine(fuse, fold_conv):
    options = {"freeze_affine": False, "fuse": fuse, "fold_conv": fold_conv}
    net, plain = network(**options), plain_twin(options)
    for model in (net, plain):
        prune.l1_unstructured(model[1], "weight", 0.5)
        train_step(model, 0)
    assert_same(net, plain)
    assert (net[1].weight == 0).sum() == 4
    for model in (net, plain):
        prune.remove(model[1], "weight")
    assert_same(net, plain)
    unfreeze_bn(net)
    assert (net[1].weight == 0).sum() == 4


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fold_conv": True}], ids=str)
def test_pruning_a_frozen_affine_is_refused_and_changes_nothing(options):
    """By torch: only Parameters can be pruned."""
    net = network(**options)
    with pytest.raises(TypeError, match=r"cannot assign .* to parameter 'weight_orig'"):
        prune.l1_unstructured(net[1], "weight", 0.5)
    assert_same(net, network())
    assert_same_bits(snapshot(net), snapshot(network()))


ALTERED: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "weight_mask, weight_orig": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "parametrizations": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Squared()),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("names", ALTERED)
@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fold_conv": True}], ids=str)
def test_an_altered_layer_is_not_unfrozen_before_that_is_undone(options, names):
    net, (alter, undo) = network(freeze_affine=False, **options), ALTERED[names]
    alter(net[1])
    expected = outputs_and_gradients(net.eval(), images())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unfreeze_bn(net)
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("frozen_bn: '1' is left as it is: it was altered (") and all(
        name in message for name in names.split(", ")
    )
    assert type(net[3].bn1) is nn.BatchNorm2d
    assert_close_in_norm(outputs_and_gradients(net, images()), expected, 1e-4)
    undo(net[1])
    assert type(unfreeze_bn(net)[1]) is nn.BatchNorm2d
    assert torch.allclose(net(images()), expected["output 0"], atol=1e-5)
