"""The operators as PyTorch sees them, what was built, and what happens where it was not."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import run_fresh
from helpers import ACTIVATIONS, CPU_LEVELS, PIECEWISE_LINEAR, SMOOTH
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import frozen_bn
from frozen_bn import _C, frozen_batch_norm, ops, reference

C = 5
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def make_input(dtype=torch.float32, channels_last=False, shape=(2, C, 3, 7)) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def sample_forward(
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    residual: bool = False,
    affine: bool = True,
    training: bool = True,
    inplace: bool = False,
) -> tuple:
    """Arguments of ``torch.ops.frozen_bn.forward``."""
    x = make_input(dtype, channels_last)
    mean, var, weight, bias = torch.rand(4, C) + 0.5
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    coefficients = torch.empty(4, C, dtype=arithmetic) if training else None
    mask = None
    if training and activation in PIECEWISE_LINEAR:
        mask = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    return (
        *(x, mean, var, weight if affine else None, bias if affine else None),
        torch.randn_like(x) if residual else None,
        *(1e-5, CODES[activation], 0.1),
        *(x if inplace else torch.empty_like(x), coefficients, mask),
    )


def sample_backward(activation: str | None = None, wanted: str = "xwbr", **options) -> tuple:
    """Arguments of ``torch.ops.frozen_bn.backward``, as a forward leaves them."""
    arguments = sample_forward(activation, residual="r" in wanted, **options)
    torch.ops.frozen_bn.forward(*arguments)
    x, residual, code, slope = (arguments[i] for i in (0, 5, 7, 8))
    coefficients, mask = arguments[10:]
    smooth = activation in SMOOTH
    return (
        *(torch.randn_like(x), coefficients, mask),
        x if smooth or "w" in wanted else None,
        residual if smooth else None,
        *(code, slope),
        torch.empty_like(x) if "x" in wanted or mask is not None else None,
        *(torch.empty(C) if name in wanted else None for name in "wb"),
        torch.empty_like(x) if "r" in wanted and activation else None,
    )


VARIANTS = [
    {},
    {"channels_last": True},
    {"affine": False, "activation": "relu"},
    {"residual": True, "activation": "relu", "channels_last": True},
    {"residual": True, "activation": "silu", "dtype": torch.float16},
    {"activation": "leaky_relu", "dtype": torch.bfloat16},
    {"residual": True, "activation": "hardswish", "dtype": torch.float64},
    {"activation": "relu6", "training": False},
]
BACKWARD_VARIANTS = [
    {},
    {"wanted": "x", "channels_last": True},
    {"wanted": "w", "activation": "relu"},
    {"wanted": "b"},
    {"activation": "leaky_relu", "dtype": torch.bfloat16},
    {"activation": "relu", "channels_last": True},
    {"activation": "silu", "dtype": torch.float16},
    {"wanted": "xr", "activation": "hardswish", "dtype": torch.float64},
]


def words(options: dict) -> str:
    return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in options.items()) or "default"


@pytest.mark.parametrize("options", VARIANTS, ids=words)
def test_opcheck_forward(options):
    torch.library.opcheck(torch.ops.frozen_bn.forward.default, sample_forward(**options))


@pytest.mark.parametrize("options", BACKWARD_VARIANTS, ids=words)
def test_opcheck_backward(options):
    torch.library.opcheck(torch.ops.frozen_bn.backward.default, sample_backward(**options))


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=words)
def test_forward_over_its_input(options):
    """The in-place form of the operator, which opcheck's schema test cannot express."""
    arguments = sample_forward(**options, inplace=True)
    fresh = (arguments[0].clone(), *arguments[1:9], torch.empty_like(arguments[0]), *arguments[10:])
    torch.ops.frozen_bn.forward(*arguments)
    torch.ops.frozen_bn.forward(*fresh)
    torch.testing.assert_close(arguments[9], fresh[9], rtol=0, atol=0)


# ---- Without data: fake tensors and the meta device

