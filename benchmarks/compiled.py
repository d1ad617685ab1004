"""``python -m benchmarks.compiled``: what nvcc made of each CUDA kernel, for each architecture.

Registers, spills, static shared memory and launch bound from the ELF files inside
``frozen_bn/_cuda*.so``; from the machine code, the widths of the accesses to global memory. The
occupancy is the theoretical one, of blocks of as many threads as the launch bound allows. No GPU is
needed, only NVIDIA's ``cuobjdump`` and ``nvdisasm`` (PyPI: nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from frozen_bn.checks import ACTIVATIONS

#: What a kernel is compiled for: an activation, or any of the rarer ones.
COMPILED = (*ACTIVATIONS, "rare")

LIBRARY = Path(__file__).parents[1] / "frozen_bn" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
OCCUPANCY_WORST = 0.5
WARP = 32


class MissingTool(RuntimeError):
    """NVIDIA's disassembler is not there."""


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share (CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability"; cuda_occupancy.h). Bytes, threads in warps."""

    warps: int
    blocks: int
    shared: int
    shared_reserved: int  # by the driver, of each block
    shared_unit: int
    registers: int = 65536
    register_unit: int = 256  # of each warp
    partitions: int = 4  # each has its share of the registers and warps

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """The share of the warps that blocks of ``threads`` can fill."""
        warps = -(-threads // WARP)
        a_warp = -(-registers * WARP // self.register_unit) * self.register_unit
        by_registers = self.registers // self.partitions // a_warp * self.partitions // warps
        a_block = -(-(shared + self.shared_reserved) // self.shared_unit) * self.shared_unit
        by_shared = self.shared // a_block if a_block else self.blocks
        blocks = min(self.blocks, self.warps // warps, by_registers, by_shared)
        return blocks * warps / self.warps


KIB = 1024
MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 * KIB, 0, 256),
    80: Multiprocessor(64, 32, 164 * KIB, KIB, 128),
    86: Multiprocessor(48, 16, 100 * KIB, KIB, 128),
    89: Multiprocessor(48, 24, 100 * KIB, KIB, 128),
    90: Multiprocessor(64, 32, 228 * KIB, KIB, 128),
    100: Multiprocessor(64, 32, 228 * KIB, KIB, 128),
    120: Multiprocessor(48, 24, 100 * KIB, KIB, 128),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str
    architecture: int
    registers: int
    stack: int  # bytes a thread; where spilled registers go
    shared: int  # bytes a block, static
    threads: int  # the most a block may have
    loads: Counter[int] = field(default_factory=Counter)  # global, by bytes a thread
    stores: Counter[int] = field(default_factory=Counter)
    local_accesses: int = 0  # instructions: spills and arrays on the stack

    @property
    def occupancy(self) -> float:
        limits = MULTIPROCESSORS[self.architecture]
        return limits.occupancy(self.threads, self.registers, self.shared)

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local_accesses > 0


def find_tool(name: str) -> Path:
    """From PATH, a CUDA toolkit, or the PyPI package, wherever that puts it."""
    places = [Path(sysconfig.get_paths()[kind]) / "nvidia" for kind in ("platlib", "purelib")]
    candidates = [path for place in places for path in sorted(place.glob(f"**/bin/{name}"))]
    candidates += [Path(found)] if (found := shutil.which(name)) else []
    candidates.append(Path("/usr/local/cuda/bin") / name)
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise MissingTool(f"{name} not found: pip install nvidia-cuda-{name}")


def _dump(library: Path, *options: str) -> str:
    """What cuobjdump prints; it looks for nvdisasm on PATH."""
    folders = {str(find_tool(name).parent) for name in ("cuobjdump", "nvdisasm")}
    path = os.pathsep.join([*sorted(folders), os.environ.get("PATH", "")])
    command = [str(find_tool("cuobjdump")), *options, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def readable(symbol: str) -> str:
    """``forward_planar<half, relu>``"""
    name = torch._C._demangle(symbol)
    name = re.sub(r"^.*frozen_bn_(\w+?)_kernel", r"\1", name.partition("(frozen_bn::cuda::")[0])
    name = name.replace("__half", "half").replace("__nv_bfloat16", "bfloat16")
    return re.sub(
        r"\(frozen_bn::Activation\)(\d+)", lambda m: str(COMPILED[int(m[1])]).lower(), name
    )


def _with_symbols(pattern: str, text: str) -> Iterator[tuple[str, str]]:
    """The symbol that ``pattern`` captures, and the text up to the next one."""
    parts = re.split(pattern, text, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_ACCESS = re.compile(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*) ")


def accesses(code: str) -> tuple[Counter[int], Counter[int], int]:
    """Global loads and stores of a kernel's machine code by width; the number of local ones."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    local = 0
    for opcode, modifiers in _ACCESS.findall(code):
        if opcode in ("LDL", "STL"):
            local += 1
            continue
        width = next((_WIDTHS[m] for m in modifiers.split(".") if m in _WIDTHS), 4)
        (loads if opcode == "LDG" else stores)[width] += 1
    return loads, stores, local


def _threads(elf: str) -> dict[str, int]:
    """The launch bound of each kernel."""
    bounds = {}
    for symbol, section in _with_symbols(r"^\.nv\.info\.(\S+)$", elf):
        bound = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:((?:\s+0x\w+)+)", section)
        if bound is not None:
            x, y, z = (int(size, 16) for size in bound[1].split())
            bounds[symbol] = x * y * z
    return bounds


def _read_architecture(library: Path, architecture: int) -> list[Kernel]:
    of = ("-arch", f"sm_{architecture}")
    bounds = _threads(_dump(library, "-elf", *of))
    code = dict(_with_symbols(r"^\s*Function : (\S+)$", _dump(library, "-sass", *of)))
    kernels = []
    for symbol, text in _with_symbols(r"^ Function (\S+):$", _dump(library, "-res-usage", *of)):
        use = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
        kernel = Kernel(
            readable(symbol),
            architecture,
            use["REG"],
            use["STACK"] + use["LOCAL"],
            use["SHARED"],
            bounds.get(symbol, 1024),
            *accesses(code[symbol]),
        )
        kernels.append(kernel)
    return kernels


def read(library: Path = LIBRARY) -> list[Kernel]:
    """Every kernel on every architecture that the library has machine code for.

    Raises:
        MissingTool: cuobjdump or nvdisasm is not installed.
        FileNotFoundError: the CUDA half is not built.
    """
    if not library.exists():
        raise FileNotFoundError(f"the CUDA half is not built: no {library}")
    listing = _dump(library, "--list-elf")
    found = {int(number) for number in re.findall(r"\.sm_(\d+)\.cubin", listing)}
    architectures = sorted(found & MULTIPROCESSORS.keys())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda a: _read_architecture(library, a), architectures)
    return sorted((k for part in parts for k in part), key=lambda k: (k.name, k.architecture))


def _cell(kernel: Kernel) -> str:
    spilled = f" +{kernel.stack} B" if kernel.spills else ""
    bad = kernel.spills or kernel.occupancy < OCCUPANCY_WORST
    return f"{kernel.registers} {kernel.occupancy:.0%}{spilled}{' !' if bad else ''}"


def _widths(counters: Iterable[Counter[int]]) -> str:
    """``16:4 4:2``: the fewest on any architecture, widest first."""
    every = list(counters)
    widths = sorted({width for counter in every for width in counter}, reverse=True)
    return " ".join(f"{w}:{min(c[w] for c in every)}" for w in widths)


def table(kernels: Iterable[Kernel]) -> str:
    """In Markdown, a line a kernel."""
    from pandas import DataFrame  # not needed by those who just look for a tool

    lines = {}
    for name, group in groupby(kernels, key=lambda k: k.name):
        of = list(group)
        lines[name] = {
            "shared": str(max(k.shared for k in of)),
            "loads": _widths(k.loads for k in of),
            "stores": _widths(k.stores for k in of),
            **{f"sm_{k.architecture}": _cell(k) for k in of},
        }
    found = DataFrame.from_dict(lines, "index").fillna("-").rename_axis("kernel")
    return found.to_markdown(disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filter", default="", metavar="REGEX", help="kernels it is found in")
    options = parser.parse_args()
    try:
        kernels = [k for k in read() if re.search(options.filter, k.name)]
    except (MissingTool, FileNotFoundError) as error:
        sys.exit(str(error))
    print(
        "Registers a thread and theoretical occupancy (+ bytes of stack; ! what should not be) by "
        "architecture; global loads and stores in the machine code, bytes:instructions, the fewest "
        f"of all architectures.\n\n{table(kernels)}\n"
    )
    low = sum(k.occupancy < OCCUPANCY_WORST for k in kernels)
    spilling = sum(k.spills for k in kernels)
    print(
        f"{len(kernels)} kernels: {low} with an occupancy below {OCCUPANCY_WORST:.0%}, "
        f"{spilling} with accesses to the stack"
    )


if __name__ == "__main__":
    main()
