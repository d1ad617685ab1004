"""frozen_batch_norm_pair: both branches of a block that downsamples, normalized, added and
activated in one kernel."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from exact import (
    AWKWARD,
    DTYPES,
    HALVES,
    assert_close_to_exact,
    assert_gradient_close,
    at_a_kink,
    awkward,
    make_input,
    make_statistics,
    terms_of,
)
from helpers import ACTIVATIONS, PIECEWISE_LINEAR, SMOOTH, output_strides
from torch import Tensor

from frozen_bn import reference
from frozen_bn.checks import Statistics
from frozen_bn.functional import has_kernels
from frozen_bn.pair import frozen_batch_norm_pair

pytestmark = pytest.mark.every_cpu_level

# N, C, H*W
SHAPES = [
    (2, 1, 4),
    (2, 3, 49),
    (1, 8, 950),
    (2, 37, 49),
    (2, 37, 1),
    (3, 64, 4),
    (1, 64, 950),
    (1, 2048, 49),
    (2, 2048, 1),
]
BRANCHES = ("input", "residual")
both_nodes = pytest.mark.usefixtures("node")
channels_last = pytest.mark.parametrize("channels_last", [False, True])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
activations = pytest.mark.parametrize("activation", ACTIVATIONS)
trainables = pytest.mark.parametrize(
    "trainable", [("input",), ("residual",), BRANCHES], ids="+".join
)


def make_pair(c: int, dtype: torch.dtype = torch.float32) -> tuple[Statistics, Statistics]:
    """Of input and residual."""
    return Statistics(*make_statistics(c, dtype)), Statistics(*make_statistics(c, dtype), 1e-3)


def to(statistics: Statistics, dtype: torch.dtype) -> Statistics:
    return Statistics(*(v if v is None else v.to(dtype) for v in statistics[:4]), statistics.eps)


def exact(x: Tensor, statistics: Statistics, r: Tensor, other: Statistics, **options) -> Tensor:
    """The reference in float64, on the very values that the operator was given."""
    doubles = (to(s, torch.float64) for s in (statistics, other))
    first, second = doubles
    return reference.frozen_batch_norm_pair(x.double(), first, r.double(), second, **options)


def terms(x: Tensor, statistics: Statistics, r: Tensor, other: Statistics) -> Tensor:
    return terms_of(x, statistics[:4], None) + terms_of(r, other[:4], None)


# ---- What is computed


@activations
def test_the_reference_is_the_sum_of_two_batch_norms(activation):
    x, r = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    a, b = make_pair(5, torch.float64)
    y = reference.frozen_batch_norm_pair(x, a, r, b, activation=activation, negative_slope=0.2)
    z = sum(F.batch_norm(t, *s[:4], eps=s.eps) for t, s in ((x, a), (r, b)))
    functions = {None: lambda z: z, "leaky_relu": lambda z: F.leaky_relu(z, 0.2)}
    function = functions[activation] if activation in functions else getattr(F, activation)
    torch.testing.assert_close(y, function(z))


@pytest.mark.covering(2)
@channels_last
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_rounded_exact_result(shape, dtype, channels_last, device):
    x, r = (make_input(*shape, dtype, channels_last) for _ in range(2))
    a, b = make_pair(shape[1])
    y = frozen_batch_norm_pair(x, a, r, b)
    assert y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    assert_close_to_exact(y, exact(x, a, r, b), terms(x, a, r, b))


@pytest.mark.covering(2)
@activations
@dtypes
@channels_last
def test_activations(channels_last, dtype, activation, device):
    x, r = (make_input(2, 37, 49, dtype, layout) for layout in (channels_last, not channels_last))
    a, b = make_pair(37)
    options = {"activation": activation, "negative_slope": 0.2}
    y = frozen_batch_norm_pair(x, a, r, b, **options)
    assert_close_to_exact(y, exact(x, a, r, b, **options), terms(x, a, r, b))


@pytest.mark.covering(3)
@activations
@dtypes
@channels_last
@pytest.mark.parametrize(
    "shape",
    [(2, 37, 49), (3, 64, 4), pytest.param((1, 8, 950), marks=pytest.mark.long_emulated)],
)
def test_gradients_agree_with_float64(shape, channels_last, dtype, activation, device):
    x, r = (make_input(*shape, dtype, channels_last) for _ in range(2))
    grad_output = make_input(*shape, dtype, not channels_last)
    a, b = make_pair(shape[1])
    grad_output[at_a_kink(exact(x, a, r, b), terms(x, a, r, b), activation)] = 0
    outcomes = []
    for function, kind in ((frozen_batch_norm_pair, None), (exact, torch.float64)):
        leaves = [t.detach().to(kind or dtype).requires_grad_() for t in (x, r)]
        y = function(leaves[0], a, leaves[1], b, activation=activation, negative_slope=0.2)
        outcomes.append(torch.autograd.grad(y, leaves, grad_output.to(y.dtype)))
    for got, want, leaf in zip(*outcomes, (x, r), strict=True):
        assert got.dtype == dtype
        assert got.stride() == leaf.stride() or not has_kernels(leaf)
        assert_gradient_close(got, want, dtype)


@pytest.mark.covering(2)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("role", ["input", "residual", "grad_output", "all"])
def test_any_strides(kind, role, activation, device):
    def tensor(name: str) -> Tensor:
        return awkward(kind) if role in (name, "all") else torch.randn(2, 6, 7, 9)

    leaves = [tensor(name).requires_grad_() for name in BRANCHES]
    grad_output = tensor("grad_output")
    a, b = make_pair(6)
    outcomes = []
    for function in (frozen_batch_norm_pair, reference.frozen_batch_norm_pair):
        y = function(leaves[0], a, leaves[1], b, activation=activation)
        outcomes.append([y, *torch.autograd.grad(y, leaves, grad_output)])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
    assert [y.stride() for y, *_ in outcomes] == [output_strides(leaves[0])] * 2


@pytest.mark.covering(2)
@pytest.mark.parametrize("parameters", DTYPES)
@dtypes
def test_parameters_of_any_dtype(dtype, parameters, device):
    x, r = (make_input(2, 8, 49, dtype, False) for _ in range(2))
    a, b = make_pair(8, parameters)
    assert_close_to_exact(frozen_batch_norm_pair(x, a, r, b), exact(x, a, r, b), terms(x, a, r, b))
    mixed = [
        Statistics(*(v.to(k) for v, k in zip(s[:4], kinds, strict=True)))
        for s, kinds in ((a, DTYPES), (b, DTYPES[::-1]))
    ]
    y = frozen_batch_norm_pair(x, mixed[0], r, mixed[1])
    assert_close_to_exact(y, exact(x, mixed[0], r, mixed[1]), terms(x, mixed[0], r, mixed[1]))


@pytest.mark.parametrize("present", [*itertools.product([False, True], repeat=4)])
def test_weights_and_biases_are_optional(present, device):
    vectors = [v if p else None for v, p in zip(torch.randn(4, 8), present, strict=True)]
    a, b = make_pair(8)
    a, b = Statistics(*a[:2], *vectors[:2]), Statistics(*b[:2], *vectors[2:], 0.5)
    x, r = torch.randn(2, 2, 8, 5, 5)
    expected = sum(F.batch_norm(t, *s[:4], eps=s.eps) for t, s in ((x, a), (r, b)))
    torch.testing.assert_close(frozen_batch_norm_pair(x, a, r, b), expected)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (2, 6, 3, 4, 5), (2, 6, 1, 1), (2, 1, 3, 4)])
def test_every_rank(shape, device):
    x, r = torch.randn(2, *shape)
    a, b = make_pair(shape[1])
    expected = reference.frozen_batch_norm_pair(x, a, r, b, activation="relu")
    torch.testing.assert_close(frozen_batch_norm_pair(x, a, r, b, activation="relu"), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_sum_is_rounded_once(dtype, device):
    """Where a composition has to round the branch to half, and then the sum."""
    ones = Statistics(torch.zeros(1), torch.ones(1), torch.ones(1), eps=0.0)
    almost = ones._replace(weight=torch.tensor([1 + torch.finfo(dtype).eps * 0.75]))
    r = torch.ones(1, 1, 4, 4, dtype=dtype)
    y = frozen_batch_norm_pair(torch.full_like(r, -1), ones, r, almost)
    torch.testing.assert_close(y, torch.full_like(r, torch.finfo(dtype).eps * 0.75))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_as_in_torch(activation, device):
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e38, -1e38])
    x, r = special.repeat(3, 7).T.contiguous(), special.repeat(3, 7).reshape(7, 3, 7)
    x = x.reshape(7, 7, 3).movedim(2, 1).contiguous()
    plain = Statistics(torch.zeros(3), torch.ones(3), eps=0.0)
    torch.testing.assert_close(
        frozen_batch_norm_pair(x, plain, r, plain, activation=activation),
        reference.frozen_batch_norm_pair(x, plain, r, plain, activation=activation),
        equal_nan=True,
    )


@activations
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)], ids=str)
def test_nothing_is_fine(shape, activation, device):
    leaves = [torch.randn(shape).requires_grad_() for _ in BRANCHES]
    a, b = make_pair(8)
    y = frozen_batch_norm_pair(leaves[0], a, leaves[1], b, activation=activation)
    y.sum().backward()
    assert y.shape == shape and all(t.grad.shape == shape for t in leaves)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_outputs_and_thread_counts(threads):
    """Large enough for streaming stores, and for every thread to have a range."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            leaves = [torch.randn(2, 37, 317, 331).to(memory_format=layout) for _ in BRANCHES]
            x, r = (t.requires_grad_() for t in leaves)
            a, b = make_pair(37)
            y = frozen_batch_norm_pair(x, a, r, b, activation="relu")
            expected = reference.frozen_batch_norm_pair(x, a, r, b, activation="relu")
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            gradients = torch.autograd.grad(y, [x, r], torch.ones_like(y))
            for g, s in zip(gradients, (a, b), strict=True):
                scale = s.weight / (s.running_var + s.eps).sqrt()
                torch.testing.assert_close(g, (y > 0) * scale.reshape(-1, 1, 1))
    finally:
        torch.set_num_threads(before)


