"""convert_frozen_bn on hand-made modules. What it leaves alone is in test_convert_refused.py, whole
models are in test_convert_models.py, the classes of other libraries in test_recognise.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from batch_norms import (
    BOTH,
    IMAGE,
    C,
    frozen_names,
    frozen_statistics_loss,
    messages,
    network,
    trained,
    without_bias,
)
from helpers import assert_same_bits, randomize_, snapshot
from torch import nn

from frozen_bn import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    convert_frozen_bn,
    unfreeze_bn,
)

pytestmark = pytest.mark.usefixtures("device")

CLASSES = [
    pytest.param(nn.BatchNorm1d, FrozenBatchNorm1d, (6, C), id="1d-2"),
    pytest.param(nn.BatchNorm1d, FrozenBatchNorm1d, (2, C, 7), id="1d-3"),
    pytest.param(nn.BatchNorm2d, FrozenBatchNorm2d, IMAGE, id="2d"),
    pytest.param(nn.BatchNorm3d, FrozenBatchNorm3d, (2, C, 2, 3, 3), id="3d"),
    pytest.param(nn.SyncBatchNorm, FrozenBatchNorm2d, (6, C), id="sync-2"),
    pytest.param(nn.SyncBatchNorm, FrozenBatchNorm2d, (2, C, 7), id="sync-3"),
    pytest.param(nn.SyncBatchNorm, FrozenBatchNorm2d, IMAGE, id="sync-4"),
    pytest.param(nn.SyncBatchNorm, FrozenBatchNorm2d, (2, C, 2, 3, 3), id="sync-5"),
]


# Which layers, and that they compute the same


@BOTH
@pytest.mark.parametrize(("live_class", "frozen_class", "shape"), CLASSES)
def test_each_class_becomes_its_frozen_form(live_class, frozen_class, shape, freeze_affine):
    net = nn.Sequential(trained(live_class, eps=0.1)).eval()
    x = torch.randn(shape)
    expected = net(x)
    assert convert_frozen_bn(net, freeze_affine=freeze_affine) is net
    assert type(net[0]) is frozen_class
    assert net[0].eps == 0.1
    assert net[0].freeze_affine is freeze_affine
    torch.testing.assert_close(net.train()(x), expected)


def test_torchvisions_frozen_class_becomes_ours():
    ops = pytest.importorskip("torchvision.ops")
    net = nn.Sequential(randomize_(ops.FrozenBatchNorm2d(C, eps=0.1)))
    x, before = torch.randn(IMAGE), snapshot(net)
    expected = net(x)
    convert_frozen_bn(net)
    assert type(net[0]) is FrozenBatchNorm2d
    assert_same_bits(snapshot(net), before)
    torch.testing.assert_close(net(x), expected)
    assert type(unfreeze_bn(net)[0]) is ops.FrozenBatchNorm2d


def test_torchvisions_frozen_class_with_a_trainable_affine_gets_parameters():
    ops = pytest.importorskip("torchvision.ops")
    net = convert_frozen_bn(nn.Sequential(ops.FrozenBatchNorm2d(C)), freeze_affine=False)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]


@BOTH
def test_weight_without_bias(freeze_affine):
    net = nn.Sequential(without_bias()).eval()
    x, before = torch.randn(IMAGE), snapshot(net)
    expected = net(x)
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    assert list(net.state_dict()) == ["0.weight", "0.running_mean", "0.running_var"]
    torch.testing.assert_close(net(x), expected)
    assert_same_bits(snapshot(unfreeze_bn(net)), before)


@BOTH
def test_no_affine(freeze_affine):
    net = nn.Sequential(trained(affine=False)).eval()
    x, before = torch.randn(IMAGE), snapshot(net)
    expected = net(x)
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    assert list(net.state_dict()) == ["0.running_mean", "0.running_var"]
    torch.testing.assert_close(net(x), expected)
    assert_same_bits(snapshot(unfreeze_bn(net)), before)


def test_statistics_that_are_there_but_not_tracked_any_more_are_frozen():
    """Eval mode uses them, whatever ``track_running_stats`` has been set to since."""
    layer = trained()
    layer.track_running_stats = False
    x = torch.randn(IMAGE)
    expected = layer.eval()(x)
    torch.testing.assert_close(convert_frozen_bn(layer)(x), expected)


@pytest.mark.parametrize("cumulative", [True, False])
def test_momentum_does_not_matter(cumulative):
    layer = trained(momentum=None if cumulative else 0.5)
    frozen = convert_frozen_bn(nn.Sequential(layer))
    assert unfreeze_bn(frozen)[0].momentum == (None if cumulative else 0.5)


def test_instance_norm_and_the_like_are_not_batch_norms():
    net = nn.Sequential(nn.InstanceNorm2d(C, track_running_stats=True), nn.GroupNorm(2, C))
    kept = list(net)
    assert messages(lambda: convert_frozen_bn(net)) == []
    assert list(net) == kept


# What is kept


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype, freeze_affine):
    net = network().to(dtype)
    before = snapshot(net)
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    assert_same_bits(snapshot(net), {name: before[name] for name in net.state_dict()})


def test_mixed_dtypes_are_kept():
    layer = trained()
    layer.weight.data = layer.weight.data.half()
    layer.running_mean = layer.running_mean.double()
    frozen = convert_frozen_bn(layer)
    dtypes = [value.dtype for value in frozen.state_dict().values()]
    assert dtypes == [torch.float16, torch.float32, torch.float64, torch.float32]


@BOTH
def test_on_meta_then_filled_by_assignment(freeze_affine):
    source = network()
    with torch.device("meta"):
        net = network()
    net[1].bias.requires_grad_(False)
    assert messages(lambda: convert_frozen_bn(net, freeze_affine=freeze_affine)) == []
    assert all(value.is_meta for value in net.state_dict().values())
    net.load_state_dict(source.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(net(x), source.eval()(x))
    assert bool(list(net[1].parameters())) is not freeze_affine
    unfreeze_bn(net)
    assert_same_bits(snapshot(net), snapshot(source))
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["1.bias"]


def test_a_network_made_under_another_default_keeps_its_own():
    net = nn.Sequential(trained())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            convert_frozen_bn(net)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(v.dtype, v.is_meta) for v in net.state_dict().values()} == {(torch.float32, False)}


def test_names_and_order_of_children_are_kept():
    net = nn.Module()
    net.norms = nn.ModuleDict({"b": nn.BatchNorm2d(C), "a": nn.ReLU()})
    net.absent = None
    net.register_module("nothing", None)
    net.last = nn.ModuleList([nn.BatchNorm1d(C), nn.Linear(C, C), nn.BatchNorm1d(C)])
    randomize_(net)
    names = [name for name, _ in net.named_modules()]
    keys = [key for key in net.state_dict() if "num_batches_tracked" not in key]
    convert_frozen_bn(net)
    assert [name for name, _ in net.named_modules()] == names
    assert list(net.state_dict()) == keys
    assert frozen_names(net) == ["norms.b", "last.0", "last.2"]


def test_a_layer_is_never_in_training_and_gets_the_mode_of_what_is_around_it_when_thawed():
    net = network().train()
    net[1].eval()
    convert_frozen_bn(net)
    net.train()
    assert [net[1].training, net[3][1].training] == [False, False]
    net[3].eval()
    unfreeze_bn(net)
    assert [net[1].training, net[3][1].training] == [True, False]


def test_a_layer_under_two_names_stays_one_layer():
    shared = trained()
    net = nn.Sequential(shared, nn.Sequential(shared), nn.ReLU(), shared)
    convert_frozen_bn(net)
    assert type(net[0]) is FrozenBatchNorm2d
    assert net[0] is net[1][0] is net[3]
    unfreeze_bn(net)
    assert net[0] is net[1][0] is net[3] is shared


def test_a_parameter_shared_by_two_layers_stays_shared_if_trainable():
    net = nn.Sequential(trained(), trained())
    net[1].weight = net[0].weight
    convert_frozen_bn(net, freeze_affine=False)
    assert net[0].weight is net[1].weight


def test_hooks_go_on_firing_and_their_handles_go_on_removing():
    net = network()
    calls: list[str] = []
    layer = net[1]
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        layer.register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True),
        layer.register_full_backward_pre_hook(lambda *_: calls.append("backward-pre")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]

    def fired() -> list[str]:
        calls.clear()
        net(torch.randn(2, 3, 9, 9)).sum().backward()
        return calls

    every = ["pre", "post", "backward-pre", "backward"]
    assert fired() == every
    convert_frozen_bn(net)
    assert fired() == every
    handles[0].remove()
    assert fired() == every[1:]
    unfreeze_bn(net)
    assert fired() == every[1:]


def test_a_hook_made_on_the_frozen_layer_survives_unfreezing():
    net = convert_frozen_bn(network())
    shapes: list[int] = []
    net[1].register_full_backward_hook(lambda module, inputs, outputs: shapes.append(len(inputs)))
    unfreeze_bn(net)(torch.randn(2, 3, 9, 9)).sum().backward()
    assert shapes == [1]
    assert net[1]._is_full_backward_hook is True


def test_a_forward_hook_still_changes_the_output():
    net = nn.Sequential(trained()).eval()
    net[0].register_forward_hook(lambda module, inputs, output: output * 2)
    x = torch.randn(IMAGE)
    expected = net(x)
    torch.testing.assert_close(convert_frozen_bn(net)(x), expected)


def test_extra_attributes_are_kept_but_do_not_override_what_the_frozen_layer_means():
    layer = trained()
    layer.qconfig = object()
    layer.note = ["a"]
    layer.activation = "tanh"
    layer.inplace = True
    layer.freeze_affine = "no"
    frozen = convert_frozen_bn(layer)
    assert frozen.qconfig is layer.qconfig
    assert frozen.note is layer.note
    assert (frozen.activation, frozen.inplace, frozen.freeze_affine) == (None, False, True)


def test_a_layer_that_was_compiled_in_place_is_frozen_too():
    layer = trained()
    layer.compile(backend="eager")
    x = torch.randn(IMAGE)
    expected = F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias
    ).detach()
    statistics = snapshot(layer)
    torch.testing.assert_close(convert_frozen_bn(nn.Sequential(layer)).train()(x), expected)
    assert_same_bits(snapshot(layer), statistics)


def test_a_root_that_is_itself_a_batch_norm_comes_back_as_a_new_module():
    layer = trained()
    frozen = convert_frozen_bn(layer)
    assert type(frozen) is FrozenBatchNorm2d
    assert type(layer) is nn.BatchNorm2d
    assert unfreeze_bn(frozen) is layer


@BOTH
def test_the_second_conversion_changes_nothing(freeze_affine):
    net = convert_frozen_bn(network())
    layers, before = list(net.modules()), snapshot(net)
    assert messages(lambda: convert_frozen_bn(net, freeze_affine=freeze_affine)) == []
    assert list(net.modules()) == layers
    assert_same_bits(snapshot(net), before)


def test_a_model_without_batch_norm_is_returned_as_it_is():
    net = nn.Sequential(nn.Linear(2, 2))
    assert convert_frozen_bn(net) is net
    assert unfreeze_bn(net) is net


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
@BOTH
def test_copies_of_a_converted_model_unfreeze_by_themselves(clone, freeze_affine):
    net = network()
    before = snapshot(net)
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    twin = clone(net)
    randomize_(twin, seed=1)
    assert_same_bits(snapshot(unfreeze_bn(net)), before)
    unfreeze_bn(twin)
    assert list(twin.state_dict()) == list(before)
    assert not torch.equal(twin[1].weight, net[1].weight)
    assert {id(p) for p in net.parameters()}.isdisjoint(map(id, twin.parameters()))


def test_the_checkpoint_of_a_frozen_model_loads_strictly_into_the_live_one():
    live, frozen = network(), convert_frozen_bn(randomize_(network(), seed=1))
    live.load_state_dict(frozen.state_dict(), strict=True)
    assert torch.equal(live[1].running_mean, frozen[1].running_mean)


# The affine


def test_a_frozen_affine_is_no_parameter():
    net = convert_frozen_bn(network())
    assert {name.rpartition(".")[0] for name, _ in net.named_parameters()} == {"0", "3.0"}


def test_a_trainable_affine_keeps_its_parameters_and_their_requires_grad():
    net = network()
    net[1].bias.requires_grad_(False)
    net[3][1].weight.requires_grad_(False)
    before = dict(net.named_parameters())
    convert_frozen_bn(net, freeze_affine=False)
    after = dict(net.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [name for name, p in after.items() if not p.requires_grad] == ["1.bias", "3.1.weight"]


def test_an_optimizer_made_before_goes_on_with_a_trainable_affine_momentum_included():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    by_hand, its_optimizer = copy.deepcopy((net, optimizer))
    for step in range(4):
        x = torch.randn(2, 3, 9, 9)
        if step == 2:
            convert_frozen_bn(net, freeze_affine=False)
        for model, its in ((net, optimizer), (by_hand, its_optimizer)):
            its.zero_grad()
            frozen_statistics_loss(model, x).backward()
            its.step()
    expected = by_hand.state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_an_optimizer_made_before_cannot_move_a_frozen_affine():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    old, before = net[1].weight, net[1].weight.detach().clone()
    frozen_statistics_loss(net, torch.randn(2, 3, 9, 9)).backward()
    convert_frozen_bn(net)
    optimizer.step()
    assert not torch.equal(old, before), "the optimizer did nothing, so this shows nothing"
    assert torch.equal(net[1].weight, before)
    assert torch.equal(unfreeze_bn(net)[1].weight, before)


@BOTH
def test_the_layer_that_was_replaced_cannot_move_the_frozen_statistics(freeze_affine):
    net = network()
    old = net[1]
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    before = snapshot(net)
    old.train()(torch.randn(IMAGE))
    assert_same_bits(snapshot(net), before)


@BOTH
def test_gradients_are_those_of_batch_norms_in_eval_mode(freeze_affine):
    net, x = network().double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = copy.deepcopy(net)
    frozen_statistics_loss(expected, x).backward()
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    frozen_statistics_loss(net, x).backward()
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12)


# where


def test_where_is_asked_about_batch_norms_by_name_and_picks():
    net = network()
    asked: dict[str, type] = {}

    def where(name: str, module: nn.Module) -> bool:
        asked[name] = type(module)
        return name.startswith("3")

    convert_frozen_bn(net, where=where)
    assert asked == {"1": nn.BatchNorm2d, "3.1": nn.BatchNorm2d}
    assert frozen_names(net) == ["3.1"]
    convert_frozen_bn(net)
    assert frozen_names(net) == ["1", "3.1"]


def test_where_may_pick_a_shared_layer_by_any_of_its_names():
    shared = trained()
    net = nn.Sequential(shared, shared)
    convert_frozen_bn(net, where=lambda name, _: name == "1")
    assert net[0] is net[1]
    assert type(net[0]) is FrozenBatchNorm2d


def test_an_error_in_where_leaves_the_model_whole():
    net = network()
    with pytest.raises(ZeroDivisionError):
        convert_frozen_bn(net, where=lambda name, _: name == "1" or 1 / 0)
    assert frozen_names(net) == []
