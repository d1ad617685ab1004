"""Frozen batch normalizations that projects carry themselves: recognised by what they compute, and
named where they only look like one. On the CPU."""

from __future__ import annotations

import copy
import pickle
import random

import foreign
import pytest
import torch
from batch_norms import messages
from foreign import NOT_THE_FORMULA, THE_FORMULA
from helpers import assert_same_bits, randomize_, snapshot
from torch import Tensor, nn

from frozen_bn import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    convert_frozen_bn,
    summary,
    unfreeze_bn,
)

C = 4
IMAGE = (2, C, 5, 5)

the_formula = pytest.mark.parametrize("kind", THE_FORMULA)


def net_of(kind: type[nn.Module]) -> nn.Sequential:
    return randomize_(nn.Sequential(nn.Conv2d(3, C, 1), kind(C), nn.ReLU()))


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fold_conv": True}], ids=str)
@the_formula
def test_it_is_converted_and_thawed_back_to_what_it_was(kind, options):
    net = net_of(kind).eval()
    layer, before, x = net[1], snapshot(net), torch.randn(2, 3, 5, 5)
    attributes = {name: value for name, value in vars(layer).items() if name[0] != "_"}
    expected = net(x)
    assert messages(lambda: convert_frozen_bn(net, **options)) == []
    assert type(net[1]) is FrozenBatchNorm2d
    assert net[1].eps == THE_FORMULA[kind]
    torch.testing.assert_close(net.train()(x), expected)
    assert [*net.state_dict()] == [*before]
    assert_same_bits(snapshot(net), before)
    net.eval()
    assert messages(lambda: unfreeze_bn(net)) == []
    assert net[1] is layer
    assert_same_bits(snapshot(net), before)
    assert attributes == {name: value for name, value in vars(layer).items() if name[0] != "_"}
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


@the_formula
def test_values_are_carried_back(kind):
    net, source = convert_frozen_bn(net_of(kind)), randomize_(net_of(kind), seed=1)
    net.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(unfreeze_bn(net)(x), source(x), rtol=0, atol=0)


@the_formula
def test_an_eps_that_was_changed_is_carried_back_or_the_layer_stays(kind):
    """... also where there is an attribute that ``forward`` does not read."""
    net = convert_frozen_bn(net_of(kind))
    net[1].eps = 0.5
    x = torch.randn(2, 3, 5, 5)
    expected = net(x)
    texts = messages(lambda: unfreeze_bn(net))
    torch.testing.assert_close(net(x), expected)
    fixed = kind in (foreign.MaskRCNNBenchmark, foreign.DETR)
    assert [text.endswith("for good") for text in texts] == [True] * fixed


class Unread(foreign.DETR):
    """Its attribute is not what it computes with."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.eps = 1e-5


def test_an_eps_that_is_not_read_is_no_eps():
    net = net_of(Unread)
    net[1].eps = 0.3
    x = torch.randn(2, 3, 5, 5)
    expected = net(x)
    convert_frozen_bn(net)
    assert net[1].eps == 1e-5
    torch.testing.assert_close(net(x), expected)
    layer = unfreeze_bn(net)[1]
    assert layer.eps == 0.3
    layer.eps = 1e-5
    convert_frozen_bn(net)
    net[1].eps = 0.5
    (text,) = messages(lambda: unfreeze_bn(net))
    assert text.endswith("Unread has eps=1e-05 for good")
    assert layer.eps == 1e-5


def test_a_trained_affine_stays_the_same_parameters():
    net = net_of(foreign.Trainable)
    weight = net[1].weight
    convert_frozen_bn(net, freeze_affine=False)
    assert net[1].weight is weight
    assert unfreeze_bn(net)[1].weight is weight


@pytest.mark.parametrize("shape", [(6, C), (2, C, 7)], ids=str)
def test_one_of_another_rank(shape):
    layer, x = randomize_(foreign.OneDimensional(C)), torch.randn(shape)
    expected = layer(x)
    frozen = convert_frozen_bn(layer)
    assert type(frozen) is FrozenBatchNorm1d
    torch.testing.assert_close(frozen(x), expected)


@pytest.mark.parametrize("shape", [(6, C), (2, C, 7), IMAGE, (2, C, 2, 3, 3)], ids=str)
def test_one_of_any_rank(shape):
    layer, x = randomize_(foreign.Trainable(C)), torch.randn(shape)
    expected = layer(x)
    torch.testing.assert_close(convert_frozen_bn(layer)(x), expected)


@pytest.mark.parametrize("channels", [1, 2, 2048])
@the_formula
def test_any_number_of_channels(kind, channels):
    assert type(convert_frozen_bn(kind(channels))) is FrozenBatchNorm2d


@the_formula
def test_a_copy_of_a_converted_one_is_thawed_by_itself(kind):
    net = net_of(kind)
    before = snapshot(net)
    convert_frozen_bn(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(unfreeze_bn(twin)[1]) is kind
        assert_same_bits(snapshot(twin), before)


def test_a_counter_that_a_profiler_left_is_no_part_of_it():
    layer = randomize_(foreign.DETR(C))
    layer.register_buffer("total_ops", torch.full((1,), 5.0))
    layer.register_buffer("total_params", torch.zeros(1))
    net = nn.Sequential(layer)
    before = snapshot(net)
    assert messages(lambda: convert_frozen_bn(net)) == []
    assert_same_bits(snapshot(net), before)
    net[0].total_ops += 1
    assert unfreeze_bn(net)[0] is layer
    assert layer.total_ops == 6


# What only looks like one


@pytest.mark.parametrize("kind", NOT_THE_FORMULA)
def test_what_is_not_the_formula_is_left_alone_and_named(kind):
    net = net_of(kind)
    layer, before = net[1], snapshot(net)
    (text,) = messages(lambda: convert_frozen_bn(net))
    reason = f"{kind.__name__} looks like a batch normalization, but computes something else"
    assert text.endswith(f"'1' is left as it is: {reason}")
    assert net[1] is layer
    assert_same_bits(snapshot(net), before)
    table = summary(net)
    assert f"skipped: {reason}" in table
    assert table.endswith("0 frozen, 1 skipped")


class Renamed(nn.Module):
    """Its statistics have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(C))