# ---- In place


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("needs", [(), ("input",), ("residual",), BRANCHES], ids="+".join)
@activations
def test_in_place_gives_the_same(activation, needs, layout, device):
    wide = torch.randn(2, 10, 5, 7)
    x = wide[:, 1:9] if layout == "sliced" else wide[:, 1:9].contiguous()
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    r, grad_output = torch.randn(2, 2, 8, 5, 7)
    a, b = make_pair(8)
    outcomes = []
    for inplace in (False, True):
        leaf, residual = (
            t.clone().requires_grad_(name in needs) for t, name in ((x, "input"), (r, "residual"))
        )
        h = leaf * 1 if layout != "sliced" else F.pad(leaf, (0, 0, 0, 0, 1, 1))[:, 1:9]
        version = h._version
        y = frozen_batch_norm_pair(h, a, residual, b, activation=activation, inplace=inplace)
        assert (y.data_ptr() == h.data_ptr()) == inplace
        assert (h._version > version) == inplace
        wanted = [t for t in (leaf, residual) if t.requires_grad]
        gradients = torch.autograd.grad(y, wanted, grad_output) if wanted else ()
        outcomes.append([y.detach().contiguous(), *(g.contiguous() for g in gradients)])
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@both_nodes
@activations
def test_in_place_with_the_input_itself_as_residual(activation):
    a, b = make_pair(3, torch.float64)

    def function(input: Tensor) -> Tensor:
        h = input * 1.5
        return frozen_batch_norm_pair(h, a, h, b, activation=activation, inplace=True)

    x = (3 * torch.randn(2, 3, 2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))


