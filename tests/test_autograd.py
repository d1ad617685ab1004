"""Gradients of frozen_batch_norm: what they are, what they cost, and where they have to work."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fresh import CHOOSES, run_fresh
from helpers import ACTIVATIONS, PIECEWISE_LINEAR, SMOOTH, randomize_
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from frozen_bn import FrozenBatchNorm2d, frozen_batch_norm, reference

pytestmark = pytest.mark.usefixtures("device", "node")

NAMES = ("input", "weight", "bias", "residual")
COMBINATIONS = [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)]
AFFINE = [(), ("weight",), ("bias",), ("weight", "bias")]
C = 3
SHAPE = (2, C, 2, 3)

trainables = pytest.mark.parametrize("trainable", COMBINATIONS, ids="+".join)
affines = pytest.mark.parametrize("affine", AFFINE, ids=lambda a: "+".join(a) or "frozen")
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def make_tensors(
    trainable: tuple[str, ...] = NAMES, shape: tuple[int, ...] = SHAPE, dtype=torch.float64
) -> dict[str, Tensor]:
    """Every tensor argument, those in ``trainable`` as leaves that require grad."""
    tensors = {
        "input": 3 * torch.randn(shape, dtype=dtype),
        "running_mean": torch.randn(shape[1], dtype=dtype),
        "running_var": torch.rand(shape[1], dtype=dtype) + 0.5,
        "weight": torch.rand(shape[1], dtype=dtype) + 0.5,
        "bias": torch.randn(shape[1], dtype=dtype),
        "residual": torch.randn(shape, dtype=dtype),
    }
    return {name: t.requires_grad_(name in trainable) for name, t in tensors.items()}


def function_of(trainable: tuple[str, ...], tensors: dict[str, Tensor], **options: object):
    """frozen_batch_norm as a function of the trainable tensors, and those tensors."""

    def function(*leaves: Tensor) -> Tensor:
        arguments = tensors | dict(zip(trainable, leaves, strict=True))
        return frozen_batch_norm(**arguments, **options)

    return function, tuple(tensors[name] for name in trainable)


# ---- What the gradients are


@pytest.mark.covering(2)
@activations
@trainables
def test_gradcheck(trainable, activation):
    function, leaves = function_of(trainable, make_tensors(trainable), activation=activation)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.covering(2)
@activations
@trainables
def test_gradgradcheck(trainable, activation):
    function, leaves = function_of(trainable, make_tensors(trainable), activation=activation)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.covering(2)
@pytest.mark.long_emulated
@pytest.mark.parametrize("view", ["whole", "sliced"])
@activations
@affines
def test_inplace_gradients_of_a_non_leaf(affine, activation, view):
    """First and second derivatives, also through a view with gaps whose base is used later."""
    tensors = make_tensors(("input", "residual", *affine))
    options = {"activation": activation, "inplace": True}

    def function(input: Tensor, residual: Tensor, *vectors: Tensor) -> Tensor:
        base = F.pad(input, (1, 2, 1, 0)) * 1.5
        target = base[..., 1:, 1:-2] if view == "sliced" else input * 1.5
        given = tensors | dict(zip(affine, vectors, strict=True))
        given |= {"input": target, "residual": residual}
        y = frozen_batch_norm(**given, **options)
        assert y.data_ptr() == target.data_ptr()
        return base if view == "sliced" else y

    leaves = tuple(tensors[name] for name in ("input", "residual", *affine))
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@activations
def test_inplace_with_the_input_itself_as_residual(activation):
    tensors = make_tensors(("input", "weight"))
    del tensors["residual"]

    def function(input: Tensor, weight: Tensor) -> Tensor:
        h = input * 1.5
        given = tensors | {"input": h, "weight": weight, "residual": h}
        return frozen_batch_norm(**given, activation=activation, inplace=True)

    assert torch.autograd.gradcheck(function, (tensors["input"], tensors["weight"]))


def test_inplace_output_that_another_node_needs_is_reported_by_autograd():
    tensors = make_tensors(("input",))
    h = tensors["input"].exp()  # its backward needs its output
    frozen_batch_norm(**tensors | {"input": h}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("trainable", [(), ("input", "weight")], ids=["no grad", "grad"])
def test_inplace_counts_as_one_modification(trainable):
    tensors = make_tensors(trainable)
    h = tensors["input"] * 1
    before = h._version
    assert frozen_batch_norm(**tensors | {"input": h}, inplace=True) is h
    assert h._version == before + 1


@activations
def test_batched_gradients(activation):
    """``is_grads_batched``, which vectorized Jacobians use, runs the backward under vmap."""
    function, leaves = function_of(NAMES, make_tensors(NAMES), activation=activation)
    y = function(*leaves)
    grads = torch.randn(4, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        single = torch.autograd.grad(y, leaves, g, retain_graph=True)
        torch.testing.assert_close(single, tuple(b[i] for b in batched))


@pytest.mark.long_emulated
def test_gradients_without_channels(node):
    run_fresh(  # where it once did not return
        "import torch\n"
        "from frozen_bn import frozen_batch_norm\n"
        "x, v = torch.zeros(2, 0, 3, 3, requires_grad=True), torch.ones(0)\n"
        "frozen_batch_norm(x, v, v).sum().backward()\n"
        "assert x.grad.shape == x.shape\n",
        FROZEN_BN_NODE=CHOOSES[node],
    )


@activations
@pytest.mark.parametrize("shape", [(0, C, 2, 2), (2, C, 0, 2)], ids=str)
def test_gradients_of_nothing_are_empty_or_zero(shape, activation):
    tensors = make_tensors(NAMES, shape)
    frozen_batch_norm(**tensors, activation=activation).sum().backward()
    for name in NAMES:
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name])), name


@trainables
def test_only_what_is_asked_for_is_computed(trainable):
    """First layers (no input gradient), weight only, bias only, residual only, ..."""
    tensors = make_tensors(trainable)
    frozen_batch_norm(**tensors, activation="relu").sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == set(trainable)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_nothing_requires_grad(no_grad):
    tensors = make_tensors(NAMES)
    expected = reference.frozen_batch_norm(**tensors).detach()
    with no_grad():
        y = frozen_batch_norm(**tensors)
        assert not y.requires_grad and y.grad_fn is None
        h = tensors["input"].clone()
        z = frozen_batch_norm(**tensors | {"input": h}, inplace=True)
        assert z is h and not z.requires_grad
    torch.testing.assert_close([y, z], [expected, expected])


def test_inputs_that_do_not_require_grad_make_no_node():
    assert frozen_batch_norm(**make_tensors(())).grad_fn is None


# ---- What the backward keeps


def saved_by(trainable: tuple[str, ...], with_residual: bool = True, **options: object):
    """The tensors saved for the backward, as (dtype, shape), and the arguments."""
    tensors = make_tensors(trainable, (2, C, 5, 7), torch.float32)
    if not with_residual:
        del tensors["residual"]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_batch_norm(**tensors, **options)
    return saved, tensors


def described(tensors: list[Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(t.dtype, tuple(t.shape)) for t in tensors]


def activation_sized(saved: list[Tensor], like: Tensor) -> list[Tensor]:
    """What is saved beyond channel vectors and bits."""
    return [t for t in saved if t.numel() * t.element_size() >= like.numel()]


def masks(saved: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in saved if t.dtype == torch.uint8]


COEFFICIENTS = (torch.float32, (4, C))


@pytest.mark.parametrize("trainable", [("input",), ("input", "residual")], ids="+".join)
def test_frozen_affine_keeps_channel_coefficients_only(trainable):
    saved, _ = saved_by(trainable)
    assert described(saved) == [COEFFICIENTS]


@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
@pytest.mark.parametrize("trainable", [("input",), ("input", "residual")], ids="+".join)
def test_piecewise_linear_activation_keeps_one_bit_an_element(trainable, activation):
    saved, tensors = saved_by(trainable, activation=activation)
    mask = (torch.uint8, (-(-tensors["input"].numel() // 8),))
    assert described(saved) == [COEFFICIENTS, mask]


@pytest.mark.parametrize("activation", [None, *PIECEWISE_LINEAR])
@pytest.mark.parametrize("others", [(), ("input",), ("input", "bias", "residual")], ids="+".join)
def test_trainable_weight_keeps_the_input(others, activation):
    saved, tensors = saved_by((*others, "weight"), activation=activation)
    (kept,) = activation_sized(saved, tensors["input"])
    assert kept.data_ptr() == tensors["input"].data_ptr()
    assert len(masks(saved)) == (activation is not None)


@pytest.mark.parametrize("activation", [None, *PIECEWISE_LINEAR])
@pytest.mark.parametrize("others", [(), ("input",), ("input", "residual")], ids="+".join)
def test_trainable_bias_keeps_no_activation(others, activation):
    saved, tensors = saved_by((*others, "bias"), activation=activation)
    assert activation_sized(saved, tensors["input"]) == []


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", SMOOTH)
@affines
def test_smooth_activation_keeps_its_arguments(affine, activation, with_residual):
    saved, tensors = saved_by(("input", *affine), with_residual, activation=activation)
    kept = {t.data_ptr() for t in activation_sized(saved, tensors["input"])}
    assert kept == {tensors[name].data_ptr() for name in ("input", "residual") if name in tensors}
    assert masks(saved) == []


@pytest.mark.parametrize("activation", [None, *PIECEWISE_LINEAR])
def test_inplace_keeps_no_activation_for_a_frozen_affine(activation):
    tensors = make_tensors(("input",), (2, C, 5, 7), torch.float32)
    h = tensors["input"] + 1
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_batch_norm(**tensors | {"input": h}, activation=activation, inplace=True)
    assert activation_sized(saved, h) == []


MEASURE_MEMORY = """
import torch, torch.nn.functional as F
from frozen_bn import frozen_batch_norm

