"""Half precision and memory formats, through networks converted in every way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import outputs_and_gradients, randomize_, snapshot
from nets import CONVERSIONS, Block
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import frozen_bn
from frozen_bn import convert_frozen_bn

HALVES = [torch.float16, torch.bfloat16]
CHANNELS = 8
IMAGE = (4, CHANNELS, 9, 7)

halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
conversions = pytest.mark.parametrize("conversion", CONVERSIONS)


def networks(conversion: str) -> tuple[nn.Module, nn.Module]:
    """A network with live layers in eval mode, and the same converted."""
    torch.manual_seed(1)
    live = randomize_(Block(CHANNELS, nn.SiLU)).eval()  # smooth: rounding flips no kink
    return live, convert_frozen_bn(copy.deepcopy(live), **CONVERSIONS[conversion])


def errors(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative, of each tensor."""
    return {
        name: float((value.double() - exact[name]).norm() / exact[name].norm())
        for name, value in values.items()
    }


def assert_as_exact(frozen: nn.Module, live: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """No further from float64 than eval mode is, but for luck in the rounding."""
    exact = outputs_and_gradients(copy.deepcopy(live).double(), x.double())
    with torch.autocast("cpu", dtype, enabled=x.dtype == torch.float32):
        ours, theirs = outputs_and_gradients(frozen, x), outputs_and_gradients(live, x)
    allowed = errors(theirs, exact)
    eps = torch.finfo(dtype).eps
    for name, error in errors(ours, exact).items():
        assert error <= 1.5 * allowed[name] + eps, name
        assert ours[name].dtype == theirs[name].dtype


@halves
@conversions
def test_autocast(conversion, dtype):
    live, frozen = networks(conversion)
    before = snapshot(frozen)
    seen: list[torch.dtype] = []
    frozen.act.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    x = torch.randn(IMAGE)
    with torch.autocast("cpu", dtype):
        assert frozen(x).dtype == dtype
    assert seen == [dtype, dtype]  # half from layer to layer
    frozen = networks(conversion)[1]  # without the hook, for fused forwards to run
    assert_as_exact(frozen, live, x, dtype)
    torch.testing.assert_close(snapshot(frozen), before, rtol=0, atol=0)


@halves
@conversions
def test_the_whole_model_in_half_precision(conversion, dtype):
    live, frozen = networks(conversion)
    x = torch.randn(IMAGE, dtype=dtype)
    assert frozen.to(dtype)(x).dtype == dtype
    assert_as_exact(frozen, live.to(dtype), x, dtype)


@conversions
def test_half_and_back(conversion):
    live, frozen = networks(conversion)
    x = torch.randn(IMAGE)
    with torch.no_grad():
        frozen.half()(x.half())
        expected = live.bfloat16().float()(x)
        torch.testing.assert_close(frozen.bfloat16().float()(x), expected, rtol=1e-2, atol=1e-2)


@halves
@conversions
def test_memory_format(conversion, dtype):
    frozen = networks(conversion)[1].to(dtype=dtype, memory_format=torch.channels_last)
    seen: list[Tensor] = []
    frozen.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    frozen.conv2.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    x = torch.randn(IMAGE, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    frozen(x).float().square().sum().backward()
    assert len(seen) == 2
    for tensor in (*seen, x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@conversions
def test_gradient_scaler(conversion):
    """Steps are those without scaling; a step with an infinite gradient is left out."""
    models = networks(conversion)[1], networks(conversion)[1]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        x = torch.randn(IMAGE)
        if step == 1:
            x[0, 0, 0, 0] = torch.inf
        losses = []
        for model in models:
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(model(x).float().square().sum())
        scaled, plain = optimizers
        scaled.zero_grad(), plain.zero_grad()
        scaler.scale(losses[0]).backward()
        scaler.step(scaled)
        scaler.update()
        if step != 1:
            losses[1].backward()
            plain.step()
    assert scaler.get_scale() == 2.0**9
    torch.testing.assert_close(snapshot(models[0]), snapshot(models[1]), rtol=1e-2, atol=1e-4)
    assert not torch.equal(models[0].conv1.weight, networks(conversion)[1].conv1.weight)


# On CUDA, as far as a machine without a GPU can tell: which operators run forward, in which dtypes.


class Calls(TorchDispatchMode):
    """Notes the operators called, with the dtype of their first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor):
            self.seen.append((str(function.overloadpacket).split(".", 1)[0], args[0].dtype))
        return function(*args, **(kwargs or {}))

    def ours(self) -> list[torch.dtype]:
        return [dtype for name, dtype in self.seen if name == "frozen_bn"]


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast, which without a GPU switches itself off."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.skipif("cuda" not in frozen_bn.ops.live, reason="built without CUDA")
@halves
@conversions
def test_autocast_on_cuda_runs_the_kernels_in_half_precision(conversion, dtype):
    frozen = networks(conversion)[1]
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(dtype), Calls() as calls:
        frozen.to("cuda")
        y = frozen(torch.empty(IMAGE, device="cuda", requires_grad=True))
    assert y.requires_grad and y.device.type == "cuda"
    assert calls.ours() and set(calls.ours()) == {dtype}
