"""convert_frozen_bn and unfreeze_bn, on hand-made modules and on whole models. The classes of other
libraries are in test_recognise.py."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import VECTORS, assert_same_bits, make_generator, randomize_, snapshot
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune

from frozen_bn import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    convert_frozen_bn,
    unfreeze_bn,
)

pytestmark = pytest.mark.usefixtures("device")

C = 4
IMAGE = (2, C, 5, 5)
FROZEN = (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d)
BOTH = pytest.mark.parametrize("freeze_affine", [True, False])

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


def trained(live_class: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Module:
    return randomize_(live_class(C, **options))


def network(**options: object) -> nn.Sequential:
    """Two batch normalizations, in train mode."""
    net = nn.Sequential(
        nn.Conv2d(3, C, 3),
        nn.BatchNorm2d(C, **options),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C, **options)),
    )
    return randomize_(net)


def messages(function: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


def frozen_names(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, FROZEN)]


def frozen_statistics_loss(net: nn.Module, x: Tensor) -> Tensor:
    """A loss of ``net`` in train mode but for its batch normalizations, as one freezes by hand."""
    net.train()
    for layer in net.modules():
        if isinstance(layer, _BatchNorm):
            layer.eval()
    return net(x).square().mean()


def without_bias() -> nn.Module:
    if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
        return trained(bias=False)
    layer = trained()
    layer.bias = None
    return layer


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


def test_the_training_flag_of_each_layer_is_kept_both_ways():
    net = network()
    net[1].eval()
    convert_frozen_bn(net)
    assert [net[1].training, net[3][1].training] == [False, True]
    net[1].train()
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


# What is left alone


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def untracked() -> nn.Module:
    return nn.BatchNorm2d(C, track_running_stats=False)


def statistics_removed() -> nn.Module:
    layer = trained()
    layer.running_mean = layer.running_var = None
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(trained(), "weight", 0.5)


def reparametrized() -> nn.Module:
    return parametrizations.weight_norm(trained(), dim=None)


def observed() -> nn.Module:
    layer = trained()
    layer.activation_post_process = nn.Tanh()
    layer.register_forward_hook(lambda module, _, y: module.activation_post_process(y))
    return layer


def with_a_submodule_called_act() -> nn.Module:
    layer = trained()
    layer.act = nn.ReLU()
    return layer


def with_a_forward_of_its_own() -> nn.Module:
    layer = trained()
    layer.forward = types.MethodType(lambda self, x: nn.BatchNorm2d.forward(self, x) * 2, layer)
    return layer


def with_a_plain_tensor_for_weight() -> nn.Module:
    layer = trained()
    weight = layer.weight.data
    del layer.weight
    layer.weight = weight
    return layer


def assert_left_alone(layer: nn.Module, reason: str) -> None:
    """... with one warning, and its siblings are converted all the same."""
    net = nn.Module()
    net.good, net.odd, net.again = trained(), layer, layer
    before = snapshot(layer)
    (text,) = messages(lambda: convert_frozen_bn(net))
    assert "'odd' is left as it is" in text
    assert reason in text
    assert net.odd is layer
    assert net.again is layer
    assert_same_bits(snapshot(layer), before)
    assert frozen_names(net) == ["good"]
    assert messages(lambda: convert_frozen_bn(net, where=lambda name, _: name == "good")) == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (untracked, "track_running_stats=False"),
        (statistics_removed, "no statistics"),
        (lambda: Shifted(C), "Shifted is a subclass"),
        (pruned, "altered (weight, weight_mask, weight_orig)"),
        (reparametrized, "subclass"),
        (observed, "altered (activation_post_process)"),
        (with_a_submodule_called_act, "altered (act)"),
        (with_a_forward_of_its_own, "altered (forward)"),
        (with_a_plain_tensor_for_weight, "altered (weight)"),
    ],
)
def test_left_alone_with_one_warning_that_names_the_layer_and_why(make, reason):
    assert_left_alone(make(), reason)


@pytest.mark.parametrize("lazy_class", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
def test_a_lazy_layer_is_left_alone_until_it_is_initialized(lazy_class):
    net = nn.Sequential(lazy_class())
    (text,) = messages(lambda: convert_frozen_bn(net))
    assert "'0' is left as it is: it is lazy" in text
    assert type(net[0]) is lazy_class
    net(torch.randn([2, C, 3, 3, 3][: {"1": 3, "2": 4, "3": 5}[lazy_class.__name__[-2]]]))
    assert messages(lambda: convert_frozen_bn(net)) == []
    assert frozen_names(net) == ["0"]


def test_a_root_that_is_left_alone_is_named_by_its_class():
    layer = untracked()
    with pytest.warns(UserWarning, match="'BatchNorm2d' is left as it is"):
        assert convert_frozen_bn(layer) is layer


def test_a_batch_norm_compiled_by_itself_is_left_alone():
    compiled = torch.compile(trained(), backend="eager")
    (text,) = messages(lambda: convert_frozen_bn(nn.Sequential(compiled)))
    assert "'0._orig_mod' is left as it is: torch.compile holds on to it" in text
    assert type(compiled._orig_mod) is nn.BatchNorm2d


@pytest.mark.parametrize("make", [untracked, lambda: nn.BatchNorm2d(C)], ids=["left", "untrained"])
def test_warnings_point_at_the_caller(make):
    with pytest.warns(UserWarning) as caught:
        convert_frozen_bn(make())
    assert [warning.filename for warning in caught] == [__file__]


def test_each_layer_left_alone_has_its_own_warning():
    net = nn.Sequential(untracked(), trained(), Shifted(C))
    texts = messages(lambda: convert_frozen_bn(net))
    assert [text.split("'")[1] for text in texts] == ["0", "2"]


def test_never_trained_layers_are_frozen_with_one_warning():
    net = nn.Sequential(trained(), nn.BatchNorm2d(C), nn.Linear(2, 2), nn.BatchNorm1d(C))
    (text,) = messages(lambda: convert_frozen_bn(net))
    assert "'1' and 1 more were never trained" in text
    assert frozen_names(net) == ["0", "1", "3"]


def test_statistics_of_unknown_age_are_not_called_untrained():
    loaded, unlucky = trained(), nn.BatchNorm2d(C)
    loaded.num_batches_tracked.zero_()
    unlucky.num_batches_tracked.fill_(1)
    net = nn.Sequential(loaded, unlucky)
    assert messages(lambda: convert_frozen_bn(net)) == []


def test_warnings_turned_into_errors_leave_the_model_whole():
    net = nn.Sequential(trained(), untracked())
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        convert_frozen_bn(net)
    assert frozen_names(net) == []


# Bad statistics

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("vector", "value", "eps", "text"),
    [
        ("running_var", -0.1, 1e-5, "to have running_var >= 0 .* but got running_var -0.1"),
        ("running_var", -1e-6, 1e-5, "running_var -1e-06"),
        ("running_var", 0.0, 0.0, "running_var 0 and eps 0"),
        ("running_var", NAN, 1e-5, "running_var of '3.1' to be finite"),
        ("running_var", INF, 1e-5, "running_var of '3.1' to be finite"),
        ("running_mean", NAN, 1e-5, "running_mean of '3.1' to be finite"),
        ("running_mean", -INF, 1e-5, "running_mean of '3.1' to be finite"),
        ("running_mean", 0.0, -1e-3, "eps of '3.1' to be finite and >= 0, but got -0.001"),
        ("running_mean", 0.0, NAN, "eps of '3.1' to be finite and >= 0, but got nan"),
    ],
)
def test_bad_statistics_are_an_error_and_nothing_is_modified(vector, value, eps, text):
    net = network()
    getattr(net[3][1], vector)[2] = value
    net[3][1].eps = eps
    layers, before = list(net.modules()), snapshot(net)
    with pytest.raises(RuntimeError, match=f"frozen_bn::convert_frozen_bn: expected .*{text}"):
        convert_frozen_bn(net)
    assert list(net.modules()) == layers
    assert_same_bits(snapshot(net), before)


def test_zero_variance_is_fine_with_a_positive_eps():
    layer = trained()
    layer.running_var.zero_()
    x = torch.randn(IMAGE)
    expected = layer.eval()(x)
    torch.testing.assert_close(convert_frozen_bn(layer)(x), expected)


def test_bad_statistics_of_a_layer_that_is_left_alone_or_not_picked_do_not_matter():
    net = nn.Sequential(trained(), Shifted(C), trained())
    net[1].running_var.fill_(-1)
    net[2].running_var.fill_(-1)
    with pytest.warns(UserWarning, match="'1' is left"):
        convert_frozen_bn(net, where=lambda name, _: name != "2")
    assert frozen_names(net) == ["0"]


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


# unfreeze_bn


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
    net = odd_network()
    expected = snapshot(copy.deepcopy(net).to(dtype))
    flags = [p.requires_grad for p in net.parameters()]
    unfreeze_bn(convert_frozen_bn(net, freeze_affine=freeze_affine).to(dtype))
    assert_same_bits(snapshot(net), expected)
    assert [p.requires_grad for p in net.parameters()] == flags


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
    frozen = randomize_(frozen_class(C, 0.1, freeze_affine=freeze_affine)).half().eval()
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


# Whole models


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
    pytest.param(r3d_18, (2, 3, 4, 32, 32), id="r3d_18"),
    pytest.param(faster_rcnn, None, id="faster_rcnn"),
    pytest.param(faster_rcnn_on_a_frozen_backbone, None, id="faster_rcnn-frozen"),
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
