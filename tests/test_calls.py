"""ops.forward, ops.forward_pair and ops.backward: the operators, called past torch.ops where that
is possible, and the same in Python elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from frozen_bn import _C, frozen_batch_norm, ops, reference

FAST = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
needs_fast_calls = pytest.mark.skipif(not FAST, reason="torch hands over its tensors from 2.14 on")

SLOW = {"forward": ops._forward, "forward_pair": ops._forward_pair, "backward": ops._backward}
FAST_OR_SLOW = {"forward": ops.forward, "forward_pair": ops.forward_pair, "backward": ops.backward}
LEAKY_RELU = 3


class TensorOfOurs(Tensor):
    pass


def unreachable(*arguments: Any) -> Any:
    raise AssertionError("the slow function was called")


def vectors(channels: int) -> list[Tensor]:
    return [torch.rand(channels) + 0.5 for _ in range(4)]


def arguments_of(name: str, x: Tensor, code: int = LEAKY_RELU) -> tuple[Any, ...]:
    """Of a call that returns all that it can."""
    mean, var, weight, bias = vectors(x.shape[1])
    other = torch.randn_like(x)
    if name == "forward":
        return x, mean, var, weight, bias, other, 1e-5, code, 0.2, False, True
    if name == "forward_pair":
        branch = (mean, var, weight, bias, 1e-5)
        return x, *branch, other, *branch, code, 0.2, False, True
    mask = torch.randint(256, ((x.numel() + 7) // 8,), dtype=torch.uint8)
    coefficients = torch.rand(4, x.shape[1])
    gradients = (torch.empty(x.shape[1]), torch.empty(x.shape[1]))
    saved = (coefficients, mask, other, None)
    return x, *saved, code, 0.2, *gradients, x.stride(), True, True


def assert_same(ours: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    assert len(ours) == len(expected)
    for got, right in zip(ours, expected, strict=True):
        if got is None or right is None:
            assert got is right
        else:
            assert got.stride() == right.stride()
            torch.testing.assert_close(got, right, rtol=0, atol=0)


@pytest.fixture(params=SLOW)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@needs_fast_calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (1, 3), (2, 4, 130, 130)])
def test_plain_tensors_do_not_need_the_slow_function(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    arguments = arguments_of(name, torch.randn(shape).to(dtype))
    assert_same(_C.calling(name, unreachable)(*arguments), SLOW[name](*arguments))


@needs_fast_calls
def test_channels_last_do_not_need_it_either(name: str) -> None:
    x = torch.randn(2, 5, 6, 7).to(memory_format=torch.channels_last)
    arguments = arguments_of(name, x)
    assert_same(_C.calling(name, unreachable)(*arguments), SLOW[name](*arguments))


@pytest.mark.parametrize("code", [0, LEAKY_RELU, 4])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_results_that_are_asked_for(code: int, inplace: bool, save: bool) -> None:
    x = torch.randn(2, 5, 3, 7)
    *arguments, _, _ = arguments_of("forward", x, code)[1:]
    expected = ops._forward(x.clone(), *arguments, inplace, save)
    results = ops.forward(x, *arguments, inplace, save)
    assert_same(results, expected)
    assert (results[0] is x) is inplace
    assert (results[1] is not None) is save
    assert (results[2] is not None) is (save and code == LEAKY_RELU)


def sliced(x: Tensor) -> Tensor:
    return x[..., ::2]


@pytest.mark.parametrize(
    "change",
    [
        sliced,
        lambda x: x[:0],
        lambda x: x.as_subclass(TensorOfOurs),
        lambda x: x[:1].expand(3, -1, -1),
    ],
    ids=["sliced", "empty", "subclass", "expanded"],
)
def test_others_are_left_to_the_slow_function(
    name: str, change: Callable[[Tensor], Tensor]
) -> None:
    called = []

    def slow(*arguments: Any) -> Any:
        called.append(name)
        return SLOW[name](*arguments)

    x = change(torch.randn(2, 5, 6))
    arguments = arguments_of(name, x)
    if name == "backward":  # the strides are those of a dense tensor
        arguments = (*arguments[:9], torch.empty(x.shape).stride(), *arguments[10:])
        results = _C.calling(name, slow)(*arguments)
        assert all(r is not None and r.shape == x.shape for r in results)
    else:
        assert_same(_C.calling(name, slow)(*arguments), SLOW[name](*arguments))
        assert called == [name]


class Interrupting(TorchDispatchMode):
    """Runs what it sees, and then raises, once, what no operator raises."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append(func.__name__.partition(".")[0])
        if func.namespace == "frozen_bn" and self.seen.count(self.seen[-1]) == 1:
            raise KeyboardInterrupt
        return result


