"""What was built, and what of it runs here."""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

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


#: Builds it anew for the torch that is there. From a clone: there is no release yet.
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
_NEEDS = "(in a clone; with setuptools, ninja and pybind11 installed)"


def _without_kernels(folder: Path) -> str:
    """Why there are none at all, and what mends it."""
    libraries = [path.name for path in folder.glob("_C*.so")]
    if (folder.parent / "setup.py").exists() and not libraries:
        return (
            f"This is the source folder {folder}, in which nothing was compiled. Run what you "
            f"installed, from another folder or by `python -P`; or compile here: `make build`."
        )
    if not libraries:
        compiler = "" if shutil.which("c++") else "install a C++ compiler (g++), then "
        return f"It was installed without kernels: {compiler}`{REBUILD}` {_NEEDS}."
    return (
        f"The kernels do not load ({ops.unavailable['cpu']}). They are for torch 2.10 or later, "
        f"and for the Python that they were built with ({', '.join(sorted(libraries))}): "
        f"`{REBUILD}` {_NEEDS}."
    )


def _without_cuda_kernels(why_not_built: str) -> str:
    """Likewise, where there is a GPU and a CUDA torch."""
    mended = f"`FORCE_CUDA=1 {REBUILD}`, which stops and says why if it cannot, {_NEEDS}"
    if why_not_built == "FROZEN_BN_CUDA=0":
        return f"The CUDA half was left out by FROZEN_BN_CUDA=0: unset it, then {mended}."
    major = str(torch.version.cuda).split(".")[0]
    if ops.unavailable["cuda"] == "not built":
        return (
            f"The CUDA half was not built ({why_not_built}): install the CUDA toolkit {major}, "
            f"with nvcc on PATH or in CUDA_HOME, then {mended}."
        )
    return (
        f"The CUDA half does not load ({ops.unavailable['cuda']}). It was built with another "
        f"CUDA or torch, perhaps: {mended}."
    )


def _runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a GPU can run what was compiled for these, such as ``8.0;9.0+PTX``: code of the same
    major version and at most its minor one, or PTX of an earlier one."""
    for name in re.split("[; ]+", architectures):
        numbers = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if numbers is None:  # a name that torch knows, such as Hopper
            return True
        major, minor = int(numbers[1]), int(numbers[2])
        if major == capability[0] and minor <= capability[1]:
            return True
        if numbers[3] and (major, minor) <= capability:
            return True
    return False


def advice() -> list[str]:
    """What is amiss on this machine, and the command that mends it: one paragraph each."""
    if "cpu" not in ops.live:
        return [_without_kernels(Path(__file__).parent)]
    built, found = _built(), []
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if gpus and "cuda" not in ops.live:
        found.append(_without_cuda_kernels(built["why"]))
    for major, minor in sorted({*gpus}) if "cuda" in ops.live else ():
        if not _runs_on((major, minor), built["architectures"]):
            wanted = f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
            found.append(
                f"The GPU here (compute capability {major}.{minor}) runs none of the architectures "
                f"that were compiled ({built['architectures']}): `{wanted} {REBUILD}` {_NEEDS}."
            )
    if node.why_not and node.why_not != "FROZEN_BN_NODE=0":
        found.append(
            f"Calls take longer than they need, by the autograd node in Python ({node.why_not}). "
            f"Results are the same. To have the compiled one: `{REBUILD}` {_NEEDS}."
        )
    return found
