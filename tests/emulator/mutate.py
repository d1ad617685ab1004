"""Breaks the CUDA sources in one place after the other, and sees whether the emulator notices.

    cd tests && python -m emulator.mutate [NAME...]

Each mutation is made in a copy of csrc, which is built, compared with the reference on a few
configurations, and held to what a kernel may move and execute. Prints what caught each; exits with
1 if one survives, or the copy as it is fails.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import frozen_bn
from emulator import huge, runtime
from emulator.machine import EmulationError
from emulator.mutations import MUTATIONS, Mutation
from frozen_bn.checks import Statistics
from frozen_bn.pair import frozen_batch_norm_pair

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Configuration:
    """One call of ``frozen_batch_norm`` and its gradients."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    channels_last: bool = False
    residual: bool = False
    affine: bool = True  # with gradients
    pair: bool = False  # the residual is normalized as well
    offset: int = 0  # elements by which the tensors' addresses are off

    def tensor(self) -> Tensor:
        n, c, *_ = self.shape
        values = torch.randn(torch.Size(self.shape).numel() + self.offset)[self.offset :]
        values = values.to(self.dtype) if not self.offset else self._moved(values)
        if not self.channels_last:
            return values.view(self.shape)
        return values.view(n, *self.shape[2:], c).movedim(-1, 1)

    def _moved(self, values: Tensor) -> Tensor:
        room = torch.empty(values.numel() + self.offset, dtype=self.dtype)
        return room[self.offset :].copy_(values)


CONFIGURATIONS = [
    Configuration((2, 5, 25, 38)),
    Configuration((2, 6, 7, 7), torch.float16, "relu", residual=True),
    Configuration((2, 3, 70, 71), torch.bfloat16, "leaky_relu"),  # a run spans tiles
    Configuration((3, 4, 11, 13), torch.float32, "relu6", offset=1),
    Configuration((2, 5, 9, 9), torch.float16, "silu", residual=True, offset=3),
    Configuration((41, 4, 3, 3), torch.float32),  # many partial rows
    Configuration((1, 1, 5, 5), torch.bfloat16, affine=False),
    Configuration((2, 24, 9, 10), torch.float32, "relu", channels_last=True, residual=True),
    Configuration((2, 20, 8, 8), torch.float16, "silu", channels_last=True),
    Configuration((1, 1100, 2, 3), torch.float16, "relu"),  # several blocks sum channels
    Configuration((2, 600, 3, 5), torch.bfloat16, channels_last=True),  # several blocks of columns
    Configuration((3, 7, 11, 13), torch.float32, "leaky_relu", channels_last=True),
    Configuration((3, 7, 5, 5), torch.float16, "relu", channels_last=True, offset=1),
    Configuration((3, 10, 2, 3), torch.float32, "hardswish", residual=True),
    Configuration((2, 6, 7, 7), torch.float16, "relu", residual=True, pair=True),
    Configuration(
        (3, 7, 5, 5), torch.float32, "silu", channels_last=True, residual=True, pair=True
    ),
]


