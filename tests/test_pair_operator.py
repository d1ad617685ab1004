"""frozen_bn::forward_pair as PyTorch sees it, and bad input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS
from test_errors import nothing_modified
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from frozen_bn import reference
from frozen_bn.checks import MASKED, Statistics
from frozen_bn.pair import frozen_batch_norm_pair

C = 64
SHAPE = (2, C, 3, 5)
NONE, RELU, SILU = 0, 1, 4


def sample_forward(
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    affine: bool = True,
    training: bool = True,
) -> list:
    """Arguments of ``torch.ops.frozen_bn.forward_pair``."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, r = (torch.randn(2, 5, 3, 7).to(dtype, memory_format=layout) for _ in range(2))
    own, residual = (
        [m, v, w if affine else None, b if affine else None, eps]
        for (m, v, w, b), eps in zip(torch.rand(2, 4, 5) + 0.5, (1e-5, 1e-3), strict=True)
    )
    code = ACTIVATIONS.index(activation)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    coefficients = torch.empty(5, 5, dtype=arithmetic) if training else None
    mask = None
    if training and code in MASKED:
        mask = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    return [x, *own, r, *residual, code, 0.1, torch.empty_like(x), coefficients, mask]


VARIANTS = [
    {},
    {"channels_last": True, "activation": "relu"},
    {"affine": False, "activation": "relu6"},
    {"activation": "silu", "dtype": torch.float16},
    {"activation": "leaky_relu", "dtype": torch.bfloat16, "training": False},
    {"activation": "hardswish", "dtype": torch.float64},
]


def words(options: dict) -> str:
    return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in options.items()) or "default"


@pytest.mark.parametrize("options", VARIANTS, ids=words)
def test_opcheck_forward(options):
    arguments = tuple(sample_forward(**options))
    torch.library.opcheck(torch.ops.frozen_bn.forward_pair.default, arguments)


@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("training", True)], ids=words)
def test_opcheck_backward(options):
    forward = sample_forward(**options)
    torch.ops.frozen_bn.forward_pair(*forward)
    x, r, code, slope, coefficients, mask = (forward[k] for k in (0, 6, 12, 13, 15, 16))
    gradients = (torch.empty_like(x), None, None, torch.empty_like(x))
    arguments = (torch.randn_like(x), coefficients, mask, x, r, code, slope, *gradients)
    torch.library.opcheck(torch.ops.frozen_bn.backward.default, arguments)


LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 5, 3, 7),
    "channels_last": lambda: torch.randn(2, 5, 3, 7).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(2, 8, 3, 9)[:, 2:-1, :, 1:-1],
    "permuted": lambda: torch.randn(7, 5, 2, 3).permute(2, 1, 3, 0),
    "empty": lambda: torch.randn(0, 5, 3, 7),
}


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_outputs_and_gradients_without_data_look_like_real_ones(kind, layout, activation):
    def results(x: Tensor, r: Tensor) -> list[tuple]:
        a, b = (Statistics(*torch.ones(4, 5, device=x.device).unbind()) for _ in range(2))
        leaves = [x.requires_grad_(), r.requires_grad_()]
        y = frozen_batch_norm_pair(x, a, r, b, activation=activation)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [(t.dtype, tuple(t.shape), t.stride()) for t in (y, *gradients)]

    def like(t: Tensor, device: str) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), device=device)

    real = LAYOUTS[layout]()
    expected = results(real.detach(), torch.randn_like(real))
    if kind == "fake":
        with FakeTensorMode():
            assert results(like(real, "cpu"), like(real, "cpu")) == expected
    else:
        assert results(like(real, "meta"), like(real, "meta"))[0] == expected[0]


# ---- Bad input

#: What the operator calls the fields of Statistics.
FIELDS = ("mean", "var", "weight", "bias", "eps")
Arguments = dict[str, Any]


def good_arguments() -> Arguments:
    vectors = [f"{branch}_{field}" for branch in ("running", "residual") for field in FIELDS[:4]]
    arguments: Arguments = {name: torch.rand(C) + 0.5 for name in vectors}
    arguments |= {"running_eps": 1e-5, "residual_eps": 1e-5}
    return {"input": torch.randn(SHAPE), "residual": torch.randn(SHAPE), **arguments}


def positional(given: Arguments) -> list:
    x, r = given["input"], given["residual"]
    a, b = (
        Statistics(*(given[f"{branch}_{field}"] for field in FIELDS))
        for branch in ("running", "residual")
    )
    return [x, a, r, b]


def call(**given: Any) -> Tensor:
    return frozen_batch_norm_pair(*positional(given))


def call_with_gradients(trained: tuple[str, ...] = ("input", "residual"), **given: Any) -> Tensor:
    for name in trained:
        if given[name].is_floating_point():
            given[name] = given[name].detach().requires_grad_()
    return call(**given)


def call_operator(**given: Any) -> None:
    x, a, r, b = positional(given)
    torch.ops.frozen_bn.forward_pair(x, *a, r, *b, 0, 0.01, torch.empty_like(x), None, None)


PATHS: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "kernels": (call, contextlib.nullcontext),
    "kernels with gradients": (call_with_gradients, contextlib.nullcontext),
    "two calls": (
        lambda **given: call_with_gradients(("residual_weight",), **given),
        contextlib.nullcontext,
    ),
    "plain": (
        lambda **given: reference.frozen_batch_norm_pair(*positional(given)),
        contextlib.nullcontext,
    ),
    "operator": (call_operator, contextlib.nullcontext),
    "fake": (call, FakeTensorMode),
    "fake with gradients": (call_with_gradients, FakeTensorMode),
    "fake operator": (call_operator, FakeTensorMode),
}
every_path = pytest.mark.parametrize("path", PATHS)