# ---- Derivatives


def function_of(trainable: tuple[str, ...], **options: object):
    """As a function of the trainable branches, and those: float64."""
    branches = {n: 3 * torch.randn(2, 3, 2, 3, dtype=torch.float64) for n in BRANCHES}
    a, b = make_pair(3, torch.float64)

    def function(*leaves: Tensor) -> Tensor:
        given = branches | dict(zip(trainable, leaves, strict=True))
        return frozen_batch_norm_pair(given["input"], a, given["residual"], b, **options)

    return function, tuple(branches[n].requires_grad_() for n in trainable)


@pytest.mark.covering(2)
@both_nodes
@activations
@trainables
def test_gradcheck(trainable, activation):
    assert torch.autograd.gradcheck(*function_of(trainable, activation=activation))


@pytest.mark.covering(2)
@both_nodes
@activations
@trainables
def test_gradgradcheck(trainable, activation):
    assert torch.autograd.gradgradcheck(*function_of(trainable, activation=activation))


@both_nodes
@activations
def test_batched_gradients(activation):
    function, leaves = function_of(BRANCHES, activation=activation)
    y = function(*leaves)
    grads = torch.randn(4, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        single = torch.autograd.grad(y, leaves, g, retain_graph=True)
        torch.testing.assert_close(single, tuple(b[i] for b in batched))


@activations
@trainables
def test_only_what_is_asked_for_is_computed(trainable, activation, device):
    branches = {n: torch.randn(2, 3, 4, 5).requires_grad_(n in trainable) for n in BRANCHES}
    a, b = make_pair(3)
    y = frozen_batch_norm_pair(branches["input"], a, branches["residual"], b, activation=activation)
    y.sum().backward()
    assert {name for name, t in branches.items() if t.grad is not None} == set(trainable)


@both_nodes
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_buffers_overwritten_between_forward_and_backward(activation):
    """The gradients are those of the values at the time of the forward."""
    leaves = [torch.randn(2, 3, 4, 5).requires_grad_() for _ in BRANCHES]
    a, b = make_pair(3)

    def output() -> Tensor:
        return frozen_batch_norm_pair(leaves[0], a, leaves[1], b, activation=activation).sum()

    expected = torch.autograd.grad(output(), leaves)
    y = output()
    for vector in (*a[:4], *b[:4]):
        vector.fill_(17)
    torch.testing.assert_close(torch.autograd.grad(y, leaves), expected)


# ---- What the backward keeps


@both_nodes
@pytest.mark.parametrize("inplace", [False, True])
@activations
@trainables
def test_what_is_saved(trainable, activation, inplace):
    """Channel vectors, and one bit an element; both branches only for a smooth activation."""
    branches = {n: torch.randn(2, 3, 5, 7).requires_grad_(n in trainable) for n in BRANCHES}
    x, r = branches["input"] * 1, branches["residual"]
    a, b = make_pair(3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_batch_norm_pair(x, a, r, b, activation=activation, inplace=inplace)
    kept = [(t.dtype, tuple(t.shape)) for t in saved]
    expected = [(torch.float32, (5, 3))]
    if activation in PIECEWISE_LINEAR:
        expected.append((torch.uint8, (-(-x.numel() // 8),)))
    if activation in SMOOTH:
        expected += [(torch.float32, tuple(x.shape))] * 2
        assert inplace or {t.data_ptr() for t in saved[1:]} == {x.data_ptr(), r.data_ptr()}
    assert kept == expected


@both_nodes
def test_no_gradients_no_node():
    a, b = make_pair(3)
    x, r = torch.randn(2, 2, 3, 4, 5)
    assert frozen_batch_norm_pair(x, a, r, b).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert not frozen_batch_norm_pair(x, a, r, b).requires_grad


# ---- A trainable affine


@pytest.mark.covering(2)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    "trained", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=lambda t: "".join(map(str, t))
)
def test_gradients_of_a_trainable_affine(trained, activation, inplace, device):
    x, r = (torch.randn(2, 8, 5, 7).requires_grad_() for _ in BRANCHES)
    vectors = [v.requires_grad_(k in trained) for k, v in enumerate(torch.randn(4, 8).unbind())]
    a, b = make_pair(8)
    a, b = Statistics(*a[:2], *vectors[:2]), Statistics(*b[:2], *vectors[2:], 1e-3)
    leaves = [x, r, *(vectors[k] for k in trained)]
    grad_output = torch.randn(2, 8, 5, 7)
    outcomes = []
    for function in (frozen_batch_norm_pair, reference.frozen_batch_norm_pair):
        y = function(x * 1, a, r, b, activation=activation, inplace=inplace)
        outcomes.append([y, *torch.autograd.grad(y, leaves, grad_output)])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the kernel of the pair again
        y = frozen_batch_norm_pair(x, a, r, b, activation=activation)
    torch.testing.assert_close(y, outcomes[0][0].detach())


# ---- Where PyTorch has to see its own operators


def compiled(x: Tensor, a: Statistics, r: Tensor, b: Statistics) -> Tensor:
    torch._dynamo.reset()
    function = torch.compile(frozen_batch_norm_pair, fullgraph=True, backend="aot_eager")
    return function(x, a, r, b, activation="silu")


def traced(x: Tensor, a: Statistics, r: Tensor, b: Statistics) -> Tensor:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return frozen_batch_norm_pair(x, a, r, b, activation="silu")

    module = torch.fx.symbolic_trace(Module())
    assert any(node.target is frozen_batch_norm_pair for node in module.graph.nodes)
    return module(x, r)


def vmapped(x: Tensor, a: Statistics, r: Tensor, b: Statistics) -> Tensor:
    def function(x: Tensor, r: Tensor) -> Tensor:
        return frozen_batch_norm_pair(x[None], a, r[None], b, activation="silu")[0]

    return torch.func.vmap(function)(x, r)


@pytest.mark.parametrize("way", [compiled, traced, vmapped])
def test_compilers_tracers_and_transforms(way):
    leaves = [torch.randn(2, 3, 4, 5).requires_grad_() for _ in BRANCHES]
    a, b = make_pair(3)
    outcomes = []
    for y in (
        way(leaves[0], a, leaves[1], b),
        frozen_batch_norm_pair(leaves[0], a, leaves[1], b, activation="silu"),
    ):
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*outcomes)


def test_forward_mode():
    x, r, dx, dr = torch.randn(4, 2, 3, 4, 5, dtype=torch.float64)
    a, b = make_pair(3, torch.float64)

    def function(x: Tensor, r: Tensor) -> Tensor:
        return frozen_batch_norm_pair(x, a, r, b, activation="silu")

    _, tangent = torch.func.jvp(function, (x, r), (dx, dr))
    step = 1e-6
    numerical = (function(x + step * dx, r + step * dr) - function(x, r)) / step
    torch.testing.assert_close(tangent, numerical, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_statistics_that_require_grad(statistic, which):
    pair = list(make_pair(3, torch.float64))
    vector = getattr(pair[which], statistic).requires_grad_()

    def function(vector: Tensor) -> Tensor:
        pair[which] = pair[which]._replace(**{statistic: vector})
        return frozen_batch_norm_pair(x, pair[0], r, pair[1])

    x, r = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(function, (vector,))
