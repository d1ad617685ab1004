"""torch.export, ONNX and the tracers of torch.fx: frozen layers, and networks converted in every
way, against the same run by the kernels."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from layers import EVERY_LAYER, C, assert_equals, layer, maps
from nets import EVERY_CONVERSION, IMAGES, ONE_A_KIND, images, network
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import frozen_bn


def operators(graph: fx.Graph) -> Counter[str]:
    """The namespaces of what it calls."""
    calls = (node.target for node in graph.nodes if node.op == "call_function")
    return Counter(call.namespace for call in calls if isinstance(call, torch._ops.OpOverload))


# torch.export


def exported(net: nn.Module, *inputs: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    """For any number of images; saved and loaded."""
    batch = torch.export.Dim("batch", min=2)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(net, inputs, dynamic_shapes=(shapes,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.covering(1)
@pytest.mark.parametrize("strict", [False, True])
@EVERY_LAYER
def test_export_a_layer(options, strict):
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(**options)

        def forward(self, *inputs: Tensor) -> Tensor:
            x, r = inputs
            return self.layer(x * 1, r)

    net = Module()
    program = exported(net, *maps(), strict=strict)
    assert operators(program.graph).keys() == {"aten"}  # to be loaded without frozen_bn
    for batch in (2, 3):
        assert_equals(program.module(), net, *maps(batch, C, 5, 3))


@pytest.mark.covering(1)
@pytest.mark.parametrize("strict", [False, True])
@ONE_A_KIND
def test_export_a_network(options, strict):
    net = network(**options)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    assert operators(program.graph).keys() == {"aten"}
    assert {*program.state_dict} == {*net.state_dict()}
    for x in (images(), torch.randn(2, *IMAGES[1:])):
        assert_equals(program.module(), net, x)


# ONNX


def run_onnx(net: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Tensor:
    """What onnxruntime makes of the exported ``net``."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(net, inputs, path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    values = (tensor.numpy() for tensor in inputs)
    (output,) = session.run(None, dict(zip(names, values, strict=True)))
    return torch.from_numpy(output)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@EVERY_LAYER
def test_onnx_of_a_layer(options, dtype, tmp_path):
    net = layer(**options).eval()
    inputs = tuple(t.to(dtype) for t in maps())
    actual = run_onnx(net, inputs, tmp_path / "layer.onnx")
    expected = net(*(t.clone() for t in inputs)).detach()
    torch.testing.assert_close(actual, expected)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@ONE_A_KIND
def test_onnx_of_a_network(options, dtype, tmp_path):
    net, x = network(**options).to(dtype).eval(), images().to(dtype)
    actual = run_onnx(net, (x,), tmp_path / "network.onnx")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, net(x).detach(), rtol=tolerance, atol=tolerance)


# torch.fx


@EVERY_LAYER
def test_symbolic_trace_of_a_layer(options):
    net = layer(**options)
    assert_equals(fx.symbolic_trace(net, {"residual": None}), net, maps()[0])
    assert_equals(fx.symbolic_trace(net), net, *maps())


@EVERY_CONVERSION
def test_symbolic_trace_of_a_network(options):
    net = network(**options)
    traced = fx.symbolic_trace(net)
    called = [traced.get_submodule(n.target) for n in traced.graph.nodes if n.op == "call_module"]
    assert sum(type(module) is frozen_bn.FrozenBatchNorm2d for module in called) == 4
    for shape in (IMAGES, (1, 3, 6, 9)):
        assert_equals(traced, net, torch.randn(shape))


@pytest.mark.covering(1)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@EVERY_LAYER
def test_make_fx_of_a_layer_and_its_gradients(options, mode):
    net = layer(**options)

    def function(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        y = net(x * 1, r)
        return y, *torch.autograd.grad(y.square().sum(), [x, r, *net.parameters()])

    traced = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(
        *(t.requires_grad_() for t in maps())
    )
    traced.graph.eliminate_dead_code()  # operators that write to what they are given are not dead
    traced.recompile()
    inputs = [t.requires_grad_() for t in maps()]
    torch.testing.assert_close(traced(*inputs), function(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@ONE_A_KIND
def test_make_fx_of_a_network(options, mode):
    net = network(**options)
    state = net.state_dict()

    def function(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, state, (x,))

    traced = make_fx(function, tracing_mode=mode)(state, images())
    other = network(seed=1, **options)
    for x in (images(1), images(2)):
        torch.testing.assert_close(traced(other.state_dict(), x), other(x))
