"""The autograd node in C++: where it serves, and that it does what Python's does."""

from __future__ import annotations

import gc
import itertools
import re
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.replace import pythons_node
from fresh import run_fresh
from helpers import ACTIVATIONS
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from frozen_bn import (
    _C,
    FrozenBatchNorm2d,
    frozen_batch_norm,
    functional,
    pair,
    reference,
    show_config,
)
from frozen_bn import node as nodes
from frozen_bn.checks import Statistics
from frozen_bn.pair import frozen_batch_norm_pair

needs_compiled = pytest.mark.skipif(nodes.compiled is None, reason=f"Python's: {nodes.why_not}")
both_nodes = pytest.mark.usefixtures("node")

C = 5
SHAPE = (2, C, 3, 7)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def vectors(channels: int = C) -> list[Tensor]:
    return [torch.rand(channels) + 0.5 for _ in range(4)]


# ---- Which serves


NAME = """
import torch, frozen_bn
x, v = torch.randn(1, 2, 3, 3, requires_grad=True), torch.ones(2)
print(type(frozen_bn.frozen_batch_norm(x, v, v).grad_fn).__name__)
print(frozen_bn.show_config())
"""


def test_the_environment_chooses():
    text = run_fresh(NAME, FROZEN_BN_NODE="0")
    assert text.startswith("_FrozenBatchNormBackward\n")
    assert re.search(r"^autograd node: +Python's \(FROZEN_BN_NODE=0\)$", text, re.MULTILINE)


@needs_compiled
def test_the_compiled_one_serves_the_torch_that_it_was_built_for():
    assert nodes._minor(nodes.compiled.built_with) == nodes._minor(torch.__version__)
    assert _C.build_info()["torch"] == nodes.compiled.built_with
    x = torch.randn(SHAPE, requires_grad=True)
    statistics = Statistics(*vectors())
    assert frozen_batch_norm(x, *vectors()).grad_fn.name() == "FrozenBatchNormBackward"
    y = frozen_batch_norm_pair(x, statistics, x, statistics)
    assert y.grad_fn.name() == "FrozenBatchNormPairBackward"
    assert re.search(r"^autograd node: +compiled$", show_config(), re.MULTILINE)


@needs_compiled
@pytest.mark.parametrize("broken", ["another torch", "does not load", "not built", "no kernels"])
def test_elsewhere_pythons_serves_and_says_why(broken, monkeypatch):
    if broken == "another torch":
        monkeypatch.setattr(_C, "build_info", lambda: {"torch": "2.9.1+cu128"})
        expected = "the compiled one is for torch 2.9"
    elif broken == "does not load":

        def fail(name: str) -> None:
            raise ImportError("undefined symbol: _ZN2at")

        monkeypatch.setattr(nodes, "import_module", fail)
        expected = "undefined symbol: _ZN2at"
    elif broken == "not built":
        monkeypatch.setattr(nodes, "__file__", "/nowhere/node.py")
        expected = "the compiled one was not built"
    else:
        monkeypatch.setattr(nodes.ops, "live", set())
        expected = "no operators"
    assert nodes._load() == (None, expected)


# ---- The same as Python's


def graph_of(
    activation: str | None,
    dtype: torch.dtype,
    channels_last: bool,
    inplace: bool,
    kind: str,
    trained: tuple[str, ...],
) -> list[Tensor]:
    """The output, and gradients of what is trained."""
    torch.manual_seed(3)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, r = (torch.randn(SHAPE).to(dtype, memory_format=layout) for _ in range(2))
    first, second = vectors(), vectors()
    leaves = {"input": x, "residual": r, "weight": first[2], "bias": first[3]}
    for name in trained:
        leaves[name].requires_grad_()
    h = x * 1
    options = {"activation": activation, "negative_slope": 0.2, "inplace": inplace}
    if kind == "pair":
        y = frozen_batch_norm_pair(h, Statistics(*first), r, Statistics(*second), **options)
    else:
        y = frozen_batch_norm(h, *first, residual=r if kind == "residual" else None, **options)
    assert (y is h) == inplace
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if kind == "single":
        wanted = [leaf for leaf in wanted if leaf is not r]
    grad = torch.randn(SHAPE).to(dtype)
    return [y.detach(), *(torch.autograd.grad(y, wanted, grad) if y.requires_grad else ())]