def test_a_dispatch_mode_sees_what_is_made_and_its_errors_are_raised(name: str) -> None:
    arguments = arguments_of(name, torch.randn(2, 5, 3, 7))
    with Interrupting() as mode, pytest.raises(KeyboardInterrupt):
        FAST_OR_SLOW[name](*arguments)
    assert mode.seen.count(name) == 1
    assert any(seen.startswith(("empty", "new_empty")) for seen in mode.seen)


def test_interrupted_in_place_runs_once() -> None:
    x = torch.randn(2, 5, 3, 7)
    mean, var, weight, bias = vectors(5)
    expected = frozen_batch_norm(x, mean, var, weight, bias)
    with Interrupting(), pytest.raises(KeyboardInterrupt):
        frozen_batch_norm(x, mean, var, weight, bias, inplace=True)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dims", [65, 102])
def test_many_dimensions(dims: int) -> None:
    x = torch.randn([2, 3] + [1] * (dims - 2), requires_grad=True)
    grad = torch.randn_like(x)
    results = []
    for function in (frozen_batch_norm, reference.frozen_batch_norm):
        torch.manual_seed(0)
        y = function(x, *vectors(3), activation="relu")
        results.append((y, *torch.autograd.grad(y, [x], grad)))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got.reshape(6), right.reshape(6))


def test_many_empty_dimensions() -> None:
    x = torch.empty([0] * 2000)
    assert frozen_batch_norm(x, *(v[:0] for v in vectors(3))).shape == x.shape


def test_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        arguments = arguments_of(name, torch.randn(2, 5, 3, 7))
        results = FAST_OR_SLOW[name](*arguments)
        assert all(type(r) is type(arguments[0]) for r in results)


@pytest.mark.parametrize("position, wrong", [(1, None), (1, 3.0), (0, "x"), (6, "eps")])
def test_arguments_of_other_types_raise_as_torch_ops_does(position: int, wrong: Any) -> None:
    arguments = [*arguments_of("forward", torch.randn(2, 5, 3, 7))]
    arguments[position] = wrong
    with pytest.raises((RuntimeError, AttributeError, TypeError)) as expected:
        ops._forward(*arguments)
    with pytest.raises(type(expected.value)):
        ops.forward(*arguments)


def test_a_failed_check_raises_what_torch_ops_raises(name: str) -> None:
    arguments = [*arguments_of(name, torch.randn(2, 5, 3, 7))]
    arguments[1] = torch.rand(7)
    with pytest.raises(RuntimeError) as expected:
        SLOW[name](*arguments)
    with pytest.raises(RuntimeError) as error:
        FAST_OR_SLOW[name](*arguments)
    assert str(error.value) == str(expected.value)
    assert "got" in str(error.value)


def test_nothing_is_kept(name: str) -> None:
    """Neither by calls that succeed nor by calls that fail half-way."""
    arguments = arguments_of(name, torch.randn(2, 5, 3, 7))
    broken = (*arguments[:2], "no tensor", *arguments[3:])
    tensors = [a for a in arguments if isinstance(a, Tensor)]

    def references() -> list[tuple[int, int]]:
        return [(sys.getrefcount(t), t._use_count()) for t in tensors]

    FAST_OR_SLOW[name](*arguments)
    before = references()
    for _ in range(10):
        results = FAST_OR_SLOW[name](*arguments)
        with pytest.raises(RuntimeError):
            FAST_OR_SLOW[name](*broken)
    assert references() == before
    assert all(r is None or r._use_count() == results[0]._use_count() for r in results)


def test_unknown_names_are_refused() -> None:
    if FAST:
        with pytest.raises(KeyError, match="no operator is called sideways"):
            _C.calling("sideways", unreachable)
