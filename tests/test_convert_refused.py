"""What convert_frozen_bn leaves alone, warns of and refuses."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from batch_norms import IMAGE, C, frozen_names, messages, network, trained
from helpers import assert_same_bits, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from frozen_bn import convert_frozen_bn

pytestmark = pytest.mark.usefixtures("device")


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
