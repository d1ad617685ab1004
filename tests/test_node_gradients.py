"""The gradient of the input may be written over the gradient that comes in, but never over one that
somebody else has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator.replace import pythons_node
from helpers import ACTIVATIONS
from torch import Tensor

from frozen_bn import frozen_batch_norm
from frozen_bn import node as nodes
from frozen_bn.checks import Statistics
from frozen_bn.pair import frozen_batch_norm_pair

SHAPE = (2, 5, 3, 7)
Layer = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.skipif(nodes.compiled is None, reason=f"Python's node: {nodes.why_not}")


def vectors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(SHAPE[1], generator=generator) + 0.5 for _ in range(4)]


def leaf(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def weights(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(9))


class Seen:
    """Where the gradients of tensors were, without keeping them."""

    def __init__(self, *tensors: Tensor) -> None:
        self.at: list[int] = []
        for tensor in tensors:
            tensor.register_hook(lambda g: self.at.append(g.data_ptr()))


def addresses(layer: Layer, x: Tensor, channels_last: bool = False) -> list[int]:
    """Of the gradient of its output, and of its input; each is nobody else's."""
    h = x * 1
    y = layer(h)
    seen = Seen(y, h)
    factor = weights(y)
    factor = factor.to(memory_format=torch.channels_last) if channels_last else factor
    (y * factor).sum().backward()
    return seen.at


# ---- Where it is


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gradient_of_nobody_elses_is_overwritten(activation, trained, channels_last):
    mean, var, weight, bias = vectors()
    weight.requires_grad_(trained)
    x = leaf(1).detach()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    outgoing, incoming = addresses(
        lambda h: frozen_batch_norm(h, mean, var, weight, bias, activation=activation),
        x.requires_grad_(),
        channels_last,
    )
    assert incoming == outgoing