KINDS = {
    "single": ["input", "weight", "bias"],
    "residual": ["input", "residual", "weight", "bias"],
    "pair": ["input", "residual"],
}


@pytest.mark.covering(2)
@needs_compiled
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_give_the_same_bits(activation, kind, inplace):
    names = KINDS[kind]
    trainables = [c for n in range(len(names) + 1) for c in itertools.combinations(names, n)]
    for dtype, channels_last in itertools.product(DTYPES, [False, True]):
        for trained in trainables:
            given = (activation, dtype, channels_last, inplace, kind, trained)
            ours = graph_of(*given)
            with pythons_node():
                expected = graph_of(*given)
            assert [t.stride() for t in ours] == [t.stride() for t in expected], given
            torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dims", [65, 102])
@both_nodes
def test_many_dimensions(dims):
    x = torch.randn([2, 3] + [1] * (dims - 2), requires_grad=True)
    grad = torch.randn_like(x)
    results = []
    for function in (frozen_batch_norm, reference.frozen_batch_norm):
        torch.manual_seed(0)
        y = function(x, *vectors(3), activation="relu")
        results.append((y, *torch.autograd.grad(y, [x], grad)))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got.reshape(6), right.reshape(6))


@both_nodes
def test_many_empty_dimensions():
    x = torch.empty([0] * 2000)
    assert frozen_batch_norm(x, *(v[:0] for v in vectors())).shape == x.shape


# ---- Who else looks on


class TensorOfOurs(Tensor):
    pass


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


@both_nodes
@pytest.mark.parametrize("where", ["forward", "pair", "backward"])
def test_a_dispatch_mode_sees_what_is_made_and_its_errors_are_raised(where):
    x = torch.randn(SHAPE, requires_grad=True)
    statistics = Statistics(*vectors())
    y = frozen_batch_norm(x, *vectors(), activation="relu")
    with Interrupting() as mode, pytest.raises(KeyboardInterrupt):
        if where == "forward":
            frozen_batch_norm(x, *vectors(), activation="relu")
        elif where == "pair":
            frozen_batch_norm_pair(x, statistics, x, statistics)
        else:
            y.backward(torch.ones_like(y))
    operator = {"pair": "forward_pair"}.get(where, where)
    assert mode.seen.count(operator) == 1
    assert any(seen.startswith(("empty", "new_empty")) for seen in mode.seen)


@both_nodes
def test_interrupted_in_place_runs_once():
    x, given = torch.randn(SHAPE), vectors()
    expected = frozen_batch_norm(x, *given)
    with Interrupting(), pytest.raises(KeyboardInterrupt):
        frozen_batch_norm(x, *given, inplace=True)
    assert torch.equal(x, expected)


@both_nodes
def test_subclasses_stay_what_they_are():
    x = torch.randn(SHAPE)
    y = frozen_batch_norm(x.as_subclass(TensorOfOurs).requires_grad_(), *vectors())
    assert type(y) is TensorOfOurs and y.requires_grad
    layer = FrozenBatchNorm2d(C)
    assert type(layer(x.as_subclass(TensorOfOurs))) is TensorOfOurs


@both_nodes
def test_fake_tensors():
    with FakeTensorMode():
        x = torch.randn(SHAPE, requires_grad=True)
        y = frozen_batch_norm(x, *vectors(), activation="relu")
        assert type(y) is type(x) and y.shape == x.shape and y.requires_grad


@both_nodes
@pytest.mark.parametrize("run", ["run", "run_pair"])
@pytest.mark.parametrize("wrong", [None, 3.0, "x"])
@pytest.mark.parametrize("position", [0, 1, 3, 6])
def test_arguments_of_other_types_raise_what_torch_raises(position, wrong, run):
    own = [*vectors(), 1e-5]
    if run == "run":
        module, given = functional, [torch.randn(SHAPE), *own[:4], None, 1e-5, 0, 0.1, False, False]
    else:
        x = torch.randn(SHAPE)
        module, given = pair, [x, *own, x, *own, 0, 0.1, False]
    if wrong is None and position == 3:
        return  # no weight
    if wrong == 3.0 and (run, position) == ("run", 6):
        return
    given[position] = wrong
    with pytest.raises((RuntimeError, AttributeError, TypeError)) as expected:
        module._run(*given)
    with pytest.raises(type(expected.value)) as error:
        module.run(*given)
    assert str(error.value) == str(expected.value)