LAYOUTS = {
    "contiguous": lambda: make_input(),
    "channels_last": lambda: make_input(channels_last=True),
    "channels_last, one channel": lambda: make_input(channels_last=True, shape=(2, 1, 3, 7)),
    "channels_last, 1x1 map": lambda: make_input(channels_last=True, shape=(2, C, 1, 1)),
    "sliced": lambda: make_input(shape=(2, C + 3, 3, 9))[:, 2:-1, :, 1:-1],
    "permuted": lambda: torch.randn(7, C, 2, 3).permute(2, 1, 3, 0),
    "expanded": lambda: torch.randn(1, C, 1, 7).expand(2, C, 3, 7),
    "empty": lambda: make_input(shape=(0, C, 3, 7)),
    "two dimensions": lambda: torch.randn(4, C),
    "five dimensions": lambda: torch.randn(2, C, 2, 3, 4),
}


def arguments_like(input: Tensor, device: str) -> tuple[Tensor, ...]:
    """``input`` without its data but with its strides, and the four vectors."""
    like = torch.empty_strided(input.shape, input.stride(), dtype=input.dtype, device=device)
    return like, *(torch.ones(input.shape[1], device=device) for _ in range(4))


def described(t: Tensor) -> tuple:
    return t.dtype, tuple(t.shape), t.stride()


@pytest.mark.covering(2)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_outputs_and_gradients_without_data_look_like_real_ones(kind, layout, dtype, activation):
    real = LAYOUTS[layout]().to(dtype)

    def results(input: Tensor, *vectors: Tensor) -> list[tuple]:
        leaves = [t.requires_grad_() for t in (input, *vectors[2:])]
        y = frozen_batch_norm(input, *vectors, activation=activation)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert {t.device for t in (y, *gradients)} == {input.device}
        return [described(t) for t in (y, *gradients)]

    expected = results(real.detach(), *(torch.ones(real.shape[1]) for _ in range(4)))
    if kind == "fake":
        with FakeTensorMode():
            assert results(*arguments_like(real, "cpu")) == expected
    else:
        actual = results(*arguments_like(real, "meta"))
        assert actual[0] == expected[0]
        assert [a[:2] for a in actual] == [e[:2] for e in expected]


def test_fake_kernels_leave_no_trace_of_data():
    with FakeTensorMode():
        x, *vectors = arguments_like(make_input(), "cpu")
        assert isinstance(frozen_batch_norm(x, *vectors), torch._subclasses.FakeTensor)
        assert frozen_batch_norm(x, *vectors, inplace=True) is x


# ---- What was built


def stub() -> dict[str, ast.AST]:
    """The public names that _C.pyi declares."""
    tree = ast.parse(Path(frozen_bn.__file__).with_name("_C.pyi").read_text())
    names: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
    return {name: node for name, node in names.items() if not name.startswith("_")}


def test_stub_declares_what_the_compiled_module_has():
    assert set(stub()) == {name for name in dir(_C) if not name.startswith("_")}


def test_stub_declares_the_arguments_that_the_compiled_functions_take():
    for name, node in stub().items():
        if isinstance(node, ast.FunctionDef):
            signature = getattr(_C, name).__doc__.splitlines()[0]
            assert signature.count(": ") == len(node.args.args), signature


def test_unknown_cpu_level_is_refused_and_changes_nothing():
    level = _C.cpu_level()
    with pytest.raises(ValueError, match="but got sse9"):
        _C.select_cpu_level("sse9")
    assert _C.cpu_level() == level


def rows(config: str) -> dict[str, str]:
    return {k.strip(): v.strip() for k, v in (row.split(":", 1) for row in config.splitlines())}


def test_show_config_names_versions_architectures_and_paths():
    config = rows(frozen_bn.show_config())
    built = _C.build_info()
    assert config["frozen_bn"] == frozen_bn.__version__
    assert torch.__version__ in config["torch"] and built["torch"] in config["torch"]
    assert str(torch.version.cuda) in config["CUDA"] and built["cuda"] in config["CUDA"]
    assert config["architectures"] == f"{built['architectures']} ({built['why']})"
    assert config["CPU path"] == f"kernels, {_C.cpu_level()}"
    assert config["CUDA path"].startswith("kernels" if "cuda" in ops.live else "plain PyTorch (")
    assert ("no GPU here" in config["CUDA path"]) == (not torch.cuda.is_available())


