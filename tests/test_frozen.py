"""Frozen means frozen: the mode, the digits and the range of what is frozen, its memory order, and
what optimizer groups and wrappers make of it."""

from __future__ import annotations

import copy
import io
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from batch_norms import messages
from helpers import (
    VECTORS,
    assert_close_in_norm,
    assert_same_bits,
    make_generator,
    output_strides,
    outputs_and_gradients,
    randomize_,
    snapshot,
)
from nets import EVERY_CONVERSION, images, network
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from frozen_bn import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    convert_frozen_bn,
    norm_parameters,
    reference,
    summary,
    unfreeze_bn,
)

pytestmark = pytest.mark.usefixtures("device")

C = 8
IMAGE = (4, C, 5, 5)


def trained(n: int = C, **options: object) -> nn.Module:
    return randomize_(nn.BatchNorm2d(n, **options))


# The mode


class Dynamic(nn.Module):
    """As once-for-all's DynamicBatchNorm2d: part of the channels."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.bn = trained(**options)

    def forward(self, x: Tensor) -> Tensor:
        b, c = self.bn, x.size(1)
        training = b.training or not b.track_running_stats
        vectors = b.running_mean[:c], b.running_var[:c], b.weight[:c], b.bias[:c]
        return F.batch_norm(x, *vectors, training, 0.1, b.eps)


def by_train(net: nn.Module) -> None:
    net.train()


def by_training_the_layer(net: nn.Module) -> None:
    net.bn.train(True)


def by_assignment(net: nn.Module) -> None:
    net.bn.training = True


def by_setattr_of_all(net: nn.Module) -> None:
    for module in net.modules():
        setattr(module, "training", True)  # noqa: B010


def by_apply(net: nn.Module) -> None:
    net.apply(lambda module: nn.Module.train(module))


WAYS = [by_train, by_training_the_layer, by_assignment, by_setattr_of_all, by_apply]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("freeze_affine", [True, False])
def test_code_that_hands_over_the_mode_does_not_move_the_statistics(freeze_affine, way):
    net, x = Dynamic(), torch.randn(4, 6, 5, 5) * 3 + 1
    expected = net.eval()(x)
    convert_frozen_bn(net, freeze_affine=freeze_affine)
    for twin in (net, copy.deepcopy(net)):
        way(twin)
        before = snapshot(twin)
        torch.testing.assert_close(twin(x), expected)
        assert_same_bits(snapshot(twin), before)


def test_nor_does_a_flag_that_the_live_layer_had():
    net, x = Dynamic(), torch.randn(IMAGE)
    expected = net.eval()(x)
    net.bn.track_running_stats = False
    convert_frozen_bn(net).train()
    torch.testing.assert_close(net(x), expected)
    assert unfreeze_bn(net).bn.track_running_stats is False


def test_a_layer_made_by_hand_is_never_in_training():
    layer = FrozenBatchNorm2d(C)
    assert layer.training is False
    assert layer.train().training is False
    assert nn.Sequential(layer).train()[0].training is False


def test_what_revives_live_layers_does_not_find_frozen_ones():
    net = convert_frozen_bn(nn.Sequential(trained()))
    before = snapshot(net)
    update_bn([torch.randn(IMAGE)], net)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(net)[0]) is FrozenBatchNorm2d
    assert_same_bits(snapshot(net), before)


# Half precision

NARROW = {
    "half": lambda net: net.half(),
    "bfloat16": lambda net: net.bfloat16(),
    "to(float16)": lambda net: net.to(torch.float16),
    "to(cpu, float16)": lambda net: net.to("cpu", torch.float16, non_blocking=True),
    "to(tensor)": lambda net: net.to(torch.zeros((), dtype=torch.bfloat16)),
    "type": lambda net: net.type(torch.float16),
    "twice": lambda net: net.half().bfloat16(),
}


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
def test_statistics_of_raw_pixels_and_of_dead_channels_survive_half_precision(narrow):
    net = nn.Sequential(nn.Conv2d(3, C, 1), trained())
    net[1].running_var[:2] = torch.tensor([1e5, 1e-9])
    net[1].running_mean[0] = 1e5
    convert_frozen_bn(net)
    before = snapshot(net[1])
    narrow(net)
    assert net[0].weight.dtype.itemsize == 2
    assert_same_bits(snapshot(net[1]), before)
    x = torch.randn(IMAGE).half()
    expected = F.batch_norm(x.float(), *(before[n] for n in VECTORS[2:] + VECTORS[:2])).half()
    torch.testing.assert_close(net[1](x), expected)


@pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
def test_a_trained_affine_follows_the_network(narrow):
    net = narrow(convert_frozen_bn(nn.Sequential(trained()), freeze_affine=False))
    assert [p.dtype.itemsize for p in net.parameters()] == [2, 2]
    assert {b.dtype for b in net.buffers()} == {torch.float32}


def test_double_widens_and_float_after_it_narrows():
    net = convert_frozen_bn(nn.Sequential(trained()))
    assert {v.dtype for v in net.double().state_dict().values()} == {torch.float64}
    assert {v.dtype for v in copy.deepcopy(net).half().state_dict().values()} == {torch.float32}
    assert {v.dtype for v in net.float().state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_that_is_asked_for_is_obeyed(dtype):
    layer = FrozenBatchNorm2d(C, dtype=dtype)
    assert {v.dtype for v in layer.state_dict().values()} == {dtype}
    assert {v.dtype for v in layer.to(dtype).state_dict().values()} == {dtype}
    assert {v.dtype for v in layer.float().state_dict().values()} == {torch.float32}
    assert {v.dtype for v in layer.to(dtype).state_dict().values()} == {
        dtype if dtype.itemsize >= 4 else torch.float32
    }


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_checkpoints_of_either_precision_load(dtype, assign):
    """... and state_dict says what is there."""
    net = convert_frozen_bn(nn.Sequential(trained())).half()
    state = {name: value.to(dtype) for name, value in snapshot(net).items()}
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    net.load_state_dict(torch.load(stream), strict=True, assign=assign)
    held = dtype if assign else torch.float32
    assert_same_bits(snapshot(net), {name: value.to(held) for name, value in state.items()})


def test_moves_that_change_no_dtype_do_what_they_say():
    layer = FrozenBatchNorm2d(C)
    assert layer.to("meta", torch.float16).running_var.is_meta
    assert layer.running_var.dtype == torch.float32
    assert layer.to_empty(device="cpu").running_var.device.type == "cpu"
    randomize_(layer)
    before = snapshot(layer)
    layer.share_memory()
    assert layer.running_var.is_shared()
    assert layer.half().running_var.is_shared()
    layer.to(memory_format=torch.channels_last)
    assert_same_bits(snapshot(layer), before)


@EVERY_CONVERSION
def test_networks_in_half_precision_compute_with_exact_statistics(options):
    net, exact = network(**options), network(**options)
    with torch.no_grad():
        expected = exact(images())
        actual = net.bfloat16()(images().bfloat16())
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


# Memory order


def every_order(*shape: int) -> dict[str, Tensor]:
    x = torch.randn(shape, generator=make_generator(0))
    dims = [*range(len(shape))]
    orders = {
        "contiguous": x,
        "transposed": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "batch last": x.permute(*dims[1:], 0).contiguous().permute(-1, *dims[:-1]),
        "channels behind": x.permute(0, *dims[2:], 1).contiguous().permute(0, -1, *dims[1:-1]),
        "sliced": torch.cat([x, x], -1)[..., : shape[-1]],
        "half of the channels": torch.cat([x, x], 1)[:, : shape[1]],
        "expanded": x[:1].expand(shape),
        "reversed": x.permute(*reversed(dims)).contiguous().permute(*reversed(dims)),
    }
    if len(shape) == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        orders |= {"channels_last": last, "half of channels_last": last.repeat(1, 2, 1, 1)[:, :C]}
    if len(shape) == 5:
        orders["channels_last_3d"] = x.contiguous(memory_format=torch.channels_last_3d)
    return orders


SHAPES = {
    (6, C): (FrozenBatchNorm1d, nn.BatchNorm1d),
    (3, C, 6): (FrozenBatchNorm1d, nn.BatchNorm1d),
    (2, C, 3, 4): (FrozenBatchNorm2d, nn.BatchNorm2d),
    (2, C, 2, 3, 4): (FrozenBatchNorm3d, nn.BatchNorm3d),
}
CASES = [(shape, order) for shape in SHAPES for order in every_order(*shape)]


def plainly(layer: nn.Module):
    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        vectors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        return reference.frozen_batch_norm(x, *vectors, residual=residual)

    return run


@pytest.mark.covering(2)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("freeze_affine", [True, False])
@pytest.mark.parametrize(("shape", "order"), CASES, ids=str)
def test_the_memory_order_is_that_of_batch_norm(shape, order, freeze_affine, residual, device):
    frozen_class, live_class = SHAPES[shape]
    live = randomize_(live_class(C)).eval()
    layer = frozen_class(C, freeze_affine=freeze_affine)
    layer.load_state_dict(live.state_dict())
    r = torch.randn(shape) if residual else None
    results = []
    for run in (live, layer, plainly(layer)):
        x = every_order(*shape)[order].detach().requires_grad_()
        y = run(x) if run is live or r is None else run(x, r)
        (gradient,) = torch.autograd.grad(y, x, torch.ones(shape))
        results.append((y.stride(), gradient.stride(), y.detach()))
    (stride, _, expected), *ours = results
    assert ours[0][0] == ours[0][1]  # the gradient of the module's input is in the same order
    for y_stride, _, y in ours:
        assert y_stride == output_strides(every_order(*shape)[order])
        if device in ("cpu", "portable", "avx2", "avx512", "avx512_bf16"):  # CUDA's keeps the order
            assert y_stride == stride
        torch.testing.assert_close(y, expected if r is None else expected + r)


@EVERY_CONVERSION
def test_a_view_of_the_output_of_a_network(options):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.act = nn.BatchNorm1d(6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:  # [N, L, C]
            return self.act(self.bn(x.transpose(1, 2))).view(len(x), -1)

    net, x = randomize_(Head()).eval(), torch.randn(3, 5, 6)
    expected = net(x)
    torch.testing.assert_close(convert_frozen_bn(net, **options)(x), expected)


def test_in_place_is_in_place_in_any_order():
    layer = FrozenBatchNorm1d(6, inplace=True)
    x = torch.randn(3, 5, 6).transpose(1, 2)
    assert layer(x) is x


# Optimizer groups


def test_norm_parameters_are_those_that_code_by_isinstance_found_before():
    utils = pytest.importorskip("torchvision.ops._utils")
    net = nn.Sequential(
        nn.Conv2d(3, C, 3), trained(), nn.GroupNorm(2, C), nn.LayerNorm(4), trained(affine=False)
    )
    net[2].bias.requires_grad_(False)
    shared = nn.Sequential(net, net[1])
    norm, other = utils.split_normalization_params(shared)
    assert norm_parameters(shared) == norm and len(norm) == 5
    convert_frozen_bn(shared, freeze_affine=False)
    assert len(utils.split_normalization_params(shared)[0]) < 5
    assert [id(p) for p in norm_parameters(shared)] == [id(p) for p in norm]
    assert not {*map(id, other)} & {*map(id, norm_parameters(shared))}


def test_norm_parameters_of_a_frozen_affine_are_none():
    assert norm_parameters(convert_frozen_bn(nn.Sequential(nn.Conv2d(3, C, 3), trained()))) == []


def test_groups_that_were_made_before_go_on():
    net = nn.Sequential(nn.Conv2d(3, C, 3), trained())
    groups = [{"params": norm_parameters(net), "weight_decay": 0.0}]
    groups.append({"params": list(net[0].parameters()), "weight_decay": 0.1})
    optimizer = torch.optim.SGD(groups, lr=0.1)
    convert_frozen_bn(net, freeze_affine=False)
    assert {*map(id, net.parameters())} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }
    before = net[1].weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(net[1].weight, before)


# Wrappers


@EVERY_CONVERSION
def test_a_forward_that_is_bound_anew(options):
    """As wrappers of mixed precision do, on taking themselves away: from whatever was there."""
    net = network(**options)
    block = net[3]
    expected = outputs_and_gradients(net, images())
    own = block.forward
    block.forward = MethodType(getattr(own, "__func__", own), block)
    for bound in (net, copy.deepcopy(net)):
        assert_close_in_norm(outputs_and_gradients(bound, images()), expected, 1e-5)
    unfreeze_bn(net)
    assert not isinstance(getattr(vars(block).get("forward"), "__func__", None), type(own))


def test_a_live_layer_whose_forward_was_bound_anew_is_converted():
    layer = trained().eval()
    layer.forward = MethodType(nn.BatchNorm2d.forward, layer)
    x = torch.randn(IMAGE)
    expected = layer(x)
    frozen = convert_frozen_bn(layer)
    assert "forward" not in vars(frozen)
    torch.testing.assert_close(frozen.train()(x), expected)


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fold_conv": True}], ids=str)
def test_accelerate_takes_its_wrapper_away(options):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    net = network(**options)
    expected = net(images())
    prepared = accelerator.prepare(net)
    assert prepared(images()).dtype == torch.float32
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(unwrapped(images()), expected)


# What the summary says


class Lone(nn.Module):
    """Alone in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList([trained()])

    def forward(self, x: Tensor) -> Tensor:
        return self.bns[0](x)


class LoneInADict(Lone):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleDict({"a": trained()})

    def forward(self, x: Tensor) -> Tensor:
        return self.bns["a"](x)


@pytest.mark.parametrize("kind", [Lone, LoneInADict])
def test_the_reason_of_a_lone_layer(kind):
    text = summary(convert_frozen_bn(kind(), fuse=True))
    assert "frozen, not fused: nothing next to it to merge with" in text


def test_a_counter_of_a_profiler_on_a_live_layer():
    net = nn.Sequential(trained())
    net[0].register_buffer("total_ops", torch.zeros(1))
    before = snapshot(net)
    assert messages(lambda: convert_frozen_bn(net)) == []
    assert type(net[0]) is FrozenBatchNorm2d
    assert_same_bits(snapshot(unfreeze_bn(net)), before)