@needs_compiled
def test_a_wrong_number_of_arguments_raises():
    for function in (functional.run, pair.run):
        with pytest.raises(TypeError):
            function(torch.randn(SHAPE))
    with pytest.raises(TypeError, match="8 arguments"):
        nodes.compiled.bind(1)


# ---- As any node


@both_nodes
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_second_backward_needs_a_kept_graph(activation):
    x = torch.randn(SHAPE, requires_grad=True)
    y = frozen_batch_norm(x, *vectors(), activation=activation).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y, x))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x)


@both_nodes
@pytest.mark.parametrize("changed", ["input", "residual", "weight"])
def test_a_saved_tensor_that_changed_is_reported(changed):
    mean, var, weight, bias = vectors()
    x, r = (torch.randn(SHAPE).requires_grad_() for _ in range(2))
    tensors = {"input": x * 1, "residual": r * 1, "weight": weight.requires_grad_()}
    y = frozen_batch_norm(
        tensors["input"], mean, var, weight, bias, residual=tensors["residual"], activation="silu"
    )
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@both_nodes
def test_no_gradient_in_no_gradient_out():
    x = torch.randn(SHAPE, requires_grad=True)
    statistics = Statistics(*vectors())
    for y in (
        frozen_batch_norm(x, *vectors()),
        frozen_batch_norm_pair(x, statistics, x, statistics),
    ):
        Nothing.apply(y).sum().backward()
        assert x.grad is None


@both_nodes
def test_gradients_of_what_is_asked_for_only():
    mean, var, weight, bias = vectors()
    x, r = (torch.randn(SHAPE).requires_grad_() for _ in range(2))
    leaves = [x, weight.requires_grad_(), bias.requires_grad_(), r]
    y = frozen_batch_norm(x, mean, var, weight, bias, residual=r, activation="relu").square().sum()
    together = torch.autograd.grad(y, leaves, retain_graph=True)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(y, leaf, retain_graph=True)
        assert torch.equal(alone, expected)


@both_nodes
def test_hooks_change_gradients():
    x = torch.randn(SHAPE, requires_grad=True)
    given = vectors()
    y = frozen_batch_norm(x, *given)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    y.register_hook(lambda g: 2 * g)
    y.grad_fn.register_hook(lambda inputs, _: (3 * inputs[0], *inputs[1:]))
    y.grad_fn.register_prehook(lambda outputs: (5 * outputs[0],))
    torch.testing.assert_close(*torch.autograd.grad(y.sum(), x), 30 * expected)


