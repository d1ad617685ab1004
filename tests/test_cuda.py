"""What only a GPU can show: streams, graphs, several devices, repeatability. Skipped without one.

The numeric tests run on `cuda` too where there is a GPU; see the fixture `device`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS
from torch import Tensor

from frozen_bn import frozen_batch_norm, ops, reference
from frozen_bn.checks import Statistics
from frozen_bn.pair import frozen_batch_norm_pair

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
    pytest.mark.skipif(
        "cuda" not in ops.live, reason=f"no CUDA kernels: {ops.unavailable.get('cuda')}"
    ),
]

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCES)


class Layer:
    """A layer's tensors, and its forward and backward pass."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        channels_last: bool = False,
        activation: str | None = "relu",
        device: str = "cuda",
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.activation = activation
        c = shape[1]
        self.mean = torch.randn(c, device=device)
        self.var = torch.rand(c, device=device) + 0.2
        self.weight = torch.randn(c, device=device).requires_grad_()
        self.bias = torch.randn(c, device=device).requires_grad_()
        self.input = self.random().requires_grad_()
        self.residual = self.random().requires_grad_()
        self.grad = self.random()

    def random(self) -> Tensor:
        x = torch.randn(self.shape, device=self.device).to(self.dtype)
        return x.contiguous(memory_format=self.format)

    @property
    def changing(self) -> list[Tensor]:
        """What another step of a training loop would bring."""
        return [self.input, self.residual, self.grad]

    def __call__(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of the input, residual, weight and bias."""
        output = frozen_batch_norm(
            self.input,
            self.mean,
            self.var,
            self.weight,
            self.bias,
            activation=self.activation,
            residual=self.residual,
        )
        wanted = [self.input, self.residual, self.weight, self.bias]
        return output.detach(), *torch.autograd.grad(output, wanted, self.grad)

    def exact(self) -> tuple[Tensor, ...]:
        """The same in float64 on the CPU, by plain PyTorch."""
        wanted = [
            t.detach().cpu().double().requires_grad_()
            for t in (self.input, self.residual, self.weight, self.bias)
        ]
        input, residual, weight, bias = wanted
        output = reference.frozen_batch_norm(
            input,
            self.mean.cpu().double(),
            self.var.cpu().double(),
            weight,
            bias,
            activation=self.activation,
            residual=residual,
        )
        return output.detach(), *torch.autograd.grad(output, wanted, self.grad.cpu().double())


class Pair(Layer):
    """Both branches normalized, by the kernels of a pair: its affine is frozen."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        mean, var, weight, bias = (
            v.detach() for v in (self.mean, self.var, self.weight, self.bias)
        )
        self.statistics = Statistics(mean, var, weight, bias)
        self.residual_statistics = Statistics(mean.flip(0), var.flip(0), bias, weight, 1e-3)

    def _results(self, function: Any, to: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        input, residual = (to(t.detach()).requires_grad_() for t in (self.input, self.residual))
        a, b = (
            Statistics(*map(to, s[:4]), s.eps) for s in (self.statistics, self.residual_statistics)
        )
        output = function(input, a, residual, b, activation=self.activation)
        gradients = torch.autograd.grad(output, [input, residual], to(self.grad))
        return output.detach(), *gradients

    def __call__(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of the input and residual."""
        return self._results(frozen_batch_norm_pair, lambda t: t)

    def exact(self) -> tuple[Tensor, ...]:
        return self._results(reference.frozen_batch_norm_pair, lambda t: t.cpu().double())


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit for bit."""
    assert len(actual) == len(expected)
    for name, a, b in zip(("y", "dx", "dr", "dw", "db"), actual, expected, strict=False):
        assert torch.equal(a, b), name


layers = pytest.mark.parametrize("kind", [Layer, Pair])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_agrees_with_the_reference(dtype, channels_last, activation):
    layer = Layer((3, 37, 7, 7), dtype, channels_last, activation)
    tolerance = TOLERANCES[dtype]
    output, dx, dr, dw, db = layer()
    exact_output, exact_dx, exact_dr, exact_dw, exact_db = layer.exact()
    for actual, expected in ((output, exact_output), (dx, exact_dx), (dr, exact_dr)):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=1e-5)
    for actual, expected in ((dw, exact_dw), (db, exact_db)):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_of_a_pair_agrees_with_the_reference(dtype, channels_last, activation):
    pair = Pair((3, 37, 7, 7), dtype, channels_last, activation)
    for actual, expected in zip(pair(), pair.exact(), strict=True):
        assert actual.dtype == dtype
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=1e-5)


@layers
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_graph_replays(dtype, channels_last, kind):
    layer = kind((2, 64, 25, 38), dtype, channels_last)
    # Captured work must not be the first of its kind; torch asks for a side stream.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for _ in range(3):
        with torch.no_grad():
            for tensor in layer.changing:
                tensor.copy_(layer.random())
        graph.replay()
        assert_same(captured, layer())


@layers
@pytest.mark.parametrize("channels_last", [False, True])
def test_work_goes_to_the_current_stream(channels_last, kind):
    layer = kind((4, 256, 50, 76), torch.float16, channels_last)
    expected = layer()
    fresh = [tensor.detach().clone() for tensor in layer.changing]
    with torch.no_grad():
        for tensor in layer.changing:
            tensor.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Long enough for a kernel on another stream to read the zeros.
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for tensor, value in zip(layer.changing, fresh, strict=True):
                tensor.copy_(value)
        actual = layer()
    side.synchronize()
    assert_same(actual, expected)


@layers
def test_the_host_never_waits(kind):
    layer = kind((2, 64, 25, 38), torch.float16)
    layer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(8, 256, 50, 76), (16, 2048, 7, 7), (2, 3, 200, 304)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_repeat_bit_for_bit(dtype, shape, channels_last):
    layer = Layer(shape, dtype, channels_last)
    first = layer()
    for _ in range(5):
        assert_same(layer(), first)


@layers
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_tensor_on_another_device_than_the_current(channels_last, kind):
    assert torch.cuda.current_device() == 0
    layer = kind((2, 64, 25, 38), torch.float32, channels_last, device="cuda:1")
    results = layer()
    assert {t.device for t in results} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert_same(results, layer())


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_elements_than_32_bits_can_count(channels_last):
    shape = (2, 64, 4104, 4104)
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    x = torch.empty(shape, device="cuda", dtype=torch.float16).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    assert x.numel() > 2**31
    x.normal_().requires_grad_()
    mean, bias = torch.randn(2, 64, device="cuda")
    var = torch.rand(64, device="cuda") + 0.2
    y = frozen_batch_norm(x, mean, var, None, bias, activation="relu")
    (dx,) = torch.autograd.grad(y, x, y.detach())
    scale = (var + 1e-5).rsqrt()
    # A part at a time: both ends, and where 2^31 falls (the last sample).
    for n, rows in ((0, slice(0, 8)), (1, slice(4040, 4104)), (1, slice(0, 8))):
        part = x.detach()[n : n + 1, :, rows]
        expected = reference.frozen_batch_norm(part, mean, var, None, bias, activation="relu")
        torch.testing.assert_close(y.detach()[n : n + 1, :, rows], expected, rtol=2e-3, atol=1e-5)
        gradient = expected.float() * scale.reshape(1, -1, 1, 1)
        torch.testing.assert_close(dx[n : n + 1, :, rows].float(), gradient, rtol=4e-3, atol=1e-5)
