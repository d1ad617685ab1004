"""torch.export, ONNX and the tracers of torch.fx: frozen layers, and networks converted in every
way, against the same run by the kernels."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calm_, randomize_
from layers import EVERY_LAYER, C, assert_equals, layer, maps
from nets import EVERY_CONVERSION, IMAGES, ONE_A_KIND, images, live_network, network
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import frozen_bn
from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn


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


def onnx_session(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run_onnx(
    net: nn.Module, inputs: tuple[Tensor, ...], path: Path, dynamo: bool = True, **options: bool
) -> Tensor:
    """What onnxruntime makes of the exported ``net``."""
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter without dynamo
        torch.onnx.export(net, inputs, path, dynamo=dynamo, verbose=False, **options)
    session = onnx_session(path)
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


# One operator a layer, which other tools recognise

BATCH_NORM = torch.ops.aten.batch_norm.default


def exported_batch_norms(net: nn.Module, *inputs: Tensor, strict: bool = False) -> int:
    program = torch.export.export(net, inputs, strict=strict)
    return sum(node.target is BATCH_NORM for node in program.graph.nodes)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
@EVERY_LAYER
def test_an_exported_layer_is_one_operator(options, strict):
    net, (x, r) = layer(**options), maps()
    once = not options.get("inplace")  # the operator's gradient would need what is overwritten
    assert exported_batch_norms(net, x, r, strict=strict) == once
    for dtype in (torch.float16, torch.float64):  # it would lose what is computed in float32
        assert exported_batch_norms(net, x.to(dtype), r.to(dtype), strict=strict) == 0
    assert exported_batch_norms(net.double(), x, r, strict=strict) == 0


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_exported_layer_keeps_the_digits_of_a_large_mean(strict):
    """By the formula; the operator would have lost three of them."""
    live = randomize_(nn.BatchNorm2d(C)).eval()
    live.running_mean.add_(1e4)
    net = convert_frozen_bn(copy.deepcopy(live))
    x = maps()[0] + 1e4
    exact = copy.deepcopy(live).double()(x.double())
    assert (live(x) - exact).abs().max() > 1e-4
    program = torch.export.export(net, (x,), strict=strict)
    assert BATCH_NORM not in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_whether_a_mean_is_large_is_found_out_where_statistics_arrive():
    def large(net: nn.Module) -> bool:
        return exported_batch_norms(net, maps()[0]) == 0

    near, far = randomize_(nn.BatchNorm2d(C)), randomize_(nn.BatchNorm2d(C))
    far.running_mean.fill_(1e3)
    net = convert_frozen_bn(copy.deepcopy(near))
    assert not large(net) and not large(copy.deepcopy(net)) and large(convert_frozen_bn(far))
    state = convert_frozen_bn(copy.deepcopy(far)).state_dict()
    for assign in (False, True):
        net.load_state_dict(state, assign=assign)
        assert large(net)
        net.load_state_dict(near.state_dict(), assign=assign)
        assert not large(net)
    with torch.device("meta"):
        skeleton = FrozenBatchNorm2d(C)
    skeleton.load_state_dict(state, assign=True)
    assert large(skeleton)


def onnx_nodes(path: Path) -> Counter[str]:
    onnx = pytest.importorskip("onnx")
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("dynamo", [True, False])
def test_an_onnx_layer_is_one_node(dynamo, tmp_path):
    net, (x, _) = layer().eval(), maps()
    run_onnx(net, (x,), tmp_path / "layer.onnx", dynamo=dynamo, optimize=False)
    assert onnx_nodes(tmp_path / "layer.onnx")["BatchNormalization"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"fuse": False}, marks=pytest.mark.long),
        pytest.param({"fold_conv": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet50"])
def test_onnx_of_a_network_has_a_node_for_each_layer(name, options, tmp_path):
    """And what onnxruntime makes of them is what the network returns."""
    models = pytest.importorskip("torchvision").models
    net = convert_frozen_bn(calm_(models.get_model(name, weights=None)), **options).eval()
    layers = sum(isinstance(m, FrozenBatchNorm2d) for m in net.modules())
    x, path = torch.randn(1, 3, 64, 64), tmp_path / "network.onnx"
    actual = run_onnx(net, (x,), path, optimize=False)
    assert onnx_nodes(path)["BatchNormalization"] == layers > 30
    expected = net(x).detach()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=float(1e-4 * expected.abs().max()))


def test_the_optimizer_of_the_exporter_folds_them(tmp_path):
    """What remains is what remains of live layers."""
    found = []
    for name, net in (("frozen", network()), ("live", live_network())):
        run_onnx(net.eval(), (images(),), tmp_path / name)
        found.append(onnx_nodes(tmp_path / name))
    assert found[0] == found[1] and not {"BatchNormalization", "Sub", "Mul"} & found[0].keys()


def test_the_quantizer_of_onnxruntime_folds_them(tmp_path):
    """Its preparation leaves convolutions and activations; the network of int8 is near. (Without
    the exporter's optimizer, convolutions without a bias get one that it does not see through.)"""
    pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    convolutions = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    live = randomize_(nn.Sequential(*convolutions, nn.BatchNorm2d(8)))
    net, path = convert_frozen_bn(live).eval(), tmp_path / "network.onnx"
    run_onnx(net, (images(),), path, optimize=False, external_data=False)
    assert onnx_nodes(path)["BatchNormalization"] == 2
    prepared, quantized = tmp_path / "prepared.onnx", tmp_path / "int8.onnx"
    quantization.shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    assert onnx_nodes(prepared) == {"Conv": 2, "Relu": 1}

    class Calibration(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{name: images(seed).numpy()} for seed in range(4)])

        def get_next(self) -> dict[str, object] | None:
            return next(self.batches, None)

    name = onnx_session(prepared).get_inputs()[0].name
    quantization.quantize_static(prepared, quantized, Calibration())
    assert onnx_nodes(quantized)["DequantizeLinear"] >= 4
    (actual,) = onnx_session(quantized).run(None, {name: images().numpy()})
    expected = net(images()).detach()
    assert (torch.from_numpy(actual) - expected).abs().max() < 0.1 * expected.abs().max()


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