Renamed.__name__ = "MyBatchNorm"


class NotAffine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))


def holding_more() -> nn.Module:
    layer = foreign.DETR(C)
    layer.act = nn.ReLU()
    return layer


def holding_a_plain_tensor() -> nn.Module:
    layer = foreign.DETR(C)
    layer.gain = torch.ones(C)
    return layer


def of_other_shapes() -> nn.Module:
    layer = foreign.DETR(C)
    layer.weight = torch.ones(1)
    return layer


def scripted() -> nn.Module:
    return torch.jit.script(nn.BatchNorm2d(C))


def called_otherwise() -> nn.Module:
    kind = type("Called", (foreign.DETR,), {"__call__": lambda self, x: x})
    return kind(C)


def bound_otherwise() -> nn.Module:
    layer = foreign.DETR(C)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Renamed, "MyBatchNorm does not hold weight, bias, running_mean, running_var"),
        (NotAffine, "NotAffine does not hold weight, bias, running_mean, running_var"),
        (holding_more, "DETR holds more (act), which may take part"),
        (holding_a_plain_tensor, "DETR holds more (gain), which may take part"),
        (of_other_shapes, "DETR holds vectors of different shapes, or empty ones"),
        (scripted, "it is compiled by torch.jit, freeze before compiling"),
        (called_otherwise, "Called looks like a batch normalization, but computes something else"),
        (bound_otherwise, "it was altered (forward) and may compute something else"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_whatever_is_like_one_is_named(make, reason):
    net = nn.Sequential(make())
    (text,) = messages(lambda: convert_frozen_bn(net))
    assert text == f"frozen_bn: '0' is left as it is: {reason}"
    assert summary(net).endswith("0 frozen, 1 skipped")


def test_other_modules_are_not_like_one():
    net = nn.Sequential(
        nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
        nn.GroupNorm(2, C),
        nn.LayerNorm(C),
        nn.Linear(C, C),
    )
    assert messages(lambda: convert_frozen_bn(net)) == []
    assert summary(net).endswith("0 frozen, 0 skipped")


class WithAMask(foreign.Torchvision):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


def test_a_forward_that_takes_more_is_left_alone():
    """Ours would take the second argument for a residual."""
    (text,) = messages(lambda: convert_frozen_bn(nn.Sequential(WithAMask(C))))
    assert text.endswith("the forward of WithAMask takes more than an input")


class Listing(nn.Module):
    """Layers that are no submodules, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = randomize_(nn.BatchNorm2d(C))
        self.lists = [nn.BatchNorm2d(C), nn.ReLU(), foreign.DETR(C)]
        self.dicts = {"a": nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))}
        self.twice = (self.bn,)
        self.fine = [nn.Conv2d(C, C, 1)]


def test_layers_in_plain_lists_are_named():
    net = Listing()
    texts = messages(lambda: convert_frozen_bn(net))
    names = [text.split(" is left as it is")[0].removeprefix("frozen_bn: ") for text in texts]
    assert [eval(name) for name in names] == ["lists[0]", "lists[2]", "dicts['a'].1", "twice[0]"]
    assert "plain list" in texts[0]
    assert summary(net).endswith("1 frozen, 4 skipped")
    only = nn.Module()
    only.bns = [nn.BatchNorm2d(C)]
    assert summary(only).endswith("0 frozen, 1 skipped")


# Checkpoints that the class of a layer corrects


class Versioned(foreign.Detectron2):
    """As detectron2's: before version 3 variances had eps in them."""

    _version = 3

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others) -> None:
        if (local_metadata.get("version") or 1) < 3:
            state_dict[prefix + "running_var"] -= self.eps
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


