"""unfreeze_bn, on hand-made modules."""

from __future__ import annotations

import copy

import pytest
import torch
from batch_norms import (
    BOTH,
    C,
    frozen_names,
    frozen_statistics_loss,
    messages,
    network,
    trained,
    without_bias,
)
from helpers import VECTORS, assert_same_bits, randomize_, snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from frozen_bn import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    convert_frozen_bn,
    unfreeze_bn,
)

pytestmark = pytest.mark.usefixtures("device")


def odd_network() -> nn.Sequential:
    """One of each class, with options that are not the defaults."""
    net = nn.Sequential(
        nn.BatchNorm2d(C, eps=0.01, momentum=None),
        nn.BatchNorm2d(C, momentum=0.3, affine=False),
        nn.SyncBatchNorm(C, momentum=0.2),
        without_bias(),
        nn.Flatten(2),
        nn.BatchNorm1d(C),
        nn.Unflatten(2, (1, 5, 5)),
        nn.BatchNorm3d(C),
    )
    randomize_(net)
    net[0].bias.requires_grad_(False)
    net[2].process_group = "a group"
    net[7].weight.requires_grad_(False)
    return net


@BOTH
def test_unfreezing_gives_back_the_very_modules_and_state(freeze_affine):
    net = odd_network()
    layers, before = list(net.modules()), snapshot(net)
    descriptions = [repr(layer) for layer in layers]
    parameters = {name: (id(p), p.requires_grad) for name, p in net.named_parameters()}
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    assert len(frozen_names(net)) == 6
    assert unfreeze_bn(net) is net
    assert list(net.modules()) == layers
    assert [repr(layer) for layer in layers] == descriptions
    assert {name: (id(p), p.requires_grad) for name, p in net.named_parameters()} == parameters
    assert net[2].process_group == "a group"
    assert_same_bits(snapshot(net), before)
    assert all(isinstance(value, nn.Parameter) for _, value in net.named_parameters())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_unfreezing_after_a_change_of_dtype(dtype, freeze_affine):
    """A frozen affine and its statistics have not been narrowed; behind a trained one, statistics
    are now, for torch takes no mixture."""
    net = odd_network()
    live = snapshot(net)
    expected = snapshot(copy.deepcopy(net).to(dtype))
    flags = [p.requires_grad for p in net.parameters()]
    unfreeze_bn(convert_frozen_bn(net, freeze_affine=freeze_affine).to(dtype))
    kept = freeze_affine and dtype.itemsize < 4
    without_affine = [f"1.{name}" for name in VECTORS] if dtype.itemsize < 4 else []
    for name, value in live.items():
        if kept or name in without_affine:
            expected[name] = value
    assert_same_bits(snapshot(net), expected)
    assert [p.requires_grad for p in net.parameters()] == flags
    net(torch.randn(2, C, 5, 5, dtype=dtype))


def test_statistics_that_do_not_fit_are_not_thawed_into_half_precision():
    net = network()
    net[1].running_var.fill_(1e6)
    convert_frozen_bn(net, freeze_affine=False).half()
    (text,) = messages(lambda: unfreeze_bn(net))
    assert text.endswith("'1' is left as it is: running_var does not fit in float16")
    assert net[1].running_var.max() == 1e6
    assert messages(lambda: unfreeze_bn(net.float())) == []
    assert net[1].running_var.max() == 1e6


def test_gradients_made_before_follow_a_change_of_dtype():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    frozen_statistics_loss(net, torch.randn(2, 3, 9, 9)).backward()
    unfreeze_bn(convert_frozen_bn(net).double())
    optimizer.step()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float64}


@BOTH
def test_unfreezing_after_training_keeps_what_was_learned(freeze_affine):
    net = network()
    before = snapshot(net)
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 9, 9)).square().mean().backward()
        optimizer.step()
    learned = snapshot(net)
    assert torch.equal(learned["1.weight"], before["1.weight"]) is freeze_affine
    unfreeze_bn(net)
    assert_same_bits(snapshot(net), {name: learned.get(name, before[name]) for name in before})