def compare(emulator: runtime.Emulator, configuration: Configuration) -> None:
    """Forward and gradients, on the emulator and in plain PyTorch.

    Raises:
        AssertionError: they differ.
        EmulationError: a kernel did what it must not.
    """
    torch.manual_seed(0)
    channels, affine = configuration.shape[1], configuration.affine
    x, grad = configuration.tensor().requires_grad_(), configuration.tensor()
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    affine = affine and not configuration.pair
    weight, bias = (torch.randn(channels).requires_grad_(affine) for _ in range(2))
    other = Statistics(*torch.rand(4, channels).unbind(), 0.5)
    residual = configuration.tensor().requires_grad_() if configuration.residual else None
    wanted = [t for t in (x, residual, weight, bias) if t is not None and t.requires_grad]

    def run(single: Any, pair: Any) -> tuple[Tensor, ...]:
        activation = configuration.activation
        if configuration.pair:
            y = pair(x, (mean, var, weight, bias, 1e-5), residual, other, activation=activation)
        else:
            y = single(x, mean, var, weight, bias, activation=activation, residual=residual)
        return (y, *torch.autograd.grad(y, wanted, grad))

    reference = frozen_bn.reference
    expected = run(reference.frozen_batch_norm, reference.frozen_batch_norm_pair)
    with emulator.active():
        actual = run(frozen_bn.frozen_batch_norm, frozen_batch_norm_pair)
    names = ["output", "grad_input", *["grad_residual"] * configuration.residual]
    names += ["grad_weight", "grad_bias"]
    for name, a, e in zip(names, actual, expected, strict=False):
        tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[a.dtype]
        torch.testing.assert_close(
            a, e, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def waste(emulator: runtime.Emulator) -> str | None:
    """A kernel that moves more than it need, or takes more instructions than it did."""
    sys.path.append(str(runtime.ROOT))
    from benchmarks import cases, traffic

    for layout in cases.LAYOUTS:
        for operation in ("residual+relu", cases.PAIR):
            case = cases.Case("fp16", layout, operation, (16, 2048, 7, 7))
            shape = traffic.emulated_shape(case.shape, layout, 1 << 16)
            for which, counted in traffic.emulate(emulator, case, shape).items():
                needed = traffic.unavoidable_bytes(case, which, shape)
                if counted.accessed != needed:
                    return f"{case.name}, {which}: {counted.accessed} bytes instead of {needed}"
                most = traffic.MOST_INSTRUCTIONS[operation, which][layout]
                if counted.instructions_per_pack > most:
                    return f"{case.name}, {which}: {counted.instructions_per_pack:.0f} instructions"
    return None


def check(library: Path) -> str | None:
    """What is found to be wrong with a library first."""
    emulator = runtime.Emulator(library)
    for configuration in CONFIGURATIONS:
        try:
            compare(emulator, configuration)
        except (AssertionError, EmulationError) as error:
            shape = "x".join(map(str, configuration.shape))
            kind = str(configuration.dtype).removeprefix("torch.")
            text = " ".join(str(error).split())
            return f"{type(error).__name__} at {shape} {kind}: {text}"
    for case in huge.HUGE:
        try:
            huge.compare(emulator, case)
        except (AssertionError, EmulationError) as error:
            return f"{type(error).__name__} at {case}: {' '.join(str(error).split())}"
    return waste(emulator)


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of csrc in a new folder, with the mutation."""
    csrc = folder / "csrc"
    shutil.copytree(runtime.ROOT / "csrc", csrc)
    if mutation.file:
        file = csrc / mutation.file
        text = file.read_text()
        if text.count(mutation.before) != 1:
            times = text.count(mutation.before)
            raise LookupError(f"{mutation.name}: {mutation.before!r} is {times} times in {file}")
        file.write_text(text.replace(mutation.before, mutation.after))
    return csrc


def caught_by(mutation: Mutation, csrc: Path) -> str | None:
    """What notices the mutation, if anything does.

    In a process of its own: a library is loaded, and registers its operators, once.
    """
    library = runtime.build(csrc, csrc.parent / "build", wide=mutation.wide)
    command = [sys.executable, "-m", "emulator.mutate", "--check", str(library)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    shutil.rmtree(csrc.parent)
    if done.returncode not in (0, 1) or (done.returncode == 1 and not done.stdout):
        raise RuntimeError(f"{mutation.name}: the check itself failed\n{done.stderr}")
    return done.stdout.strip() or None


def main(names: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        # All at once, so that all see the same sources, and one that does not apply fails early.
        copies = [mutated(m, Path(folder) / str(k)) for k, m in enumerate(chosen)]
        for mutation, found in zip(chosen, pool.map(caught_by, chosen, copies), strict=True):
            is_wrong = (found is None) == bool(mutation.file)
            wrong += is_wrong
            verdict = found or ("SURVIVED" if mutation.file else "passes")
            print(f"{mutation.name:34} {mutation.file:18} {verdict[:180]}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        found = check(Path(sys.argv[2]))
        print(found or "")
        sys.exit(found is not None)
    sys.exit(main(sys.argv[1:]))