@pytest.mark.parametrize("residual", ["", "constant", "trained"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_behind_a_residual_too_unless_it_is_the_residuals_gradient(activation, residual):
    r = leaf(2).requires_grad_(residual == "trained") if residual else None
    outgoing, incoming = addresses(
        lambda h: frozen_batch_norm(h, *vectors(), activation=activation, residual=r), leaf(1)
    )
    shared = residual == "trained" and activation is None
    assert (incoming == outgoing) == (not shared)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_pairs_is_overwritten(activation):
    first, second = Statistics(*vectors()), Statistics(*vectors())
    outgoing, incoming = addresses(
        lambda h: frozen_batch_norm_pair(h, first, leaf(2), second, activation=activation), leaf(1)
    )
    assert incoming == outgoing


# ---- Where it must not be. Each returns gradients, and what was kept while they were made.


def hook_that_keeps(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []
    y = layer(x)
    y.register_hook(kept.append)
    (y * weights(y)).sum().backward()
    return [x.grad, *kept]


def hook_that_keeps_a_view(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []
    y = layer(x)
    y.register_hook(lambda g: kept.append(g.detach()[:1]))
    (y * weights(y)).sum().backward()
    return [x.grad, *kept]


def hook_that_keeps_the_storage(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []
    y = layer(x)
    y.register_hook(lambda g: kept.append(g.untyped_storage()))
    (y * weights(y)).sum().backward()
    return [x.grad, torch.tensor(kept[0].tolist())]


def hook_of_the_node(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []
    y = layer(x)
    y.grad_fn.register_hook(lambda inputs, outputs: kept.extend(outputs))
    (y * weights(y)).sum().backward()
    return [x.grad, *kept]


def prehook_of_the_node(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []
    y = layer(x)
    y.grad_fn.register_prehook(kept.extend)
    (y * weights(y)).sum().backward()
    return [x.grad, *kept]


def retain_grad(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x)
    y.retain_grad()
    (y * weights(y)).sum().backward()
    return [x.grad, y.grad]


def asked_for(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x)
    return [*torch.autograd.grad((y * weights(y)).sum(), [y, x])]


def two_nodes(layer: Layer) -> list[Tensor]:
    a, b = leaf(1), leaf(2)
    y = layer(a) + layer(b)
    (y * weights(y)).sum().backward()
    return [a.grad, b.grad]


def a_leaf_first(layer: Layer) -> list[Tensor]:
    """It takes the gradient over as its own."""
    a, b = leaf(1), leaf(2)
    y = layer(a) + b
    (y * weights(y)).sum().backward()
    return [a.grad, b.grad]


def a_node_that_hands_it_on(layer: Layer) -> list[Tensor]:
    a, b = leaf(1), leaf(2)
    y = layer(a) + b.view(SHAPE).add(1).exp()
    (y * weights(y)).sum().backward()
    return [a.grad, b.grad]


def grad_outputs(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x)
    given = weights(y)
    return [*torch.autograd.grad(y, x, given), given]


def given_to_backward(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x)
    given = weights(y)
    y.backward(given)
    return [x.grad, given]


def twice(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x)
    given = weights(y)
    first = torch.autograd.grad(y, x, given, retain_graph=True)
    return [*first, *torch.autograd.grad(y, x, given)]


class HandsOn(torch.autograd.Function):
    """Its backward hands on what ``make`` makes of the gradient, and keeps things."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.make = make
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.make(grad * 1), None


def kept_by_a_function(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []
    y = HandsOn.apply(layer(x), lambda g: (kept.append(g), g)[1])
    (y * weights(y)).sum().backward()
    return [x.grad, *kept]


def view_of_a_kept_tensor(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []

    def make(grad: Tensor) -> Tensor:
        kept.append(torch.stack([grad, grad]))
        return kept[0][1]

    y = HandsOn.apply(layer(x), make)
    (y * weights(y)).sum().backward()
    return [x.grad, *kept]


def numpys_memory(layer: Layer) -> list[Tensor]:
    x, kept = leaf(1), []

    def make(grad: Tensor) -> Tensor:
        kept.append(grad.numpy().copy())
        return torch.from_numpy(kept[0])

    y = HandsOn.apply(layer(x), make)
    (y * weights(y)).sum().backward()
    return [x.grad, torch.tensor(kept[0])]


def expanded(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    layer(x).sum().backward()
    return [x.grad]


def expanded_in_part(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x).sum(2)
    (y * weights(y)).sum().backward()
    return [x.grad]


def of_other_strides(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x)
    (y * weights(y).to(memory_format=torch.channels_last)).sum().backward()
    return [x.grad.contiguous()]


def twice_differentiated(layer: Layer) -> list[Tensor]:
    x = leaf(1)
    y = layer(x)
    first, dy = torch.autograd.grad((y.square() * weights(y)).sum(), [x, y], create_graph=True)
    second = torch.autograd.grad(first.square().sum(), x)
    return [first.detach(), dy.detach(), *second]


def two_threads(layer: Layer) -> list[Tensor]:
    """Each through the same node, with the same gradient."""
    x = leaf(1)
    y = layer(x)
    z = (y * weights(y)).sum()
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            results.extend(torch.autograd.grad(z, [y, x], retain_graph=True))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    return results


SCENARIOS = [
    *(hook_that_keeps, hook_that_keeps_a_view, hook_that_keeps_the_storage, hook_of_the_node),
    *(prehook_of_the_node, retain_grad, asked_for, two_nodes, a_leaf_first),
    *(a_node_that_hands_it_on, grad_outputs, given_to_backward, twice, kept_by_a_function),
    *(view_of_a_kept_tensor, numpys_memory, expanded, expanded_in_part, of_other_strides),
    *(twice_differentiated, two_threads),
]


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_a_gradient_that_somebody_has_stays_as_it_is(scenario, activation):
    def layer(x: Tensor) -> Tensor:
        return frozen_batch_norm(x, *vectors(), activation=activation)

    ours = scenario(layer)
    with pythons_node():  # which never overwrites
        expected = scenario(layer)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", ["residual", "bias", "pair"])
def test_gradients_that_are_shared_or_two(kind, activation):
    """What the residual gets is, without an activation, the very gradient that comes in."""
    first, second = Statistics(*vectors()), Statistics(*vectors())

    def gradients() -> list[Tensor]:
        x, r, bias = leaf(1), leaf(2), leaf(3, (SHAPE[1],))
        options = {"activation": activation}
        if kind == "pair":
            y = frozen_batch_norm_pair(x * 1, first, r * 1, second, **options)
        elif kind == "bias":
            y = frozen_batch_norm(x * 1, *vectors()[:3], bias, residual=r * 1, **options)
        else:
            y = frozen_batch_norm(x * 1, *vectors(), residual=r * 1, **options)
        (y * weights(y)).sum().backward()
        return [t.grad for t in (x, r, bias) if t.grad is not None]

    ours = gradients()
    with pythons_node():
        torch.testing.assert_close(ours, gradients(), rtol=0, atol=0)


def test_chains_of_layers():
    """Gradients go through many nodes, and some of them share."""

    def gradients() -> list[Tensor]:
        x = leaf(1)
        h = x * 1
        for activation in ACTIVATIONS * 3:
            y = frozen_batch_norm(h, *vectors(), activation=activation)
            h = frozen_batch_norm(y, *vectors(), activation="relu", residual=h)
            h = frozen_batch_norm(h, *vectors(), residual=y)
        (h * weights(h)).mean().backward()
        return [x.grad]

    ours = gradients()
    with pythons_node():
        torch.testing.assert_close(ours, gradients(), rtol=0, atol=0)
