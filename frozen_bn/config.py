"""What was built, and what of it runs here."""

from __future__ import annotations

import platform

import torch

from . import node, ops


def _built() -> dict[str, str]:
    if "cpu" not in ops.live:
        return {}
    from . import _C

    return _C.build_info()


def show_config() -> str:
    """A table, as text: version, torch, CUDA, the architectures compiled in, the CPU level (the
    instruction set that the CPU kernels use), which paths are live, and which autograd node."""
    from . import __version__

    built = _built()

    def path(device: str) -> str:
        reason = ops.unavailable.get(device)
        return f"plain PyTorch ({reason})" if reason else "kernels"

    cpu = path("cpu")
    if built:
        cpu += f", {_cpu_level()}"
    cuda = path("cuda")
    if not torch.cuda.is_available():
        cuda += ", no GPU here"
    rows = {
        "frozen_bn": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, built with {built.get('torch', 'nothing')}",
        "compiler": built.get("compiler", "none"),
        "CUDA": f"torch has {torch.version.cuda}, built with {built.get('cuda', 'nothing')}",
        "architectures": f"{built['architectures']} ({built['why']})" if built else "none",
        "CPU path": cpu,
        "CUDA path": cuda,
        "autograd node": f"Python's ({node.why_not})" if node.why_not else "compiled",
    }
    return "\n".join(f"{name + ':':<15}{value}" for name, value in rows.items())


def _cpu_level() -> str:
    from . import _C

    return _C.cpu_level()
