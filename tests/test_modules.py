"""FrozenBatchNorm1d, 2d and 3d as modules: what they compute, hold, load, print and survive."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, VECTORS, assert_same_bits, randomize_, snapshot
from torch import Tensor, nn

import frozen_bn
from frozen_bn import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

pytestmark = pytest.mark.usefixtures("device")

C = 5
RANKS = [
    pytest.param(FrozenBatchNorm1d, nn.BatchNorm1d, (4, C), id="1d-2"),
    pytest.param(FrozenBatchNorm1d, nn.BatchNorm1d, (4, C, 7), id="1d-3"),
    pytest.param(FrozenBatchNorm2d, nn.BatchNorm2d, (2, C, 3, 5), id="2d"),
    pytest.param(FrozenBatchNorm3d, nn.BatchNorm3d, (2, C, 2, 3, 4), id="3d"),
]
FROZEN = [FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d]


def live_and_frozen(
    live_class: type[nn.Module] = nn.BatchNorm2d,
    frozen_class: type[nn.Module] = FrozenBatchNorm2d,
    **options: object,
) -> tuple[nn.Module, nn.Module]:
    live = randomize_(live_class(C, affine=options.get("affine", True))).eval()
    frozen = frozen_class(C, **options)
    frozen.load_state_dict(live.state_dict())
    return live, frozen


def activate(z: Tensor, activation: str | None, negative_slope: float = 0.01) -> Tensor:
    if activation is None:
        return z
    extra = (negative_slope,) if activation == "leaky_relu" else ()
    return getattr(F, activation)(z, *extra)


# What it computes


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("frozen_class", "live_class", "shape"), RANKS)
def test_output_and_gradient_are_those_of_eval_mode(frozen_class, live_class, shape, affine):
    live, frozen = live_and_frozen(live_class, frozen_class, affine=affine)
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [live(inputs[0]), frozen(inputs[1])]
    grad = torch.randn(shape)
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize(("frozen_class", "live_class", "shape"), RANKS)
def test_trainable_affine_gets_the_gradients_of_eval_mode(frozen_class, live_class, shape):
    live, frozen = live_and_frozen(live_class, frozen_class, freeze_affine=False)
    x, grad = torch.randn(shape), torch.randn(shape)
    for module in (live, frozen):
        module(x).backward(grad)
    torch.testing.assert_close(frozen.weight.grad, live.weight.grad)
    torch.testing.assert_close(frozen.bias.grad, live.bias.grad)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_is_added_before_the_activation(activation, residual):
    live, frozen = live_and_frozen(activation=activation, negative_slope=0.3)
    x = torch.randn(2, C, 6, 6) * 4
    r = torch.randn_like(x) if residual else None
    expected = activate(live(x) + r if residual else live(x), activation, 0.3)
    torch.testing.assert_close(frozen(x, r), expected)
    torch.testing.assert_close(frozen(x, residual=r), expected)


def test_inplace_returns_the_input_overwritten():
    live, frozen = live_and_frozen(inplace=True)
    x = torch.randn(2, C, 3, 3)
    expected = live(x)
    assert frozen(x) is x
    torch.testing.assert_close(x, expected)


def test_eps_defaults_to_1e_5_and_is_used():
    assert FrozenBatchNorm2d(C).eps == 1e-5
    _, frozen = live_and_frozen(eps=0.5)
    x = torch.randn(2, C, 3, 3)
    expected = F.batch_norm(
        x, frozen.running_mean, frozen.running_var, frozen.weight, frozen.bias, eps=0.5
    )
    torch.testing.assert_close(frozen(x), expected)


def test_eps_0_is_accepted():
    frozen = FrozenBatchNorm2d(C, 0)
    x = torch.randn(2, C, 3, 3)
    assert torch.equal(frozen(x), x)


# What it refuses


@pytest.mark.parametrize(
    ("frozen_class", "shape", "expected"),
    [
        (FrozenBatchNorm1d, [2, C, 3, 3], "2 or 3"),
        (FrozenBatchNorm1d, [C], "2 or 3"),
        (FrozenBatchNorm2d, [2, C, 3], "4"),
        (FrozenBatchNorm2d, [2, C, 3, 3, 3], "4"),
        (FrozenBatchNorm3d, [2, C, 3, 3], "5"),
    ],
)
@pytest.mark.parametrize(
    "mode", [contextlib.nullcontext(), torch.device("cpu")], ids=["", "in a mode"]
)
def test_wrong_rank_names_expected_and_received(frozen_class, shape, expected, mode):
    frozen, x = frozen_class(C), torch.randn(shape)
    with pytest.raises(RuntimeError) as error, mode:
        frozen(x)
    assert str(error.value) == (
        f"frozen_bn::forward: expected input to have {expected} dimensions, but got shape {shape}"
    )


@pytest.mark.parametrize("activation", ["gelu", "ReLU", "", 1, []])
@pytest.mark.parametrize("frozen_class", FROZEN)
def test_unknown_activation_is_refused_when_made(frozen_class, activation):
    with pytest.raises(ValueError, match=r"one of None, 'relu', .*'hardswish', but got"):
        frozen_class(C, activation=activation)


def test_positional_arguments_are_those_of_batch_norm():
    def positional(kind: type[nn.Module]) -> list[str]:
        parameters = inspect.signature(kind).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(FrozenBatchNorm2d) == positional(nn.BatchNorm2d)[:7]


@pytest.mark.parametrize("frozen_class", FROZEN)
def test_what_builders_of_layers_hand_over_is_taken(frozen_class):
    for frozen in (
        frozen_class(C, 0.1, 0.01),
        frozen_class(C, 0.1, momentum=0.01),
        frozen_class(C, 0.1, None, True, True, "cpu", torch.float32),
        frozen_class(C, eps=0.1, momentum=0.1, affine=True, track_running_stats=True),
    ):
        assert repr(frozen) == repr(frozen_class(C, 0.1))
    assert frozen_class(C, 0.1, 0.01, False).weight is None


def test_no_statistics_are_made_up_for_a_builder_that_wants_none():
    expected = r"frozen_bn::FrozenBatchNorm2d: expected track_running_stats to be True, but got"
    with pytest.raises(ValueError, match=expected):
        FrozenBatchNorm2d(C, track_running_stats=False)


# What it holds


def test_frozen_affine_is_buffers():
    frozen = FrozenBatchNorm2d(C)
    assert list(frozen.parameters()) == []
    assert [name for name, _ in frozen.named_buffers()] == VECTORS


def test_trainable_affine_is_parameters():
    frozen = FrozenBatchNorm2d(C, freeze_affine=False)
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == VECTORS[:2]
    assert [name for name, _ in frozen.named_buffers()] == VECTORS[2:]


@pytest.mark.parametrize("freeze_affine", [True, False])
def test_without_affine_there_are_only_statistics(freeze_affine):
    frozen = FrozenBatchNorm2d(C, affine=False, freeze_affine=freeze_affine)
    assert frozen.weight is None
    assert frozen.bias is None
    assert list(frozen.state_dict()) == VECTORS[2:]


def test_a_new_module_is_the_identity_but_for_eps():
    values = {name: v.unique().tolist() for name, v in FrozenBatchNorm2d(C).named_buffers()}
    assert values == {"weight": [1], "bias": [0], "running_mean": [0], "running_var": [1]}


@pytest.mark.parametrize("freeze_affine", [True, False])
def test_device_and_dtype_arguments(freeze_affine):
    options = {"device": "meta", "dtype": torch.bfloat16, "freeze_affine": freeze_affine}
    for value in FrozenBatchNorm2d(C, **options).state_dict().values():
        assert value.is_meta
        assert value.dtype == torch.bfloat16
        assert value.shape == (C,)


def test_repr():
    assert repr(FrozenBatchNorm2d(C)) == (
        "FrozenBatchNorm2d(5, eps=1e-05, affine=True, freeze_affine=True)"
    )
    text = repr(
        FrozenBatchNorm1d(
            C, 0.001, affine=False, activation="leaky_relu", negative_slope=0.2, inplace=True
        )
    )
    for part in ("eps=0.001", "affine=False", "'leaky_relu'", "negative_slope=0.2", "inplace=True"):
        assert part in text


# What it loads


@pytest.mark.parametrize("freeze_affine", [True, False])
@pytest.mark.parametrize("frozen_class", FROZEN)
def test_state_dict_keys_in_order(frozen_class, freeze_affine):
    assert list(frozen_class(C, freeze_affine=freeze_affine).state_dict()) == VECTORS


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not-counted"])
def test_loads_strictly_with_and_without_num_batches_tracked(counted):
    net = nn.Sequential(nn.Conv2d(3, C, 1), randomize_(nn.BatchNorm2d(C)))
    checkpoint = snapshot(net)
    if not counted:
        del checkpoint["1.num_batches_tracked"]
    handed = dict(checkpoint)
    target = nn.Sequential(nn.Conv2d(3, C, 1), FrozenBatchNorm2d(C))
    target.load_state_dict(handed, strict=True)
    assert handed == checkpoint, "the caller's dict was changed"
    assert_same_bits(snapshot(target), {name: checkpoint[name] for name in target.state_dict()})


def test_loading_a_module_by_itself_does_not_change_the_dict_it_is_handed():
    checkpoint = snapshot(randomize_(nn.BatchNorm2d(C)))
    names = list(checkpoint)
    FrozenBatchNorm2d(C)._load_from_state_dict(checkpoint, "", {}, True, [], [], [])
    assert list(checkpoint) == names


def test_strict_loading_still_reports_missing_and_unexpected_keys():
    checkpoint = snapshot(nn.BatchNorm2d(C))
    checkpoint["surprise"] = checkpoint.pop("running_var")
    with pytest.raises(RuntimeError) as error:
        FrozenBatchNorm2d(C).load_state_dict(checkpoint)
    assert 'Missing key(s) in state_dict: "running_var"' in str(error.value)
    assert 'Unexpected key(s) in state_dict: "surprise"' in str(error.value)


def test_its_own_checkpoint_loads_strictly_into_a_live_batch_norm():
    frozen = randomize_(FrozenBatchNorm2d(C))
    live = nn.BatchNorm2d(C)
    live.load_state_dict(frozen.state_dict(), strict=True)
    assert torch.equal(live.running_var, frozen.running_var)


def test_assigning_parameters_does_not_make_a_frozen_affine_trainable():
    frozen = FrozenBatchNorm2d(C)
    checkpoint = randomize_(nn.BatchNorm2d(C)).state_dict(keep_vars=True)
    frozen.load_state_dict(checkpoint, assign=True)
    assert list(frozen.parameters()) == []
    assert isinstance(checkpoint["weight"], nn.Parameter)
    assert torch.equal(frozen.weight, checkpoint["weight"])


def test_made_on_meta_and_filled_by_assignment():
    live, _ = live_and_frozen()
    frozen = FrozenBatchNorm2d(C, device="meta")
    assert frozen(torch.empty(2, C, 3, 3, device="meta")).is_meta
    frozen.load_state_dict(live.state_dict(), assign=True)
    x = torch.randn(2, C, 3, 3)
    torch.testing.assert_close(frozen(x), live(x))


# A drop-in for torchvision's


def test_is_a_drop_in_for_torchvisions_class():
    ops = pytest.importorskip("torchvision.ops")
    theirs = randomize_(ops.FrozenBatchNorm2d(C, 0.1))
    ours = FrozenBatchNorm2d(C, 0.1)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, C, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    ops.FrozenBatchNorm2d(C, 0.1).load_state_dict(ours.state_dict())


def test_is_a_norm_layer_for_torchvisions_resnet():
    models = pytest.importorskip("torchvision.models")
    live = randomize_(models.resnet18(num_classes=4)).eval()
    frozen = models.resnet18(num_classes=4, norm_layer=FrozenBatchNorm2d, zero_init_residual=True)
    frozen.load_state_dict(live.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(frozen.train()(x), live(x), rtol=1e-4, atol=1e-4)


# What it survives


@pytest.mark.parametrize("freeze_affine", [True, False])
def test_training_leaves_what_is_frozen_bit_identical(freeze_affine):
    torch.manual_seed(0)
    frozen = randomize_(FrozenBatchNorm2d(C, freeze_affine=freeze_affine))
    net = nn.Sequential(nn.Conv2d(3, C, 3), frozen, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    net(torch.randn(2, 3, 8, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = {name: b.clone() for name, b in frozen.named_buffers()}
    weights = snapshot(net)
    for step in range(3):
        net.train(step != 1)
        optimizer.zero_grad()
        net(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert_same_bits(dict(frozen.named_buffers()), before)
    moved = {name for name, value in net.state_dict().items() if not value.equal(weights[name])}
    affine = set() if freeze_affine else {"1.weight", "1.bias"}
    assert moved == {"0.weight", "0.bias", "4.weight", "4.bias"} | affine


def test_train_and_eval_give_the_same_bits_while_a_dropout_goes_on_dropping():
    net = nn.Sequential(randomize_(FrozenBatchNorm2d(C)), nn.Dropout(0.5))
    x = torch.randn(2, C, 8, 8)
    norms, outputs = {}, {}
    for mode in (True, False):
        net.train(mode)
        assert net[0].training is False
        norms[mode], outputs[mode] = net[0](x), net(x)
    assert torch.equal(norms[True], norms[False])
    assert torch.equal(outputs[False], norms[False])
    assert 0.3 < (outputs[True] == 0).float().mean() < 0.7


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("freeze_affine", [True, False])
def test_copies_are_equal_and_independent(clone, freeze_affine):
    frozen = randomize_(FrozenBatchNorm2d(C, 0.2, freeze_affine=freeze_affine, activation="silu"))
    twin = clone(frozen)
    assert repr(twin) == repr(frozen)
    assert_same_bits(snapshot(twin), snapshot(frozen))
    x = torch.randn(2, C, 3, 3)
    before = frozen(x)
    assert torch.equal(twin(x), before)
    randomize_(twin, seed=1)
    assert torch.equal(frozen(x), before)


@pytest.mark.parametrize("freeze_affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_any_dtype_and_the_output_has_the_inputs(dtype, freeze_affine):
    live = randomize_(nn.BatchNorm2d(C)).eval().to(dtype)
    frozen = FrozenBatchNorm2d(C, freeze_affine=freeze_affine, dtype=dtype)
    frozen.load_state_dict(live.state_dict())
    assert {v.dtype for v in frozen.to(dtype).state_dict().values()} == {dtype}
    live.double()  # the rounded values, exactly
    x = torch.randn(2, C, 4, 4)
    for input_dtype, tolerance in [(dtype, None), (torch.float32, 1e-5)]:
        y = frozen(x.to(input_dtype))
        assert y.dtype == input_dtype
        expected = live(x.to(input_dtype).double()).to(input_dtype)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert {v.dtype for v in frozen.state_dict().values()} == {dtype}, "re-cast by forward"


@pytest.mark.parametrize("name", ["half", "bfloat16", "double", "float"])
def test_the_named_casts_work(name):
    dtype = getattr(torch, name)
    frozen = getattr(FrozenBatchNorm2d(C), name)()
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    assert {v.dtype for v in frozen.state_dict().values()} == {wide}


def test_to_meta_and_back_to_empty_memory():
    frozen = FrozenBatchNorm2d(C).to("meta")
    assert all(v.is_meta for v in frozen.state_dict().values())
    frozen.to_empty(device="cpu")
    assert list(frozen.state_dict()) == VECTORS
    assert not frozen.weight.is_meta


def test_fx_keeps_the_call_as_a_leaf():
    layer = frozen_bn.FrozenBatchNorm2d(4, activation="relu")
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), layer))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["0", "1"]
    assert traced.get_submodule("1") is layer
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(traced(x), layer(traced.get_submodule("0")(x)))


def test_fx_keeps_the_function_as_one_call():
    traced = torch.fx.symbolic_trace(frozen_bn.FrozenBatchNorm2d(4, activation="relu"))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [frozen_bn.frozen_batch_norm]