@both_nodes
def test_errors_in_a_differentiable_backward_reach_the_caller(monkeypatch):
    def fail(*arguments: Any) -> Any:
        raise KeyError("no such formula")

    x = torch.randn(SHAPE, requires_grad=True)
    y = frozen_batch_norm(x, *vectors())
    monkeypatch.setattr(reference, "backward", fail)
    with pytest.raises(KeyError, match="no such formula"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@needs_compiled  # one made in Python cannot be
def test_the_node_is_called_by_hand():
    x = torch.randn(SHAPE, requires_grad=True)
    y = frozen_batch_norm(x, *vectors(), activation="relu")
    grad = torch.randn(SHAPE)
    (expected,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    with torch.no_grad():
        assert torch.equal(y.grad_fn(grad)[0], expected)


@needs_compiled
def test_compiled_autograd_is_told_what_to_do():
    y = frozen_batch_norm(torch.randn(SHAPE, requires_grad=True), *vectors())
    with (
        compiled_autograd._enable(lambda graph: graph),
        pytest.raises(NotImplementedError, match="FROZEN_BN_NODE=0 in the environment"),
    ):
        y.sum().backward()


@both_nodes
def test_deep_graphs_end():
    h = torch.randn(1, C, 1, 1, requires_grad=True) * 1
    given = vectors()
    for _ in range(20_000):
        h = frozen_batch_norm(h, *given, inplace=True)
    del h


@both_nodes
def test_threads_of_their_own():
    """Forward and backward on tensors large enough to let the others go on."""
    x, given = torch.randn(1, C, 100, 100), vectors()

    def work() -> Tensor:
        leaf = x.clone().requires_grad_()
        frozen_batch_norm(leaf, *given, activation="silu").square().sum().backward()
        return leaf.grad

    expected, results = work(), []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    torch.testing.assert_close(results, [expected] * 4, rtol=0, atol=0)


# ---- Nothing is kept


@pytest.mark.covering(2)
@both_nodes
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", ["single", "pair"])
def test_nothing_is_kept(kind, activation, recorded):
    """Neither by calls that succeed nor by calls that fail half-way."""
    x, r = (torch.randn(SHAPE).requires_grad_(recorded) for _ in range(2))
    statistics = vectors()
    broken = [statistics[0], torch.rand(C + 2), *statistics[2:]]

    def call(given: list[Tensor]) -> Tensor:
        if kind == "single":
            return frozen_batch_norm(x, *given, residual=r, activation=activation)
        first, second = Statistics(*given), Statistics(*statistics)
        return frozen_batch_norm_pair(x, first, r, second, activation=activation)

    def use() -> None:
        y = call(statistics)
        if recorded:
            torch.autograd.grad(y.sum(), [x, r], create_graph=True)
            torch.autograd.grad(call(statistics).sum(), [x, r])
        with pytest.raises(RuntimeError, match="expected running_var to have shape"):
            call(broken)

    tensors = [x, r, *statistics]

    def references() -> list[tuple[int, int]]:
        gc.collect()
        return [(sys.getrefcount(t), t._use_count()) for t in tensors]

    use()
    before = references()
    for _ in range(3):
        use()
    assert references() == before


@both_nodes
def test_what_a_node_keeps_dies_with_it():
    weight = torch.rand(C).requires_grad_()
    x = torch.randn(SHAPE)
    mean, var, _, bias = vectors()
    y = frozen_batch_norm(x, mean, var, weight, bias)
    saved = weakref.ref(x)
    del x
    assert saved() is not None
    del y
    gc.collect()
    assert saved() is None


# ---- Modules


@needs_compiled
def test_a_module_calls_it_at_once(monkeypatch):
    """Past the Python that looks for what is not there."""
    layer = FrozenBatchNorm2d(C, activation="relu")

    def unreachable(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the slow way was gone")

    monkeypatch.setattr(FrozenBatchNorm2d, "normalize", unreachable)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(layer(x), torch.relu(x / (1 + 1e-5) ** 0.5))
    with pytest.raises(AssertionError, match="slow way"):
        layer(x[0])  # to be refused in the words of Python
    with torch.device("cpu"), pytest.raises(AssertionError, match="slow way"):
        layer(x)  # a TorchFunctionMode


@needs_compiled
@pytest.mark.parametrize(
    "change",
    [
        lambda given: given | {"running_mean": given["running_mean"].requires_grad_()},
        lambda given: given | {"activation": "sideways"},
        lambda given: given | {"activation": []},
        lambda given: given | {"eps": "x"},
        lambda given: given | {"inplace": 1},
        lambda given: given | {"input": given["input"].to_sparse()},
        lambda given: given | {"input": given["input"].to("meta")},
        lambda given: given | {"ranks": (3, 5)},
    ],
)
def test_what_is_not_plain_is_not_called(change: Callable[[dict[str, Any]], dict[str, Any]]):
    mean, var, weight, bias = vectors()
    given = {
        **{"input": torch.randn(SHAPE), "running_mean": mean, "running_var": var},
        **{"weight": weight, "bias": bias, "eps": 1e-5, "activation": "relu"},
        **{"negative_slope": 0.1, "residual": None, "inplace": False, "ranks": (3, 4)},
    }
    buffers = {name: given[name] for name in ("running_mean", "running_var", "weight")}

    def call_layer(given: dict[str, Any]) -> Any:
        own = buffers | {name: given[name] for name in buffers}
        parameters = {"bias": given["bias"]}
        return nodes.compiled.call_layer(given["input"], own, parameters, *[*given.values()][5:])

    assert torch.equal(call_layer(given), nodes.compiled.call(*given.values()))
    other = change(given)
    assert nodes.compiled.call(*other.values()) is NotImplemented
    assert call_layer(other) is NotImplemented


@needs_compiled
def test_code_that_is_not_that_of_an_activation_goes_to_python():
    x = torch.randn(SHAPE)
    with pytest.raises(RuntimeError, match="activation to be a code from 0 to 5, but got 17"):
        functional.run(x, *vectors(), None, 1e-5, 17, 0.1, False, False)