@pytest.mark.parametrize("version", [1, 3])
def test_old_checkpoints_are_corrected_and_new_ones_say_that_they_are_new(version):
    state = randomize_(nn.Sequential(Versioned(C)), seed=1).state_dict()
    state = type(state)((name, value.clone()) for name, value in state.items())
    state._metadata = {"": {"version": 1}, "0": {"version": version}}
    given = {name: value.clone() for name, value in state.items()}
    theirs, ours = nn.Sequential(Versioned(C)), convert_frozen_bn(nn.Sequential(Versioned(C)))
    ours.load_state_dict(copy.deepcopy(state), strict=True)
    theirs.load_state_dict(copy.deepcopy(state), strict=True)
    assert_same_bits(snapshot(ours), snapshot(theirs))
    assert torch.equal(ours[0].running_var, given["0.running_var"]) is (version == 3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_bits(snapshot(theirs), snapshot(ours))


# The probe leaves no trace


class Untouched(nn.Module):
    """Everything but what it would take to be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        foreign.RAN.append("Untouched")
        return x

    def __getattr__(self, name: str) -> object:
        if name in ("original_name", "eps", "weight"):
            foreign.RAN.append(name)
        return super().__getattr__(name)


def test_no_code_runs_of_a_class_without_the_vectors():
    foreign.RAN.clear()
    net = nn.Sequential(Untouched())
    convert_frozen_bn(net)
    summary(net)
    assert foreign.RAN == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [foreign.Random, foreign.Detectron2])
def test_the_probe_leaves_no_trace(kind, training, mode):
    numpy = pytest.importorskip("numpy")
    net = net_of(kind).train(training).requires_grad_(False)
    layer = net[1]
    called: list[str] = []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    layer.register_forward_pre_hook(lambda *_: called.append("pre-hook"))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append("global"))
    before = snapshot(net), {n: copy.copy(v) for n, v in vars(layer).items() if n[0] != "_"}
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    identities = {name: id(value) for name, value in layer.named_buffers()}
    versions = [value._version for value in layer.buffers()]
    foreign.RAN.clear()
    try:
        with mode():
            flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            summary(net)
            messages(lambda: convert_frozen_bn(net))
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == flags
    finally:
        handle.remove()
    assert bool(foreign.RAN) is (kind is foreign.Random)
    assert called == []
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (numpy.random.get_state()[1] == generators[2]).all()
    assert layer.training is training
    assert {name: id(value) for name, value in layer.named_buffers()} == identities
    assert [value._version for value in layer.buffers()] == versions
    assert {n: v for n, v in vars(layer).items() if n[0] != "_"} == before[1]
    assert_same_bits(snapshot(net), before[0])
    assert all(value.grad is None for value in layer.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("place", ["meta", "cpu"])
@the_formula
def test_where_the_model_is_and_of_what_dtype_does_not_matter(kind, place, dtype):
    net = net_of(kind).to(place, dtype)
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert messages(lambda: convert_frozen_bn(net)) == []
    assert type(net[1]) is FrozenBatchNorm2d
    assert {(v.dtype, v.device.type) for v in net[1].state_dict().values()} == {(dtype, place)}


# Subclasses of torch's classes


class Named(nn.BatchNorm2d):
    def __init__(self, n: int) -> None:
        super().__init__(n, eps=1e-3)

    def extra_repr(self) -> str:
        return "mine"


class Again(Named):
    """Derived from one."""


class Checked(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class WithAProperty(nn.BatchNorm2d):
    @property
    def momentum(self) -> float:
        return 0.1

    @momentum.setter
    def momentum(self, value: float) -> None:
        pass


class Mixed(Named):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@pytest.mark.parametrize("kind", [Named, Again])
def test_a_subclass_that_changes_how_it_is_made_is_converted(kind):
    net = net_of(kind).eval()
    layer, before, x = net[1], snapshot(net), torch.randn(2, 3, 5, 5)
    expected = net(x)
    assert messages(lambda: convert_frozen_bn(net)) == []
    assert type(net[1]) is FrozenBatchNorm2d and net[1].eps == 1e-3
    torch.testing.assert_close(net.train()(x), expected)
    assert unfreeze_bn(net)[1] is layer
    assert_same_bits(snapshot(net), before)


@pytest.mark.parametrize("kind", [Checked, WithAProperty, Mixed])
def test_a_subclass_that_changes_more_is_left_alone(kind):
    (text,) = messages(lambda: convert_frozen_bn(randomize_(nn.Sequential(kind(C)))))
    assert f"{kind.__name__} is a subclass that may compute something else" in text
