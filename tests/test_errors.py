"""Bad input: the same words from every path, and nothing modified."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from frozen_bn import FrozenBatchNorm2d, frozen_batch_norm, reference

C = 64
SHAPE = (2, C, 3, 5)
ONE_OF = "float16, bfloat16, float32 or float64"

Arguments = dict[str, Any]


def good_arguments(device: str = "cpu") -> Arguments:
    vectors = ("running_mean", "running_var", "weight", "bias")
    arguments: Arguments = {name: torch.rand(C, device=device) + 0.5 for name in vectors}
    return {"input": torch.randn(SHAPE, device=device), **arguments}


def call_operator(input: Tensor, running_mean: Tensor, running_var: Tensor, **options: Any) -> None:
    vectors = [options.get(name) for name in ("weight", "bias", "residual")]
    eps, output = options.get("eps", 1e-5), torch.empty_like(input)
    torch.ops.frozen_bn.forward(
        input, running_mean, running_var, *vectors, eps, 0, 0.01, output, None, None
    )


def call_with_gradients(**arguments: Any) -> Tensor:
    """Through the autograd node: whatever can require grad, does."""
    for name in ("input", "weight", "bias", "residual"):
        tensor = arguments.get(name)
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()):
            arguments[name] = tensor.detach().requires_grad_()
    return frozen_batch_norm(**arguments)


#: name -> (what to call, inside which mode)
PATHS: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "kernels": (frozen_batch_norm, contextlib.nullcontext),
    "kernels with gradients": (call_with_gradients, contextlib.nullcontext),
    "plain": (reference.frozen_batch_norm, contextlib.nullcontext),
    "operator": (call_operator, contextlib.nullcontext),
    "fake": (frozen_batch_norm, FakeTensorMode),
    "fake with gradients": (call_with_gradients, FakeTensorMode),
    "fake operator": (call_operator, FakeTensorMode),
}
every_path = pytest.mark.parametrize("path", PATHS)

#: id -> (how to spoil good arguments, expected, received)
BAD: dict[str, tuple[Callable[[], Arguments], str, str]] = {
    "rank 0": (
        lambda: {"input": torch.randn(())},
        "input to have at least 2 dimensions",
        "shape []",
    ),
    "rank 1": (
        lambda: {"input": torch.randn(C)},
        "input to have at least 2 dimensions",
        f"shape [{C}]",
    ),
    "bool input": (
        lambda: {"input": torch.ones(SHAPE, dtype=torch.bool)},
        f"input to be {ONE_OF}",
        "bool",
    ),
    "integer weight": (
        lambda: {"weight": torch.ones(C, dtype=torch.int32)},
        f"weight to be {ONE_OF}",
        "int32",
    ),
    "complex running_mean": (
        lambda: {"running_mean": torch.ones(C, dtype=torch.complex64)},
        f"running_mean to be {ONE_OF}",
        "complex64",
    ),
    "residual that only broadcasts": (
        lambda: {"residual": torch.randn(1, C, 1, 1)},
        f"residual to have shape {list(SHAPE)}",
        f"[1, {C}, 1, 1]",
    ),
    "residual of another rank": (
        lambda: {"residual": torch.randn(SHAPE[1:])},
        f"residual to have shape {list(SHAPE)}",
        str(list(SHAPE[1:])),
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
    "input elsewhere": (
        lambda: {"input": torch.randn(SHAPE, device="meta")},
        "running_mean to be on meta",
        "cpu",
    ),
    "the first of two faults": (
        lambda: {"running_var": torch.ones(1), "weight": torch.ones(2)},
        f"running_var to have shape [{C}]",
        "[1]",
    ),
}
for vector in ("running_mean", "running_var", "weight", "bias"):
    BAD |= {
        f"{vector} of another length": (
            lambda v=vector: {v: torch.ones(32)},
            f"{vector} to have shape [{C}]",
            "[32]",
        ),
        f"{vector} of rank 2": (
            lambda v=vector: {v: torch.ones(1, C)},
            f"{vector} to have shape [{C}]",
            f"[1, {C}]",
        ),
        f"{vector} of rank 0": (
            lambda v=vector: {v: torch.ones(())},
            f"{vector} to have shape [{C}]",
            "[]",
        ),
        f"{vector} elsewhere": (
            lambda v=vector: {v: torch.ones(C, device="meta")},
            f"{vector} to be on cpu",
            "meta",
        ),
    }
for kind in ("int64", "uint8", "complex64", "complex128", "float8_e4m3fn", "uint16"):
    BAD[f"{kind} input"] = (
        lambda k=kind: {"input": torch.ones(SHAPE).to(getattr(torch, k))},
        f"input to be {ONE_OF}",
        kind,
    )
for eps, text in (
    (-1e-5, "-1e-05"),
    (-1.0, "-1"),
    (math.nan, "nan"),
    (-math.nan, "nan"),
    (math.inf, "inf"),
    (-math.inf, "-inf"),
):
    BAD[f"eps {'-' * (math.copysign(1, eps) < 0)}{abs(eps)}"] = (
        lambda e=eps: {"eps": e},
        "eps to be finite and >= 0",
        text,
    )


@contextlib.contextmanager
def nothing_modified(arguments: Arguments):
    """Neither values nor version counters."""
    tensors = {k: t for k, t in arguments.items() if isinstance(t, Tensor)}
    versions = {k: t._version for k, t in tensors.items()}
    readable = {k for k, t in tensors.items() if not (t.is_meta or isinstance(t, FakeTensor))}
    copies = {k: tensors[k].detach().clone() for k in readable}
    yield
    assert {k: t._version for k, t in tensors.items()} == versions
    for k in readable:
        assert torch.equal(tensors[k], copies[k]), k


@every_path
@pytest.mark.parametrize("fault", BAD)
def test_message_is_the_same_on_every_path(fault, path):
    spoil, expected, received = BAD[fault]
    call, mode = PATHS[path]
    with mode():
        arguments = good_arguments() | spoil()
        with nothing_modified(arguments), pytest.raises(RuntimeError) as error:
            call(**arguments)
    assert str(error.value) == f"frozen_bn::forward: expected {expected}, but got {received}"


@every_path
def test_what_is_spoilt_above_was_good(path):
    call, mode = PATHS[path]
    with mode():
        arguments = good_arguments()
        with nothing_modified(arguments):
            call(**arguments, residual=torch.randn(SHAPE), eps=0.0)


functional_paths = pytest.mark.parametrize("path", [p for p in PATHS if "operator" not in p])


@functional_paths
@pytest.mark.parametrize("activation", ["ReLU", "gelu", "", 1])
def test_unknown_activation_is_a_value_error_that_lists_the_known_ones(activation, path):
    call, mode = PATHS[path]
    with mode():
        arguments = good_arguments()
        with nothing_modified(arguments), pytest.raises(ValueError) as error:
            call(**arguments, activation=activation)
    assert str(error.value) == (
        "frozen_bn::forward: expected activation to be one of None, 'relu', 'relu6', "
        f"'leaky_relu', 'silu', 'hardswish', but got {activation!r}"
    )


def test_unknown_activation_of_a_module_is_told_when_it_is_made():
    with pytest.raises(ValueError, match="expected activation to be one of"):
        FrozenBatchNorm2d(3, activation="gelu")


def leaf() -> Tensor:
    return torch.randn(SHAPE, requires_grad=True)


UNWRITABLE = {
    "leaf": (leaf, "not to be a leaf that requires grad when inplace=True", "a leaf that does"),
    "view of a leaf": (
        lambda: leaf()[:, :],
        "not to be a leaf that requires grad when inplace=True",
        "a view of a leaf that does",
    ),
    "reshaped leaf": (
        lambda: torch.randn(2, C, 15, requires_grad=True).view(SHAPE),
        "not to be a leaf that requires grad when inplace=True",
        "a view of a leaf that does",
    ),
    "one of several views": (
        lambda: (torch.randn(2, 2 * C, 3, 5, requires_grad=True) * 1).split(C, 1)[0],
        "to be a view that autograd can follow when inplace=True",
        "one of multiple views that one node returned",
    ),
    "expanded": (
        lambda: torch.randn(1, C, 3, 5).expand(SHAPE),
        "not to be expanded in memory",
        f"strides [0, {3 * 5}, 5, 1]",
    ),
    "expanded non-leaf": (
        lambda: (torch.randn(2, C, 1, 1, requires_grad=True) * 1).expand(SHAPE),
        "not to be expanded in memory",
        f"strides [{C}, 1, 0, 0]",
    ),
}
inplace_paths = pytest.mark.parametrize("path", ["kernels", "plain", "fake"])


@inplace_paths
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_inplace_on_what_must_not_be_written(kind, activation, path):
    make, expected, received = UNWRITABLE[kind]
    call, mode = PATHS[path]
    with mode():
        arguments = good_arguments() | {"input": make()}
        with nothing_modified(arguments), pytest.raises(RuntimeError) as error:
            call(**arguments, activation=activation, inplace=True)
    assert str(error.value) == f"frozen_bn::forward: expected input {expected}, but got {received}"


@inplace_paths
def test_inplace_on_one_of_several_views_modifies_nothing_if_only_the_bias_is_trained(path):
    call, mode = PATHS[path]
    with mode():
        arguments = good_arguments() | {"input": torch.randn(2, 2 * C, 3, 5).split(C, 1)[0]}
        arguments["bias"].requires_grad_()
        with nothing_modified(arguments), pytest.raises(RuntimeError, match="multiple views"):
            call(**arguments, inplace=True)


@inplace_paths
@pytest.mark.parametrize("fault", BAD)
def test_inplace_modifies_nothing_when_something_else_is_wrong(fault, path):
    call, mode = PATHS[path]
    with mode():
        arguments = good_arguments() | BAD[fault][0]()
        with nothing_modified(arguments), pytest.raises(RuntimeError, match="frozen_bn::forward"):
            call(**arguments, activation="relu", inplace=True)


@inplace_paths
def test_inplace_on_a_leaf_is_fine_without_grad_mode(path):
    call, mode = PATHS[path]
    with mode(), torch.no_grad():
        x = leaf()
        assert call(**good_arguments() | {"input": x}, inplace=True) is x


# ---- The operators, called directly and wrongly

FORWARD = ("input", "running_mean", "running_var", "weight", "bias", "residual", "eps")
FORWARD += ("activation", "negative_slope", "output", "coefficients", "mask")
BACKWARD = ("grad_output", "coefficients", "mask", "input", "residual", "activation")
BACKWARD += ("negative_slope", "grad_input", "grad_weight", "grad_bias", "grad_residual")
NONE, RELU, SILU = 0, 1, 4
BITS = (math.prod(SHAPE) + 7) // 8


def forward_arguments() -> Arguments:
    return {
        **dict.fromkeys(FORWARD),
        **good_arguments(),
        "eps": 1e-5,
        "activation": RELU,
        "negative_slope": 0.01,
        "output": torch.zeros(SHAPE),
        "coefficients": torch.zeros(4, C),
        "mask": torch.zeros(BITS, dtype=torch.uint8),
    }


def backward_arguments() -> Arguments:
    return {
        **dict.fromkeys(BACKWARD),
        "grad_output": torch.randn(SHAPE),
        "coefficients": torch.ones(4, C),
        "mask": torch.zeros(BITS, dtype=torch.uint8),
        "input": torch.randn(SHAPE),
        "activation": RELU,
        "negative_slope": 0.01,
        "grad_input": torch.zeros(SHAPE),
        "grad_weight": torch.zeros(C),
        "grad_bias": torch.zeros(C),
    }


COEFFICIENTS = f"coefficients to be contiguous float32 of shape [4, {C}]"
MASK = f"mask to be contiguous uint8 of shape [{BITS}]"
CODE = "activation to be a code from 0 to 5"

#: operator, what is wrong, expected, received
MISUSE: dict[str, tuple[str, Callable[[], Arguments], str, str]] = {
    "wrong output shape": (
        "forward",
        lambda: {"output": torch.zeros(2, C, 3, 4)},
        f"output to have shape {list(SHAPE)}",
        f"[2, {C}, 3, 4]",
    ),
    "wrong output dtype": (
        "forward",
        lambda: {"output": torch.zeros(SHAPE).half()},
        "output to be float32",
        "float16",
    ),
    "expanded output": (
        "forward",
        lambda: {"output": torch.zeros(1, C, 3, 5).expand(SHAPE)},
        "output not to be expanded in memory",
        "strides [0, 15, 5, 1]",
    ),
    "output elsewhere": (
        "forward",
        lambda: {"output": torch.zeros(SHAPE, device="meta")},
        "output to be on cpu",
        "meta",
    ),
    "grad_output of rank 1": (
        "backward",
        lambda: {"grad_output": torch.zeros(C)},
        "grad_output to have at least 2 dimensions",
        f"shape [{C}]",
    ),
    "integer grad_output": (
        "backward",
        lambda: {"grad_output": torch.zeros(SHAPE, dtype=torch.int64)},
        f"grad_output to be {ONE_OF}",
        "int64",
    ),
    "no mask": ("backward", lambda: {"mask": None}, "mask", "None"),
    "mask but no grad_input": ("backward", lambda: {"grad_input": None}, "grad_input", "None"),
    "no input for the weight": ("backward", lambda: {"input": None}, "input", "None"),
    "no input for a smooth activation": (
        "backward",
        lambda: {"input": None, "grad_weight": None, "activation": SILU},
        "input",
        "None",
    ),
    "input of another dtype": (
        "backward",
        lambda: {"input": torch.zeros(SHAPE).double()},
        "input to be float32",
        "float64",
    ),
    "grad_input of another shape": (
        "backward",
        lambda: {"grad_input": torch.zeros(2, C, 3, 4)},
        f"grad_input to have shape {list(SHAPE)}",
        f"[2, {C}, 3, 4]",
    ),
    "grad_weight of another length": (
        "backward",
        lambda: {"grad_weight": torch.zeros(32)},
        f"grad_weight to have shape [{C}]",
        "[32]",
    ),
    "integer grad_bias": (
        "backward",
        lambda: {"grad_bias": torch.zeros(C, dtype=torch.int64)},
        f"grad_bias to be {ONE_OF}",
        "int64",
    ),
    "grad_bias with gaps": (
        "backward",
        lambda: {"grad_bias": torch.zeros(2 * C)[::2]},
        "grad_bias to be contiguous",
        "stride [2]",
    ),
    "expanded grad_input": (
        "backward",
        lambda: {"grad_input": torch.zeros(SHAPE[1:]).expand(SHAPE)},
        "grad_input not to be expanded in memory",
        f"strides {[0, *torch.zeros(SHAPE[1:]).stride()]}",
    ),
    "grad_residual elsewhere": (
        "backward",
        lambda: {"grad_residual": torch.zeros(SHAPE, device="meta")},
        "grad_residual to be on cpu",
        "meta",
    ),
}
for op in ("forward", "backward"):
    MISUSE |= {
        f"{op}: coefficients of another shape": (
            op,
            lambda: {"coefficients": torch.zeros(4, 32)},
            COEFFICIENTS,
            "float32 of shape [4, 32]",
        ),
        f"{op}: coefficients of another dtype": (
            op,
            lambda: {"coefficients": torch.zeros(4, C, dtype=torch.float64)},
            COEFFICIENTS,
            f"float64 of shape [4, {C}]",
        ),
        f"{op}: mask too short": (
            op,
            lambda: {"mask": torch.zeros(BITS - 1, dtype=torch.uint8)},
            MASK,
            f"uint8 of shape [{BITS - 1}]",
        ),
        f"{op}: bool mask": (
            op,
            lambda: {"mask": torch.zeros(BITS, dtype=torch.bool)},
            MASK,
            f"bool of shape [{BITS}]",
        ),
        f"{op}: activation code -1": (op, lambda: {"activation": -1}, CODE, "-1"),
        f"{op}: activation code 6": (op, lambda: {"activation": 6}, CODE, "6"),
    }


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
@pytest.mark.parametrize("misuse", MISUSE)
def test_misused_operator_names_what_it_expected_and_received(misuse, mode):
    op, spoil, expected, received = MISUSE[misuse]
    with mode():
        arguments = forward_arguments() if op == "forward" else backward_arguments()
        arguments |= spoil()
        with nothing_modified(arguments), pytest.raises(RuntimeError) as error:
            getattr(torch.ops.frozen_bn, op)(*arguments.values())
    assert str(error.value) == f"frozen_bn::{op}: expected {expected}, but got {received}"


@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_what_is_misused_above_was_good(op, mode):
    with mode():
        arguments = forward_arguments() if op == "forward" else backward_arguments()
        getattr(torch.ops.frozen_bn, op)(*arguments.values())


@pytest.mark.parametrize("name", ["coefficients", "mask"])
def test_gaps_in_what_must_be_contiguous_are_told(name):
    arguments = forward_arguments()
    arguments[name] = torch.stack([arguments[name]] * 2, -1)[..., 0]
    with nothing_modified(arguments), pytest.raises(RuntimeError, match=f"expected {name} to be c"):
        torch.ops.frozen_bn.forward(*arguments.values())