@BOTH
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("counted", [True, False])
def test_unfreezing_after_loading_a_checkpoint(counted, assign, freeze_affine):
    net, source = odd_network(), randomize_(odd_network(), seed=1)
    for layer in source.modules():
        if isinstance(layer, _BatchNorm):
            layer.num_batches_tracked.fill_(99)
    checkpoint = snapshot(source)
    if not counted:
        checkpoint = {k: v for k, v in checkpoint.items() if "num_batches_tracked" not in k}
    flags = [p.requires_grad for p in net.parameters()]
    expected = {name: checkpoint.get(name, value) for name, value in snapshot(net).items()}
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    net.load_state_dict(checkpoint, strict=True, assign=assign)
    unfreeze_bn(net)
    assert_same_bits(snapshot(net), expected)
    assert [p.requires_grad for p in net.parameters()] == flags


def test_a_checkpoint_with_counts_leaves_no_trace_in_torchvisions_frozen_class():
    ops = pytest.importorskip("torchvision.ops")
    net = convert_frozen_bn(nn.Sequential(ops.FrozenBatchNorm2d(C)))
    net.load_state_dict(nn.Sequential(trained()).state_dict())
    assert list(unfreeze_bn(net).state_dict()) == [f"0.{name}" for name in VECTORS]


def test_unfreezing_keeps_an_eps_that_was_changed():
    net = convert_frozen_bn(network()).eval()
    net[1].eps = 0.5
    x = torch.randn(2, 3, 9, 9)
    expected = net(x)
    torch.testing.assert_close(unfreeze_bn(net)(x), expected)


def test_unfreezing_keeps_a_weight_that_was_removed():
    net = convert_frozen_bn(network()).eval()
    net[1].weight = None
    x = torch.randn(2, 3, 9, 9)
    expected = net(x)
    torch.testing.assert_close(unfreeze_bn(net)(x), expected)


def test_an_unfrozen_model_does_not_write_to_the_checkpoint_it_had_loaded():
    net, checkpoint = convert_frozen_bn(network()), snapshot(network())
    before = copy.deepcopy(checkpoint)
    net.load_state_dict(checkpoint)
    unfreeze_bn(net)(torch.randn(2, 3, 9, 9))
    assert_same_bits(checkpoint, before)


def test_an_unfrozen_model_tracks_statistics_again():
    net = unfreeze_bn(convert_frozen_bn(network()))
    mean = net[1].running_mean.clone()
    net(torch.randn(2, 3, 9, 9))
    assert not torch.equal(net[1].running_mean, mean)
    assert net[1].num_batches_tracked == 8


def test_freezing_and_unfreezing_may_be_repeated():
    net = odd_network()
    layers, before = list(net.modules()), snapshot(net)
    for freeze_affine in (True, False, True):
        unfreeze_bn(convert_frozen_bn(net, freeze_affine=freeze_affine))
    assert list(net.modules()) == layers
    assert_same_bits(snapshot(net), before)


@BOTH
@pytest.mark.parametrize(
    ("frozen_class", "live_class"),
    [
        (FrozenBatchNorm1d, nn.BatchNorm1d),
        (FrozenBatchNorm2d, nn.BatchNorm2d),
        (FrozenBatchNorm3d, nn.BatchNorm3d),
    ],
)
def test_layers_made_by_hand_become_live_ones(frozen_class, live_class, freeze_affine):
    frozen = frozen_class(C, 0.1, freeze_affine=freeze_affine, dtype=torch.float16)
    randomize_(frozen).train()
    before = snapshot(frozen)
    live = unfreeze_bn(frozen)
    assert type(live) is live_class
    assert live.eps == 0.1
    assert not live.training
    assert_same_bits({name: snapshot(live)[name] for name in VECTORS}, before)


@pytest.mark.parametrize("affine", [True, False])
def test_layers_made_by_hand_on_meta_become_live_ones_on_meta(affine):
    live = unfreeze_bn(FrozenBatchNorm2d(C, affine=affine, device="meta"))
    assert all(value.is_meta for value in live.state_dict().values())


class Mine(FrozenBatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("frozen", "reason"),
    [(FrozenBatchNorm2d(C, activation="relu"), "activation='relu'"), (Mine(C), "Mine")],
    ids=["activation", "subclass"],
)
def test_what_has_no_live_form_is_left_frozen_with_one_warning(frozen, reason):
    net = convert_frozen_bn(nn.Sequential(trained(), frozen))
    (text,) = messages(lambda: unfreeze_bn(net))
    assert "'1' is left as it is" in text
    assert reason in text
    assert net[1] is frozen
    assert type(net[0]) is nn.BatchNorm2d