ONE_OF = "float16, bfloat16, float32 or float64"
#: id -> (how to spoil good arguments, expected, received)
BAD: dict[str, tuple[Callable[[], Arguments], str, str]] = {
    "rank 1": (
        lambda: {"input": torch.randn(C)},
        "input to have at least 2 dimensions",
        f"shape [{C}]",
    ),
    "integer input": (
        lambda: {"input": torch.ones(SHAPE, dtype=torch.int64)},
        f"input to be {ONE_OF}",
        "int64",
    ),
    "residual of another shape": (
        lambda: {"residual": torch.randn(1, C, 1, 1)},
        f"residual to have shape {list(SHAPE)}",
        f"[1, {C}, 1, 1]",
    ),
    "residual of another dtype": (
        lambda: {"residual": torch.randn(SHAPE).half()},
        "residual to be float32",
        "float16",
    ),
    "residual elsewhere": (
        lambda: {"residual": torch.randn(SHAPE, device="meta")},
        "residual to be on cpu",
        "meta",
    ),
    "the first of two faults": (
        lambda: {"residual_var": torch.ones(1), "residual_weight": torch.ones(2)},
        f"residual_var to have shape [{C}]",
        "[1]",
    ),
}
for branch in ("running", "residual"):
    for field in FIELDS[:4]:
        key = f"{branch}_{field}"
        told = field if key in ("running_weight", "running_bias") else key
        BAD[f"{key} of another length"] = (
            lambda k=key: {k: torch.ones(32)},
            f"{told} to have shape [{C}]",
            "[32]",
        )
        BAD[f"integer {key}"] = (
            lambda k=key: {k: torch.ones(C, dtype=torch.int32)},
            f"{told} to be {ONE_OF}",
            "int32",
        )
        BAD[f"{key} elsewhere"] = (
            lambda k=key: {k: torch.ones(C, device="meta")},
            f"{told} to be on cpu",
            "meta",
        )
    for eps, text in ((-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf")):
        BAD[f"{branch} eps {eps}"] = (
            lambda b=branch, e=eps: {f"{b}_eps": e},
            f"{'residual_' * (branch == 'residual')}eps to be finite and >= 0",
            text,
        )


@every_path
@pytest.mark.parametrize("fault", BAD)
def test_message_is_the_same_on_every_path(fault, path):
    spoil, expected, received = BAD[fault]
    function, mode = PATHS[path]
    with mode():
        arguments = good_arguments() | spoil()
        with nothing_modified(arguments), pytest.raises(RuntimeError) as error:
            function(**arguments)
    assert str(error.value) == f"frozen_bn::forward_pair: expected {expected}, but got {received}"


@every_path
def test_what_is_spoilt_above_was_good(path):
    function, mode = PATHS[path]
    with mode():
        function(**good_arguments())


@pytest.mark.parametrize("function", [frozen_batch_norm_pair, reference.frozen_batch_norm_pair])
def test_unknown_activation(function):
    with pytest.raises(ValueError, match=r"^frozen_bn::forward_pair: .* but got 'gelu'$"):
        function(*positional(good_arguments()), activation="gelu")


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("function", [frozen_batch_norm_pair, reference.frozen_batch_norm_pair])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.randn(SHAPE, requires_grad=True), "input not to be a leaf"),
        (lambda: torch.randn(1, C, 3, 5).expand(SHAPE), "input not to be expanded"),
        (
            lambda: (torch.randn(2, 2 * C, 3, 5, requires_grad=True) * 1).split(C, 1)[0],
            "input to be a view that autograd can follow",
        ),
    ],
    ids=["leaf", "expanded", "one of several views"],
)
def test_in_place_on_what_must_not_be_written(make, expected, function, activation):
    arguments = good_arguments() | {"input": make()}
    message = rf"^frozen_bn::forward_pair: expected {expected}"
    with nothing_modified(arguments), pytest.raises(RuntimeError, match=message):
        function(*positional(arguments), activation=activation, inplace=True)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: torch.empty(8, 5)}, "coefficients to be contiguous float32 of shape [4, 5]"),
        ({8: torch.empty(5)}, "no grad_weight of a pair, but got shape [5]"),
        ({9: torch.empty(5)}, "no grad_bias of a pair, but got shape [5]"),
        ({4: None}, "residual, but got None"),
        ({3: None}, "input, but got None"),
    ],
)
def test_backward_of_a_pair_called_wrongly(changes, message, mode):
    x, coefficients = torch.randn(2, 5, 3, 7), torch.rand(5, 5)
    arguments = [x, coefficients, None, x, x, SILU, 0.1, torch.empty_like(x), None, None, None]
    for k, value in changes.items():
        arguments[k] = value
    with mode() as fake, pytest.raises(RuntimeError) as error:
        convert = fake.from_tensor if fake is not None else lambda t: t
        arguments = [convert(t) if isinstance(t, Tensor) else t for t in arguments]
        torch.ops.frozen_bn.backward(*arguments)
    assert str(error.value).startswith(f"frozen_bn::backward: expected {message}")


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode])
def test_coefficients_of_a_single_branch_do_not_fit(mode):
    with mode(), pytest.raises(RuntimeError, match=r"coefficients to be .* of shape \[5, 5\]"):
        arguments = sample_forward()
        arguments[15] = torch.empty(4, 5)
        torch.ops.frozen_bn.forward_pair(*arguments)
