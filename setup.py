"""Builds the extension: CPU kernels wherever there is a C++ compiler, CUDA kernels wherever there
are also a CUDA toolkit and a torch that has CUDA.

FORCE_CUDA=1        stop if the CUDA half cannot be built
FROZEN_BN_CUDA=0    do not build it
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX: as for any torch extension
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def find_cuda_home() -> str | None:
    """The toolkit's root. nvcc on PATH may be a wrapper or a link, so ask it where it really is."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stdout + dry_run.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent)


def why_no_cuda(home: str | None, torch_cuda: str | None) -> str | None:
    if os.environ.get("FROZEN_BN_CUDA") == "0":
        return "FROZEN_BN_CUDA=0"
    if torch_cuda is None:
        return "this torch has no CUDA"
    if home is None:
        return "no CUDA toolkit (nvcc) found"
    nvcc = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    toolkit = re.search(r"release (\d+)\.", nvcc)
    if toolkit is None or toolkit[1] != torch_cuda.split(".")[0]:
        return f"the toolkit in {home} does not fit torch's CUDA {torch_cuda}: {nvcc.strip()[-60:]}"
    return None


def extensions() -> tuple[list, dict]:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"frozen_bn: no C++ compiler ({compiler}): installing without kernels")
        return [], {}
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # before torch guesses
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    reason = why_no_cuda(cuda_home, torch.version.cuda)
    if reason and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"frozen_bn: FORCE_CUDA=1, but the CUDA half cannot be built: {reason}")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    architectures = "none" if reason else os.environ["TORCH_CUDA_ARCH_LIST"]
    stable_abi = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and later
    cxx = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", stable_abi]
    jobs = os.environ.get("MAX_JOBS") or os.cpu_count()
    facts = {
        "TORCH": torch.__version__,
        "CUDA": "none" if reason else torch.version.cuda,
        "ARCHITECTURES": architectures,
    }
    modules = [
        CppExtension(
            "frozen_bn._C",
            [
                "csrc/frozen_bn.cpp",
                "csrc/calls.cpp",
                *sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            ],
            include_dirs=[pybind11.get_include()],
            define_macros=[(f"FROZEN_BN_BUILT_{k}", f'"{v}"') for k, v in facts.items()],
            extra_compile_args={"cxx": cxx},
        )
    ]
    if reason is None:
        modules.append(
            CUDAExtension(
                "frozen_bn._cuda",
                ["csrc/cuda/ops.cpp", "csrc/cuda/launch.cu"],
                define_macros=[("USE_CUDA", None)],  # torch's headers ask for it
                extra_compile_args={
                    "cxx": cxx,
                    "nvcc": ["-std=c++20", "-O3", "-lineinfo", f"--threads={jobs}", stable_abi],
                },
            )
        )
    cuda = f"left out: {reason}" if reason else architectures
    print(f"frozen_bn: torch {torch.__version__}, CUDA {cuda}")

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = "build/temp"  # for editable installs too: a wheel then reuses it

    return modules, {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
