"""Transforms of functions, through whole networks: frozen, fused and folded ones behave under each
as the network does whose BatchNorms are in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import outputs_and_gradients, randomize_
from nets import CONVERSIONS, Block
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from frozen_bn import convert_frozen_bn

State = dict[str, Tensor]
Function = Callable[[State, Tensor], Tensor]

BATCH, CHANNELS = 2, 2
IMAGE = (BATCH, CHANNELS, 4, 3)


def loss_of(call: Function) -> Function:
    return lambda state, x: call(state, x).square().sum()


def of_dual_numbers(call: Function, state: State, x: Tensor) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return tuple(forward_ad.unpack_dual(call(state, dual)))


def of_double_backward(call: Function, state: State, x: Tensor) -> Any:
    leaves = [value.clone().requires_grad_() for value in state.values()]
    given = dict(zip(state, leaves, strict=True))
    first = torch.autograd.grad(loss_of(call)(given, x), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)


def of_batched_gradients(call: Function, state: State, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    y = call(state, x)
    directions = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    return torch.autograd.grad(y, x, directions, is_grads_batched=True)


def tangents(state: State) -> State:
    return {name: torch.ones_like(value) for name, value in state.items()}


TRANSFORMS: dict[str, Callable[[Function, State, Tensor], Any]] = {
    "functional_call": lambda call, state, x: call(state, x),
    "grad": lambda call, state, x: grad(loss_of(call), (0, 1))(state, x),
    "grad of grad": lambda call, state, x: grad(
        lambda x: grad(loss_of(call), 1)(state, x).square().sum()
    )(x),
    "vjp": lambda call, state, x: vjp(call, state, x)[1](torch.ones(BATCH, CHANNELS).to(x)),
    "jvp": lambda call, state, x: jvp(call, (state, x), (tangents(state), torch.ones_like(x))),
    "jacrev": lambda call, state, x: jacrev(call, (0, 1))(state, x),
    "jacfwd": lambda call, state, x: jacfwd(call, (0, 1))(state, x),
    "hessian": lambda call, state, x: hessian(loss_of(call), 1)(state, x),
    "vmap": lambda call, state, x: vmap(call, (None, 0))(state, x.unsqueeze(1)),
    "vmap over the networks of an ensemble": lambda call, state, x: vmap(call, (0, None))(
        {name: torch.stack([value, 2 * value]) for name, value in state.items()}, x
    ),
    "vmap of grad": lambda call, state, x: vmap(grad(loss_of(call)), (None, 0))(
        state, x.unsqueeze(1)
    ),
    "forward-mode AD": of_dual_numbers,
    "double backward": of_double_backward,
    "batched gradients": of_batched_gradients,
}


def networks(conversion: str, activation: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network with live layers in eval mode, and the same converted."""
    torch.manual_seed(1)
    live = randomize_(Block(CHANNELS, activation)).double().eval()
    return live, convert_frozen_bn(copy.deepcopy(live), **CONVERSIONS[conversion])


@pytest.mark.covering(2)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(transform, conversion, activation):
    live, frozen = networks(conversion, activation)
    state = {name: p.detach() for name, p in frozen.named_parameters()}
    x = torch.randn(IMAGE, dtype=torch.float64)
    expected, actual = (
        TRANSFORMS[transform](lambda state, x, m=m: functional_call(m, state, x), state, x)
        for m in (live, frozen)
    )
    assert tree_leaves(actual)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_ordinary_calls_before_and_after_a_transform(conversion):
    """Nothing of the transform stays behind: a kept folded weight, say."""
    live, frozen = networks(conversion, nn.ReLU)
    state = {name: 3 * p.detach() for name, p in frozen.named_parameters()}
    x = torch.randn(IMAGE, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), live(x))
            vmap(lambda x: functional_call(frozen, state, x))(x.unsqueeze(1))


# Hooks and modes of autograd


def assert_same_gradients(frozen: nn.Module, live: nn.Module) -> None:
    x = torch.randn(IMAGE, dtype=torch.float64)
    actual, expected = outputs_and_gradients(frozen, x), outputs_and_gradients(live, x)
    torch.testing.assert_close(actual, {name: expected[name] for name in actual})


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_anomaly_mode(conversion):
    live, frozen = networks(conversion, nn.ReLU)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert_same_gradients(frozen, live)


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_anomaly_mode_names_the_node_that_made_a_nan(conversion):
    _, frozen = networks(conversion, nn.ReLU)
    x = torch.randn(IMAGE, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        y = frozen(x)
        with (
            pytest.warns(UserWarning, match="Error detected in .*Traceback of forward call"),
            pytest.raises(RuntimeError, match="returned nan values"),
        ):
            y.backward(torch.full_like(y, torch.nan))


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_saved_tensors_may_move_away_and_back(conversion):
    """Offloading: what the backward gets is not the object that the forward saved."""
    live, frozen = networks(conversion, nn.SiLU)
    moved: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        moved.append(tensor)
        return tensor.numpy(force=True).copy(), tensor.dtype

    def unpack(packed: Any) -> Tensor:
        return torch.from_numpy(packed[0]).to(packed[1])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert_same_gradients(frozen, live)
    assert moved


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_checkpointing(conversion, use_reentrant):
    live, frozen = networks(conversion, nn.ReLU)

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    assert_same_gradients(Checkpointed(frozen), Checkpointed(live))