def resident():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) * 1024 for l in status if l.startswith("VmRSS:"))

vectors = [torch.ones(16) for _ in range(4)]
x = torch.randn(8, 16, 200, 200)  # 20 MB
def grown(layer):
    h = x.clone().requires_grad_()
    before = resident()
    for _ in range(8):
        h = layer(h)
    return resident() - before

layers = (
    lambda h: frozen_batch_norm(h, *vectors),
    lambda h: frozen_batch_norm(h, *vectors, activation="relu"),
    lambda h: F.batch_norm(h, *vectors, training=False),
)
for layer in layers:
    layer(torch.randn(1, 16, 8, 8, requires_grad=True)).sum().backward()  # warm up
for layer in layers:
    print(grown(layer) / (x.numel() * 4))
"""


@pytest.mark.long_emulated
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_chain_of_eight_layers_holds_one_activation_where_batch_norm_holds_eight(node):
    # Let malloc give every freed tensor back at once, so that what is resident is what is held.
    # Not a fork: the C library reads that variable when it starts.
    environment = {"FROZEN_BN_NODE": CHOOSES[node], "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", MEASURE_MEMORY]
    output = subprocess.check_output(command, text=True, env=os.environ | environment)
    plain, with_relu, batch_norm = map(float, output.split())
    assert plain < 1.5  # the output
    assert with_relu < 2  # and a 32nd of it eight times
    assert batch_norm - with_relu > 6


# ---- Where they have to work


def layers(freeze_affine: bool = True, **options: object) -> nn.Sequential:
    """A convolution, a frozen batch normalization and a head, with trained-looking values."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        randomize_(FrozenBatchNorm2d(4, freeze_affine=freeze_affine, **options)),
        nn.Conv2d(4, 1, 3),
    )
    return model


