"""convert_frozen_bn(fold_conv=True): convolutions that carry their batch normalization. On the CPU:
without an activation no kernel runs; test_fuse.py has those with one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close_in_norm, fates, outputs_and_gradients, randomize_
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from frozen_bn import convert_frozen_bn
from frozen_bn.fusion import fold

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def pair(kind: type[nn.Module], rank: int, affine: bool = True, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    conv = kind(4, 8, 3, **options)
    return randomize_(nn.Sequential(conv, NORMS[rank](8, affine=affine, eps=0.01)))


def simple(**options: bool) -> nn.Sequential:
    return convert_frozen_bn(pair(nn.Conv2d, 2), **(options or {"fuse": False}))


def assert_folds(
    net: nn.Module, x: Tensor, freeze_affine: bool = True, tolerance: float = 1e-5
) -> nn.Module:
    plain = convert_frozen_bn(net, freeze_affine=freeze_affine, fuse=False)
    folded = convert_frozen_bn(copy.deepcopy(plain), fold_conv=True)
    assert fates(folded)["1"].folded_into == "0"
    expected = outputs_and_gradients(plain, x)
    assert_close_in_norm(outputs_and_gradients(folded, x), expected, tolerance)
    with torch.no_grad():
        assert_close_in_norm({"output": folded(x)}, {"output": plain(x)}, tolerance)
    return folded


OPTIONS = [
    {},
    {"bias": False},
    {"groups": 2},
    {"groups": 4},
    {"dilation": 2, "padding": 1},
    {"stride": 2, "padding": 1},
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("freeze_affine", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kinds", [CONVOLUTIONS, TRANSPOSED], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kinds_of_convolution(dtype, kinds, rank, options, freeze_affine):
    net = pair(kinds[rank], rank, **options).to(dtype)
    x = torch.randn([2, 4] + [6] * rank, dtype=dtype)
    assert_folds(net, x, freeze_affine, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 1)], ids=str)
def test_padding(padding, mode):
    assert_folds(pair(nn.Conv2d, 2, padding=padding, padding_mode=mode), torch.randn(2, 4, 6, 7))


def test_output_padding_of_a_transposed_convolution():
    net = pair(nn.ConvTranspose2d, 2, stride=2, padding=1, output_padding=1)
    assert_folds(net, torch.randn(2, 4, 5, 5))


def test_without_affine():
    assert_folds(pair(nn.Conv2d, 2, affine=False), torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_gradients_are_exact(kind):
    net = randomize_(nn.Sequential(kind(2, 4, 2, groups=2), nn.BatchNorm2d(4)))
    net = convert_frozen_bn(net.double(), freeze_affine=False, fold_conv=True)
    state = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    assert [*state] == ["0.weight", "0.bias", "1.weight", "1.bias"]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        for name, value in zip(state, values, strict=True):
            module = net.get_submodule(name.split(".")[0])
            module._parameters[name.split(".")[1]] = value
        return net(x)

    inputs = (torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True), *state.values())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("freeze_affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_statistics_may_be_written_to_before_the_backward_pass(bias, freeze_affine):
    """DistributedDataParallel does, where there are two forwards before one backward."""
    net = convert_frozen_bn(
        pair(nn.Conv2d, 2, bias=bias), freeze_affine=freeze_affine, fold_conv=True
    )
    x = torch.randn(2, 4, 6, 6)
    expected = torch.autograd.grad(net(x).square().sum(), [*net.parameters()])
    output = net(x)
    for statistic in (net[1].running_mean, net[1].running_var):
        statistic.add_(1.0)
    actual = torch.autograd.grad(output.square().sum(), [*net.parameters()])
    torch.testing.assert_close(actual, expected)


class Biases(TorchDispatchMode):
    """Of the convolutions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor | None] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("freeze_affine", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_the_bias_is_added_in_the_pass_of_the_activation(kind, activation, freeze_affine):
    net = nn.Sequential(*pair(kind, 2), activation())
    x = torch.randn(2, 4, 9, 8)
    folded = assert_folds(net, x, freeze_affine)
    with Biases() as biases:
        folded(x)
    assert biases.seen == [None]


def test_without_a_pass_to_come_it_stays_the_convolutions():
    with Biases() as biases:
        simple(fold_conv=True)(torch.randn(2, 4, 9, 8))
    (bias,) = biases.seen
    assert bias is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_folded_in_float32_and_rounded_once(dtype):
    net = simple(fold_conv=True)
    net[0].to(dtype)
    weight, bias = fold.fold(net[0], net[1])
    exact = copy.deepcopy(net).double()
    exact_weight, exact_bias = fold.fold(exact[0], exact[1])
    assert weight.dtype == dtype and bias.dtype == torch.float32
    torch.testing.assert_close(weight, exact_weight.float().to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(bias.to(dtype), exact_bias.float().to(dtype), rtol=0, atol=0)
    assert net(torch.randn(2, 4, 6, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("options", [{"fuse": True}, {"fold_conv": True}], ids=str)
def test_an_input_without_a_batch_is_refused_as_before(options):
    messages = []
    for net in (simple(), simple(**options)):
        with pytest.raises(RuntimeError) as error:
            net(torch.randn(4, 6, 6))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "4 dimensions" in messages[0]


# Nothing is kept (test_stale.py has all ways to write to what is folded)


def test_a_parametrized_weight_that_is_made_anew_at_every_call():
    net = simple(fold_conv=True)
    parametrizations.weight_norm(net[0])
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(net(x), net[1](net[0](x)), rtol=1e-4, atol=1e-5)
            net[0].parametrizations.weight.original0.mul_(1.5)


def test_calls_without_gradients_do_not_take_gradients_away():
    net, x = simple(fold_conv=True), torch.randn(2, 4, 6, 6)
    for _ in range(2):
        with torch.no_grad():
            assert not net(x).requires_grad
        expected = outputs_and_gradients(simple(), x)
        assert_close_in_norm(outputs_and_gradients(net, x), expected, 1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_backward_pass_after_a_call_in_another_mode(mode):
    net, x = simple(fold_conv=True).requires_grad_(False), torch.randn(2, 4, 6, 6)
    with mode():
        net(x)
    x.requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None


def test_fake_tensors_leave_nothing_behind():
    net, x = simple(fold_conv=True), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = simple()(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            net(mode.from_tensor(x))
        assert type(net(x)) is Tensor
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("trained", ["all", "input", "nothing"])
def test_the_weight_is_only_folded_where_it_is_trained_or_no_pass_follows(trained, activation):
    """Else the pass that follows does the work of the layer too, and the weight is not read."""
    net = nn.Sequential(*pair(nn.Conv2d, 2), activation())
    net.requires_grad_(trained == "all")
    x = torch.randn(2, 4, 9, 8, requires_grad=trained == "input")
    plain = convert_frozen_bn(net)
    folded = convert_frozen_bn(copy.deepcopy(plain), fold_conv=True)
    with Weights() as weights, torch.set_grad_enabled(trained != "nothing"):
        output = folded(x)
    torch.testing.assert_close(output, plain(x), rtol=1e-4, atol=1e-5)
    assert weights.seen == ([] if trained != "all" else [(8, 4, 3, 3)])


class Weights(TorchDispatchMode):
    """The shapes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mul.Tensor and args[0].dim() == 4:
            self.seen.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_a_bias_that_is_added_later_is_not_rounded_to_half_precision():
    """It comes with an activation, whose kernel takes any dtype."""
    net = nn.Sequential(*pair(nn.Conv2d, 2), nn.ReLU())
    folded = convert_frozen_bn(net, fold_conv=True)
    folded[0].bfloat16()
    x = torch.randn(2, 4, 6, 6).bfloat16()
    output, bias = fold.convolve(folded[0], folded[1].statistics(), x, True)
    assert (output.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    assert folded(x).dtype == torch.bfloat16


# What is not folded


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class ReadTwice(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        x = self[0](input)
        return self[1](x) + x


class CalledTwice(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return self[1](self[0](input)) + self[0](input)


def subclass(net: nn.Module) -> None:
    net[0] = Doubled(4, 8, 3)


def parametrized(net: nn.Module) -> None:
    parametrizations.weight_norm(net[0])


def own_forward(net: nn.Module) -> None:
    net[0].forward = lambda x: nn.Conv2d.forward(net[0], x) * 2


def hooked(net: nn.Module) -> None:
    net[0].register_forward_hook(lambda module, args, output: output * 2)


def of_class(kind: type[nn.Module]) -> Callable[[nn.Module], None]:
    return lambda net: setattr(net, "__class__", kind)


@pytest.mark.parametrize(
    "change",
    [subclass, parametrized, own_forward, hooked, of_class(ReadTwice)],
)
def test_what_is_not_a_convolution_of_its_own_is_not_folded(change):
    net = pair(nn.Conv2d, 2)
    change(net)
    convert_frozen_bn(net)
    x = torch.randn(2, 4, 6, 6)
    expected = outputs_and_gradients(net, x)
    convert_frozen_bn(net, fold_conv=True)
    assert fates(net)["1"].folded_into == ""
    assert_close_in_norm(outputs_and_gradients(net, x), expected, 1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_channels_or_ranks_that_do_not_fit_fail_as_before(rank):
    messages = []
    for options in ({}, {"fold_conv": True}):
        net = randomize_(nn.Sequential(nn.Conv2d(4, 8, 3), NORMS[rank](6 if rank == 2 else 8)))
        with pytest.raises(RuntimeError) as error:
            convert_frozen_bn(net, **options)(torch.randn(2, 4, 6, 6))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_convolution_that_is_called_twice_is_folded_where_the_layer_follows():
    net, x = pair(nn.Conv2d, 2), torch.randn(2, 4, 6, 6)
    net.__class__ = CalledTwice
    convert_frozen_bn(net, fuse=False)
    expected = outputs_and_gradients(net, x)
    convert_frozen_bn(net, fold_conv=True)
    assert fates(net, x)["1"].folded_into == "0"
    assert_close_in_norm(outputs_and_gradients(net, x), expected, 1e-5)
