"""Fused modules: what happens to them later, and what runs them in another way. On the
CPU: which kernels run is up to test_fuse.py."""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable

import helpers
import pytest
import torch
from helpers import (
    assert_close_in_norm,
    assert_same_bits,
    fates,
    merged,
    outputs_and_gradients,
    randomize_,
    snapshot,
)
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from frozen_bn import convert_frozen_bn, unfreeze_bn

C = 4
IMAGE = (2, C, 5, 6)
BOTH = pytest.mark.parametrize("options", [{"fuse": True}, {"fold_conv": True}], ids=str)


class Block(nn.Module):
    """A residual block with all kinds of merges."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.branch = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))
        self.relu = nn.ReLU(inplace=True)
        self.act = nn.LeakyReLU(0.2)
        self.gain, self.nonlinearity, self.sizes = 1.0, torch.sigmoid, (1, 1)

    def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.branch(x)
        y = self.relu(y) * self.gain * times * self.sizes[0]
        return y + self.nonlinearity(x)


MERGED = {"bn1": "leaky_relu", "bn2": "two branches + relu", "branch.1": "two branches + relu"}


def network(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    options = options or {"fuse": False}
    return convert_frozen_bn(randomize_(nn.Sequential(Block(), Block())), **options)


def assert_same(net: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    torch.manual_seed(2)
    x = torch.randn(IMAGE, dtype=net[0].conv1.weight.dtype)
    expected = outputs_and_gradients(other, x)
    assert_close_in_norm(outputs_and_gradients(net, x), expected, tolerance)
    with torch.no_grad():
        assert_close_in_norm({"output": net(x)}, {"output": other(x)}, tolerance)


def runs_fused(block: nn.Module) -> bool:
    x = torch.randn(IMAGE, dtype=block.conv1.weight.dtype)
    return helpers.runs_fused(block.bn1, lambda: block(x))


@BOTH
def test_runs_fused(options):
    net = network(**options)
    assert merged(net[0]) == MERGED
    assert runs_fused(net[0]) and runs_fused(net[0].eval())
    assert not runs_fused(network()[0])


# Hooks


def add_hook(kind: str, module: nn.Module, calls: list[str]) -> None:
    def hook(*_: object) -> None:
        calls.append(kind)

    getattr(module, f"register_{kind}")(hook)


PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bn": lambda block: block.bn1,
    "activation": lambda block: block.act,
    "conv": lambda block: block.conv1,
    "branch bn": lambda block: block.branch[1],
    "Sequential looked into": lambda block: block.branch,
    "fused module": lambda block: block,
}
HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.covering(2)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("part", PARTS)
@BOTH
def test_hooks_are_called_as_often_as_without_fusion(options, part, kind, before):
    counted = []
    for fused in (False, True):
        calls: list[str] = []
        net = network()
        if before:
            add_hook(kind, PARTS[part](net[0]), calls)
        if fused:
            convert_frozen_bn(net, **options)
        if not before:
            net(torch.randn(IMAGE))  # it ran fused at first
            calls.clear()
            add_hook(kind, PARTS[part](net[0]), calls)
        outputs_and_gradients(net, torch.randn(IMAGE))
        counted.append(calls)
        if fused and not before:
            assert runs_fused(net[1])
    assert counted[0] == counted[1] and counted[0]


@BOTH
def test_a_hook_that_was_removed_lets_it_run_fused_again(options):
    net = network(**options)
    handle = net[0].bn1.register_forward_hook(lambda *_: None)
    assert not runs_fused(net[0])
    handle.remove()
    assert runs_fused(net[0])


def test_global_hooks_see_every_module():
    net, seen = network(fuse=True), []
    hook = torch.nn.modules.module.register_module_forward_hook
    handle = hook(lambda module, args, output: seen.append(module))
    try:
        net(torch.randn(IMAGE))
    finally:
        handle.remove()
    assert {*seen} == {module for module in net.modules() if module is not net} | {net}


def test_a_hook_may_replace_the_output_of_the_batch_norm():
    net = network(fuse=True)
    net[0].bn1.register_forward_hook(lambda module, args, output: output * 0)
    plain = network()
    plain[0].bn1.register_forward_hook(lambda module, args, output: output * 0)
    assert_same(net, plain)


# Changes after fusion


def replace_forward(net: nn.Module) -> None:
    net[0].conv1.forward = types.MethodType(lambda self, x: x * 3, net[0].conv1)


def replace_parameter(net: nn.Module) -> None:
    net[0].conv1.weight = nn.Parameter(torch.ones_like(net[0].conv1.weight))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "flag": lambda net: setattr(net[0], "gain", 3.0),
    "function": lambda net: setattr(net[0], "nonlinearity", torch.tanh),
    "tuple": lambda net: setattr(net[0], "sizes", (2, 2)),
    "activation": lambda net: setattr(net[0], "relu", nn.GELU()),
    "slope": lambda net: setattr(net[0].act, "negative_slope", 0.7),
    "the layer's own activation": lambda net: setattr(net[0].bn1, "activation", "silu"),
    "eps": lambda net: setattr(net[0].bn1, "eps", 0.5),
    "conv": lambda net: setattr(net[0], "conv1", copy.deepcopy(net[1].conv2)),
    "bn": lambda net: setattr(net[0], "bn1", copy.deepcopy(net[1].bn2)),
    "child of the Sequential": lambda net: net[0].branch.append(nn.Sigmoid()),
    "in the Sequential": lambda net: net[0].branch.__setitem__(1, nn.Identity()),
    "forward of the conv": replace_forward,
    "parameter": replace_parameter,
    "weight norm": lambda net: nn.utils.parametrizations.weight_norm(net[0].conv1),
    "pruning": lambda net: prune.l1_unstructured(net[0].conv1, "weight", 0.5),
    "padding": lambda net: setattr(net[0].conv1, "padding_mode", "zeros"),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@BOTH
def test_changes(options, before, change):
    plain, net = network(), network()
    CHANGES[change](plain)
    if before:
        CHANGES[change](net)
    convert_frozen_bn(net, **options)
    if not before:
        net(torch.randn(IMAGE))
        CHANGES[change](net)
    assert_same(net, plain)


# Copies, state, and undoing


def saved_and_loaded(net: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved_and_loaded]
)
@pytest.mark.parametrize("called", [True, False])
@BOTH
def test_copies_are_fused_and_on_their_own(options, called, clone):
    net, plain = network(**options), network()
    if called:
        net(torch.randn(IMAGE))
    other = clone(net)
    assert runs_fused(other[0])
    assert_same(other, plain)
    with torch.no_grad():
        net[0].conv1.weight.zero_()
        net[0].bn1.running_mean.zero_()
    assert_same(other, plain)


@BOTH
def test_state_parameters_and_modules_are_those_of_the_plain_model(options):
    net = network()
    before = snapshot(net), [*map(id, net.parameters())], [*map(id, net.modules())]
    net[0].conv2.weight.requires_grad_(False)
    convert_frozen_bn(net, **options)
    after = snapshot(net), [*map(id, net.parameters())], [*map(id, net.modules())]
    assert_same_bits(after[0], before[0])
    assert after[1:] == before[1:]
    assert not net[0].conv2.weight.requires_grad
    assert_same_bits(dict(net.named_buffers()), dict(network().named_buffers()))


@BOTH
def test_loading_a_state_dict(options):
    net, plain = network(**options), network()
    with torch.no_grad():
        net(torch.randn(IMAGE))  # folded weights may be kept
    state = {name: torch.rand_like(value) + 0.5 for name, value in plain.state_dict().items()}
    net.load_state_dict(state, strict=True)
    plain.load_state_dict(state, strict=True)
    assert_same(net, plain)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda net: net.double(), 1e-9),
        (lambda net: net.bfloat16(), 0.05),
        (lambda net: net.to(memory_format=torch.channels_last), 1e-5),
        (lambda net: net.eval(), 1e-5),
    ],
)
@BOTH
def test_conversions_of_the_model(options, change, tolerance):
    net = network(**options)
    with torch.no_grad():
        net(torch.randn(IMAGE))
    assert_same(change(net), change(network()), tolerance)
    assert runs_fused(net[0])


def test_freezing_again_changes_the_way_it_is_fused():
    net, plain = network(), network()
    for options in ({"fuse": True}, {"fold_conv": True}, {}, {"fuse": True}):
        assert convert_frozen_bn(net, **options) is net
        assert merged(net[0]) == MERGED and runs_fused(net[0])
        assert bool(fates(net[0])["bn1"].folded_into) == ("fold_conv" in options)
        assert_same(net, plain)


@BOTH
def test_unfreezing_undoes_it(options):
    net = randomize_(nn.Sequential(Block(), Block())).eval()
    before, x = snapshot(net), torch.randn(IMAGE)
    expected = net(x)
    modules = [*net.modules()]
    unfreeze_bn(convert_frozen_bn(net, **options))
    assert [type(net[0]), type(net[0].branch)] == [Block, nn.Sequential]
    assert [*net.modules()] == modules
    assert_same_bits(snapshot(net), before)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("part", ["0", "0.branch", "1"])
@BOTH
def test_unfreezing_a_part(options, part):
    net, plain = network(**options).eval(), network().eval()
    for module in (net, plain):
        unfreeze_bn(module.get_submodule(part))
    net.eval(), plain.eval()
    assert_same(net, plain)


# Other ways to run it


@BOTH
@pytest.mark.parametrize("shape", [(0, C, 5, 6), (2, C, 1, 1)])
def test_empty_and_tiny_inputs(options, shape):
    x = torch.randn(shape)
    assert_close_in_norm(
        outputs_and_gradients(network(**options), x), outputs_and_gradients(network(), x), 1e-5
    )


@BOTH
def test_arguments_in_every_spelling(options):
    net, plain, x = network(**options)[0], network()[0], torch.randn(IMAGE)
    for args, kwargs in [((x, 2.0), {}), ((x,), {"times": 2.0}), ((), {"x": x}), ((x, 1.0), {})]:
        torch.testing.assert_close(net(*args, **kwargs), plain(*args, **kwargs))
    with pytest.raises(TypeError, match="missing"):
        net()
    with pytest.raises(TypeError, match="positional"):
        net(x, 1.0, 2.0)


@BOTH
def test_channels_last_is_kept(options):
    net = network(**options).to(memory_format=torch.channels_last)
    x = torch.randn(IMAGE).to(memory_format=torch.channels_last)
    assert net[0](x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reentrant", [True, False])
@BOTH
def test_checkpointing(options, reentrant):
    def through(net: nn.Module) -> nn.Module:
        outer = nn.Sequential(net[0], net[1])
        outer.forward = lambda x: checkpoint(net, x, use_reentrant=reentrant)
        return outer

    assert_same(through(network(**options)), through(network()))


@BOTH
def test_autocast(options):
    net, plain, x = network(**options), network(), torch.randn(IMAGE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = outputs_and_gradients(net, x), outputs_and_gradients(plain, x)
    assert_close_in_norm(a, b, 0.1)


@BOTH
def test_inference_mode_then_training(options):
    net, plain = network(**options), network()
    for module in (net, plain):
        module.requires_grad_(False)
        with torch.inference_mode():
            module(torch.randn(IMAGE))
    assert_same(net, plain)


@BOTH
def test_transforms(options):
    net, plain = network(**options), network()
    x = torch.randn(3, 1, *IMAGE[1:])

    def loss(module: nn.Module) -> Callable[..., Tensor]:
        return lambda p, x: torch.func.functional_call(module, p, (x,)).square().sum()

    for module in (net, plain):
        module.state = {name: p.detach() for name, p in module.named_parameters()}
    actual = torch.func.vmap(torch.func.grad(loss(net)), (None, 0))(net.state, x)
    expected = torch.func.vmap(torch.func.grad(loss(plain)), (None, 0))(plain.state, x)
    assert_close_in_norm(actual, expected, 1e-5)


@BOTH
def test_tracers(options):
    net, plain, x = network(**options), network(), torch.randn(IMAGE)
    expected = plain(x)
    torch.testing.assert_close(fx.symbolic_trace(net)(x), expected)
    torch.testing.assert_close(torch.jit.trace(net, x)(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)


@BOTH
def test_compile(options):
    net, plain, x = network(**options), network(), torch.randn(IMAGE)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    actual, expected = outputs_and_gradients(compiled, x), outputs_and_gradients(plain, x)
    torch.testing.assert_close([*actual.values()], [*expected.values()])


# Memory


@BOTH
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_what_is_saved_for_the_backward_pass(options, activation):
    """The inputs of the convolutions, and one bit an element."""
    net = nn.Sequential()
    for _ in range(3):
        net.extend([nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), activation()])
    convert_frozen_bn(randomize_(net), **options)
    x = torch.randn(2, C, 16, 16)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    large = [t.untyped_storage().nbytes() for t in saved.values() if t.numel() >= x.numel() // 8]
    inputs, masks = 3 * [x.nbytes], 3 * [x.numel() // 8]
    assert sorted(large) == sorted(inputs + masks)