def all_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_requires_grad_toggled_later_is_honoured():
    bn = layers(freeze_affine=False)[1]
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    for weight, bias in [(True, True), (False, True), (True, False), (False, False), (True, True)]:
        bn.weight.requires_grad_(weight), bn.bias.requires_grad_(bias)
        bn.weight.grad = bn.bias.grad = None
        bn(x).sum().backward()
        assert (bn.weight.grad is not None, bn.bias.grad is not None) == (weight, bias)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_buffers_overwritten_between_forward_and_backward(activation):
    """DDP's ``broadcast_buffers`` with two forwards before one backward: no version error, and the
    gradients are those of the values at the time of the forward."""
    model = layers(activation=activation)
    x, y = torch.randn(2, 2, 2, 7, 7)
    (model(x).square().sum() + model(y).square().sum()).backward()
    expected = all_gradients(model)
    model.zero_grad()

    first = model(x).square().sum()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())  # a broadcast of the same values
    second = model(y).square().sum()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(17)
    (first + second).backward()
    torch.testing.assert_close(all_gradients(model), expected)


@pytest.mark.covering(2)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("freeze_affine", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_activation_checkpointing(activation, freeze_affine, use_reentrant):
    model = layers(freeze_affine, activation=activation, inplace=True)
    x = torch.randn(2, 2, 7, 7, requires_grad=True)
    model(x).square().sum().backward()
    expected = all_gradients(model) | {"x": x.grad.clone()}
    model.zero_grad()
    x.grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(all_gradients(model) | {"x": x.grad}, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_trains_with_float32_parameters(autocast, dtype):
    """The old "expected scalar type Half but found Float" case."""
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 8, 3)
    bn = randomize_(FrozenBatchNorm2d(8, freeze_affine=False, activation="relu"))
    x, target = torch.randn(4, 2, 8, 8), torch.rand(4, 8, 6, 6)
    if not autocast:
        conv, x = conv.to(dtype), x.to(dtype)
    optimizer = torch.optim.SGD([*conv.parameters(), *bn.parameters()], lr=0.02)
    losses = []
    for _ in range(4):
        with torch.autocast(x.device.type, dtype, enabled=autocast):
            h = conv(x)
            y = bn(h)
        assert h.dtype == y.dtype == dtype
        loss = F.mse_loss(y.float(), target)
        optimizer.zero_grad()
        loss.backward()
        for p in (*conv.parameters(), *bn.parameters()):
            assert p.grad.dtype == p.dtype and p.grad.isfinite().all() and p.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert {v.dtype for v in bn.state_dict().values()} == {torch.float32}
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def with_activation(activation: str | None):
    """The operator and the reference as functions of (input, weight, bias, residual)."""
    tensors = make_tensors(())
    statistics = tensors["running_mean"], tensors["running_var"]

    def bind(function):
        def call(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return function(
                input, *statistics, weight, bias, residual=residual, activation=activation
            )

        return call

    return bind(frozen_batch_norm), bind(reference.frozen_batch_norm), [tensors[n] for n in NAMES]


@activations
def test_func_grad(activation):
    ours, oracle, primals = with_activation(activation)
    leaves = [p.clone().requires_grad_() for p in primals]
    expected = torch.autograd.grad(oracle(*leaves).square().sum(), leaves)
    actual = torch.func.grad(lambda *p: ours(*p).square().sum(), argnums=(0, 1, 2, 3))(*primals)
    torch.testing.assert_close(actual, expected)


@activations
def test_func_vmap(activation):
    ours, oracle, (input, *others) = with_activation(activation)
    batch = torch.randn(4, *input.shape, dtype=input.dtype)
    actual = torch.func.vmap(lambda x: ours(x, *others))(batch)
    torch.testing.assert_close(actual, torch.stack([oracle(x, *others) for x in batch]))


def numerical_tangent(function, primals: list[Tensor], tangents: list[Tensor]) -> Tensor:
    step = 1e-6
    up, down = (
        function(*(p + s * t for p, t in zip(primals, tangents, strict=True)))
        for s in (step, -step)
    )
    return (up - down) / (2 * step)


@activations
@pytest.mark.parametrize("interface", ["func.jvp", "dual numbers", "double backward"])
def test_forward_mode(interface, activation):
    ours, oracle, primals = with_activation(activation)
    tangents = [torch.randn_like(p) for p in primals]
    if interface == "func.jvp":
        primal, tangent = torch.func.jvp(ours, tuple(primals), tuple(tangents))
    elif interface == "dual numbers":
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, primals, tangents)
            primal, tangent = forward_ad.unpack_dual(ours(*duals))
    else:
        primal, tangent = torch.autograd.functional.jvp(ours, tuple(primals), tuple(tangents))
    torch.testing.assert_close(primal, oracle(*primals))
    torch.testing.assert_close(
        tangent, numerical_tangent(oracle, primals, tangents), rtol=1e-6, atol=1e-6
    )


def test_func_jacrev_and_jacfwd_agree():
    ours, _, (input, *others) = with_activation("silu")
    backward = torch.func.jacrev(lambda x: ours(x, *others))(input)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: ours(x, *others))(input), backward)


@pytest.mark.covering(1)
@pytest.mark.parametrize("freeze_affine", [False, True])
@pytest.mark.parametrize("activation, inplace", [(None, False), ("relu", True), ("silu", False)])
def test_compile_without_graph_breaks(activation, inplace, freeze_affine):
    torch._dynamo.reset()
    model = layers(freeze_affine, activation=activation, inplace=inplace)
    x = torch.randn(2, 2, 7, 7, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    expected = all_gradients(model) | {"x": x.grad.clone(), "y": y.detach()}
    model.zero_grad()
    x.grad = None
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    torch.testing.assert_close(all_gradients(model) | {"x": x.grad, "y": y.detach()}, expected)


@pytest.mark.covering(1)
def test_compile_layers_of_different_eps():
    """From the second value on, torch.compile takes a float attribute for a symbol."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 7, 7)
    for eps in (1e-5, 1e-3, 2e-3, 0.0):
        layer = randomize_(FrozenBatchNorm2d(2, eps, activation="leaky_relu", negative_slope=eps))
        torch.testing.assert_close(compiled(layer, x), layer(x))
