"""What several test files use."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import frozen_bn
from frozen_bn.fusion.pending import Merge, recorders
from frozen_bn.fusion.report import Fate, expected, observed

VECTORS = ["weight", "bias", "running_mean", "running_var"]
PIECEWISE_LINEAR, SMOOTH = ["relu", "relu6", "leaky_relu"], ["silu", "hardswish"]
ACTIVATIONS = [None, "relu", "relu6", "leaky_relu", "silu", "hardswish"]


def make_generator(seed: int) -> torch.Generator:
    """On the device where new tensors are made; for meta tensors, any."""
    device = torch.get_default_device()
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch normalization in ``module``, frozen or live, the values of a trained one."""
    generator = make_generator(seed)

    def uniform_(target: Tensor | None) -> None:
        if target is not None:
            target.data.copy_(torch.rand(target.shape, generator=generator) + 0.5)

    def normal_(target: Tensor | None) -> None:
        if target is not None:
            target.data.copy_(torch.randn(target.shape, generator=generator))

    for layer in module.modules():
        if isinstance(getattr(layer, "running_var", None), Tensor):
            uniform_(layer.weight)
            normal_(layer.bias)
            normal_(layer.running_mean)
            uniform_(layer.running_var)
            if isinstance(getattr(layer, "num_batches_tracked", None), Tensor):
                layer.num_batches_tracked.fill_(7)
    return module


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, in order, dtypes and values; NaN equals NaN."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def output_strides(x: Tensor) -> tuple[int, ...]:
    """Of what torch.nn.BatchNorm makes of ``x`` on a CPU: contiguous, or channels_last where it is.
    Of dimensions of one element ours are those of ``x``."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    kept = x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))
    return torch.empty_like(x).stride() if kept else torch.empty(x.shape, device="meta").stride()


def calm_(module: nn.Module) -> nn.Module:
    """As :func:`randomize_`, with values that do not grow over the layers of a deep network."""
    for layer in randomize_(module).modules():
        if isinstance(getattr(layer, "running_var", None), Tensor):
            layer.running_mean.mul_(0.3)
            if layer.bias is not None:
                layer.bias.data.mul_(0.3)
    return module


def outputs_and_gradients(net: nn.Module, *inputs: object, seed: int = 1) -> dict[str, Tensor]:
    """What ``net`` returns, and the gradients of a loss of all of it, by name."""
    net.zero_grad()
    leaves = [t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    torch.manual_seed(seed)
    # Times one, for a forward may write to its input, which a leaf forbids.
    returned = net(*(t * 1 if isinstance(t, Tensor) else t for t in leaves))
    outputs = [t for t in tree_leaves(returned) if isinstance(t, Tensor)]
    values = {f"output {i}": t.detach().clone() for i, t in enumerate(outputs)}
    loss = sum(((t.square() + t).mean() for t in outputs), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.grad is not None:
            values[f"gradient of input {i}"] = leaf.grad
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            values[f"gradient of {name}"] = parameter.grad.clone()
    return values


def assert_close_in_norm(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Equal names; the error of each tensor at most ``tolerance`` of its norm."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        error, scale = (actual[name] - value).norm(), value.norm()
        assert error <= tolerance * scale + 1e-30, f"{name}: {error:.2e} of {scale:.2e}"


_made = itertools.count()


def function_of(text: str, **names: object) -> Callable[..., object]:
    """The last function that is defined in ``text``, whose source is there to be read, too."""
    file = f"<tests {next(_made)}>"
    text = f"import torch, torch.nn.functional as F\nfrom torch import nn, Tensor\n{text}"
    namespace = dict(names)
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    exec(compile(text, file, "exec"), namespace)
    return [value for value in namespace.values() if callable(value)][-1]


def runs_fused(layer: nn.Module, run: Callable[[], object]) -> bool:
    """Whether ``layer`` is computed by a step of a rewritten method, and not called."""
    found: list[Merge] = []
    recorders.append(found.append)
    try:
        run()
    finally:
        recorders.remove(found.append)
    return any(merge.layer is layer for merge in found)


def fates(module: nn.Module, *inputs: object) -> dict[str, Fate]:
    """What became of each frozen layer, by name: by the sources, or in a run on ``inputs``."""
    found = observed(module, inputs) if inputs else expected(module)
    return {name: found[layer] for name, layer in module.named_modules() if layer in found}


def merged(module: nn.Module, *inputs: object) -> dict[str, str]:
    """With what each frozen layer was merged, by name, where it was."""
    return {name: fate.merged for name, fate in fates(module, *inputs).items() if fate.merged}


def _runnable(level: str) -> bool:
    try:
        frozen_bn._C.select_cpu_level(level)
    except ValueError:
        return False
    return True


#: The instruction sets of the CPU kernels that this machine can run, the best one last.
CPU_LEVELS = [level for level in ("portable", "avx2", "avx512", "avx512_bf16") if _runnable(level)]