def test_best_cpu_level_is_the_default():
    assert f"kernels, {CPU_LEVELS[-1]}\n" in python_dash_m()


@functools.cache
def python_dash_m() -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHONWARN")}
    done = subprocess.run(
        [sys.executable, "-m", "frozen_bn"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=Path(frozen_bn.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_dash_m_prints_the_configuration():
    _C.select_cpu_level(CPU_LEVELS[-1])
    assert python_dash_m().startswith(frozen_bn.show_config() + "\n")


# ---- Where it was not built

WITHOUT_COMPILED_MODULE = """
import sys, warnings
import torch, torch.nn.functional as F
sys.modules["frozen_bn._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import frozen_bn
    from frozen_bn import FrozenBatchNorm2d, convert_frozen_bn, frozen_batch_norm, unfreeze_bn
    first = [str(w.message) for w in caught]
    assert len(first) == 1, first
    assert first[0].startswith("frozen_bn: the compiled kernels could not be loaded"), first

    torch.manual_seed(0)
    vectors = [torch.rand(3) + 0.5 for _ in range(4)]
    results = []
    for function in (
        lambda x, w, b: frozen_batch_norm(x, *vectors[:2], w, b, activation="relu"),
        lambda x, w, b: F.relu(F.batch_norm(x, *vectors[:2], w, b, training=False)),
    ):
        torch.manual_seed(1)
        leaves = [t.clone().requires_grad_() for t in (torch.randn(2, 3, 4, 5), *vectors[2:])]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results)
    x = torch.randn(2, 3, 4, 5)
    assert frozen_batch_norm(x, *vectors, inplace=True) is x

    model = convert_frozen_bn(torch.nn.Sequential(torch.nn.BatchNorm2d(3).eval()))
    assert isinstance(model[0], FrozenBatchNorm2d)
    model(x)
    assert isinstance(unfreeze_bn(model)[0], torch.nn.BatchNorm2d)
    config = frozen_bn.show_config()
    assert sum("compiled kernels" in str(w.message) for w in caught) == 1
print(config)
"""


def test_without_the_compiled_module_everything_works_in_plain_pytorch_with_one_warning():
    config = rows(run_fresh(WITHOUT_COMPILED_MODULE))
    assert config["architectures"] == "none"
    assert config["CPU path"].startswith("plain PyTorch (")
    assert config["CUDA path"].startswith("plain PyTorch (")


WITHOUT_CUDA = """
import pathlib, torch, warnings
torch.version.cuda = None
warnings.simplefilter("error")
import frozen_bn
from frozen_bn import ops
assert ops.live == {"cpu"}, ops.live
assert not [name for name in torch.ops.loaded_libraries if "_cuda" in str(name)]
maps = pathlib.Path("/proc/self/maps")
assert not maps.exists() or "/frozen_bn/_cuda." not in maps.read_text()
assert frozen_bn.frozen_batch_norm(torch.ones(1, 2, 3), torch.zeros(2), torch.ones(2)).sum() > 0
print(frozen_bn.show_config())
"""


def test_a_torch_without_cuda_does_not_load_the_cuda_half():
    config = rows(run_fresh(WITHOUT_CUDA))
    assert config["CPU path"].startswith("kernels")
    assert config["CUDA path"].startswith("plain PyTorch (")


def test_a_torch_with_cuda_loads_the_cuda_half_where_it_was_built():
    library = list(Path(frozen_bn.__file__).parent.glob("_cuda.*.so"))
    assert ("cuda" in ops.live) == bool(library and torch.version.cuda)


def test_reference_has_the_signature_of_the_operator():
    ours, oracle = map(inspect.signature, (frozen_batch_norm, reference.frozen_batch_norm))
    assert ours == oracle
