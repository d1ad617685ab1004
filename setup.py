"""Builds the extension: CPU kernels, and the autograd node for the torch at hand, wherever there is
a C++ compiler; CUDA kernels wherever there are also a CUDA toolkit and a torch that has CUDA.

FORCE_CUDA=1             stop if the CUDA half cannot be built
FROZEN_BN_CUDA=0         do not build it
FROZEN_BN_NODE=0         do not build the autograd node
FROZEN_BN_CUDA_ARCHS=    all: for every architecture; one: where there is no GPU, for just one
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, PYTORCH_NVCC: as for any torch extension

ccache is used where it is installed, from torch 2.13 on.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ONE_ARCHITECTURE = "9.0+PTX"  # that of the PTX which the tests run in the emulator

# Not -O3, which takes longer and brings nothing measurable; but loops have to be split by what is
# the same all along them: which outputs there are, say. No debug information: it takes a third of
# the time, and most of the library.
OPTIMIZE = ["-O2", "-funswitch-loops", "-g0"]


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


def small(cuda_home: str) -> list[str]:
    """What keeps a library of many architectures small, for a third of the time that one of them
    takes to compile."""
    known = subprocess.run([f"{cuda_home}/bin/nvcc", "--help"], capture_output=True, text=True)
    return ["--compress-mode=size"] if "--compress-mode" in known.stdout else []


def choose_architectures() -> tuple[str, str]:
    """Which to compile for, and why."""
    import torch

    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen, "TORCH_CUDA_ARCH_LIST"
    wish = os.environ.get("FROZEN_BN_CUDA_ARCHS")
    if wish not in (None, "", "all", "one"):
        raise SystemExit(f"frozen_bn: expected FROZEN_BN_CUDA_ARCHS to be all or one, got {wish}")
    if wish == "all":
        return ARCHITECTURES, "FROZEN_BN_CUDA_ARCHS=all"
    if torch.cuda.is_available():
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        here = [f"{major}.{minor}" for major, minor in sorted(gpus)]
        return ";".join(here) + "+PTX", "that of the GPU here"
    if wish == "one":
        return ONE_ARCHITECTURE, "just one: no GPU here, and FROZEN_BN_CUDA_ARCHS=one"
    return ARCHITECTURES, "all: no GPU here to tell which"


def write_if_other(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:  # else what includes it is compiled again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


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
    # torch 2.13 and later puts ccache before the compilers. It is not to tell folders apart: pip
    # builds in another one each time.
    os.environ.setdefault("CCACHE_BASEDIR", str(Path.cwd()))
    os.environ.setdefault("CCACHE_NOHASHDIR", "1")
    architectures, why = ("none", reason) if reason else choose_architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES if reason else architectures
    facts = {
        "TORCH": torch.__version__,
        "CUDA": "none" if reason else torch.version.cuda,
        "ARCHITECTURES": architectures,
        "WHY": why,
    }
    # In a header of one file, not on the command line of all.
    lines = [f'#define FROZEN_BN_BUILT_{name} "{value}"\n' for name, value in facts.items()]
    write_if_other(Path("build/facts/built.h"), "".join(lines))
    facts_dir = str(Path("build/facts").resolve())
    stable_abi = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10 and later
    cxx = ["-std=c++20", *OPTIMIZE, "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    jobs = os.environ.get("MAX_JOBS") or os.cpu_count()
    kernels = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    modules = [
        CppExtension(
            "frozen_bn._C",
            ["csrc/frozen_bn.cpp", *kernels],
            include_dirs=[pybind11.get_include(), facts_dir],
            extra_compile_args={"cxx": [*cxx, stable_abi]},
        ),
    ]
    if os.environ.get("FROZEN_BN_NODE") != "0":
        # For this torch only. Under another one, Python does the same.
        modules.append(
            CppExtension(
                "frozen_bn._node",
                ["csrc/node.cpp"],
                include_dirs=[facts_dir],
                extra_compile_args={"cxx": cxx},
            )
        )
    if reason is None:
        several = re.search("[; ]", architectures)
        many = [f"--threads={jobs}", *small(cuda_home)] if several else []
        modules.append(
            CUDAExtension(
                "frozen_bn._cuda",
                ["csrc/cuda/ops.cpp", "csrc/cuda/launch.cu"],
                define_macros=[("USE_CUDA", None)],  # torch's headers ask for it
                extra_compile_args={
                    "cxx": [*cxx, stable_abi],
                    "nvcc": [
                        "-std=c++20",
                        "-O3",
                        "-lineinfo",
                        *many,
                        stable_abi,
                    ],
                },
            )
        )
    print(f"frozen_bn: torch {torch.__version__}, CUDA architectures: {architectures} ({why})")

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = "build/temp"  # for editable installs too: a wheel then reuses it

    return modules, {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
