"""The CUDA operators on CPU tensors: the real host code, its launches emulated.

``build`` compiles ``csrc/cuda`` with a stand-in CUDA runtime (``runtime.cpp``), which hands every
launch to :class:`Emulator`; that runs the PTX which nvcc made of the kernels.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import frozen_bn
from frozen_bn import ops

from .machine import Counters, EmulationError, Launch, Program
from .memory import AddressSpace, Region
from .ptx import Module
from .replace import pythons_node, replaced

ROOT = Path(__file__).parents[2]
#: The virtual architecture whose PTX is run.
ARCHITECTURE = os.environ.get("FROZEN_BN_EMULATED_ARCH", "90")


def cuda_home() -> Path | None:
    """The CUDA toolkit, also where nvcc on PATH is a wrapper script."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stdout + dry_run.stderr, re.MULTILINE)
    return Path(top[1] if top else Path(nvcc).parent.parent).resolve()


def available() -> bool:
    """Whether the emulator can be built here: there is an nvcc, and the compiled operators."""
    return cuda_home() is not None and "cpu" in frozen_bn.ops.live


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def compile_kernels(source: Path, folder: Path, architecture: str = ARCHITECTURE) -> Path:
    """Compiles a ``.cu`` file to an object whose only code is PTX; the PTX lies beside it."""
    home = cuda_home()
    folder.mkdir(parents=True, exist_ok=True)
    object_file = folder / f"{source.stem}.o"
    architectures = f"arch=compute_{architecture},code=compute_{architecture}"
    _run(
        f"{home}/bin/nvcc", "-std=c++20", "-O3", "-lineinfo", "-gencode", architectures,
        "-cudart", "none", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        "--keep", "--keep-dir", folder, "-c", source, "-o", object_file,
    )  # fmt: skip
    return object_file


def _built_kernels(folder: Path, newest: float) -> Path | None:
    """The object that the package was linked from, if it has the PTX, which is put into ``folder``:
    nothing need be compiled twice."""
    built = ROOT / "build/temp/csrc/cuda/launch.o"
    if not built.exists() or built.stat().st_mtime < newest:
        return None
    try:
        from benchmarks.compiled import MissingTool, find_tool
    except ImportError:
        return None
    try:
        tool = find_tool("cuobjdump")
    except MissingTool:
        return None
    ptx = folder / f"launch.sm_{ARCHITECTURE}.ptx"
    ptx.unlink(missing_ok=True)
    subprocess.run([tool, "--extract-ptx", "all", built], cwd=folder, capture_output=True)
    if not ptx.exists():
        return None
    ptx.replace(folder / "launch.ptx")
    return Path(shutil.copy(built, folder / "launch.o"))


def build(csrc: Path = ROOT / "csrc", folder: Path | None = None, wide: bool = False) -> Path:
    """The test library, rebuilt if a source is newer; ``launch.ptx`` lies beside it."""
    folder = folder or ROOT / "build" / f"emulator-sm_{ARCHITECTURE}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # test processes start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(csrc, folder, wide)


def _build(csrc: Path, folder: Path, wide: bool) -> Path:
    library = folder / ("emulated_wide.so" if wide else "emulated.so")
    folders = {csrc: "*.h", csrc / "cuda": "*", Path(__file__).parent: "*.cpp"}
    sources = [file for place, pattern in folders.items() for file in place.glob(pattern)]
    newest = max(file.stat().st_mtime for file in sources)
    if library.exists() and library.stat().st_mtime > newest:
        return library
    kernels = folder / "launch.o"
    if not kernels.exists() or kernels.stat().st_mtime < newest:
        found = _built_kernels(folder, newest) if csrc == ROOT / "csrc" else None
        kernels = found or compile_kernels(csrc / "cuda" / "launch.cu", folder)
    torch_root = Path(torch.__file__).parent
    includes = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]
    includes += [cuda_home() / "include", sysconfig.get_paths()["include"]]
    _run(
        os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared",
        "-fvisibility=hidden", "-Wl,-Bsymbolic", "-Wno-psabi", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DFROZEN_BN_LIBRARY=frozen_bn_{library.stem}", "-DFROZEN_BN_DISPATCH_KEY=CPU",
        f"-DFROZEN_BN_FORCE_WIDE={'true' if wide else 'false'}",
        *(f"-I{include}" for include in includes),
        csrc / "cuda/ops.cpp", Path(__file__).parent / "runtime.cpp", kernels,
        f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", library,
    )  # fmt: skip
    return library


_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
)


class _Observer(TorchDispatchMode):
    """Sees what the host code allocates and copies through torch."""

    def __init__(self, memory: AddressSpace) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = "empty" in func.__name__
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                register(self._memory, "temporary", tensor, initialised=not fresh, writable=True)
        return result


def register(
    memory: AddressSpace, name: str, tensor: Tensor, *, initialised: bool, writable: bool
) -> NDArray[np.bool_] | None:
    """Makes a tensor known to the emulator. What is not dense never reaches a kernel.

    Returns which units of its memory kernels have written, as the launches go on.
    """
    if tensor.numel() == 0 or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    size = tensor.numel() * tensor.element_size()
    region = memory.add(Region.at(name, tensor.data_ptr(), size, tensor.element_size()))
    start = (tensor.data_ptr() - region.base) // region.unit
    mine = slice(start, start + size // region.unit)
    region.initialised[mine] |= initialised
    region.writable |= writable
    return region.written[mine]


class Emulator:
    """The operators ``forward``, ``forward_pair`` and ``backward`` of ``csrc/cuda`` on CPU tensors.

    ``launches`` collects what the kernels did since it was last cleared. With ``seed``, warps run
    in a random order; with ``count_sectors``, memory traffic is counted (slower). With ``part``
    (blocks, slices, numel), only these blocks run, and of tensors of ``numel`` elements, or as many
    bits, they may touch only these slices.
    """

    def __init__(self, library: Path) -> None:
        namespace = f"frozen_bn_{library.stem}"
        self._definitions = torch.library.Library(namespace, "DEF")
        for name in ("forward", "forward_pair", "backward"):
            schema = str(getattr(torch.ops.frozen_bn, name).default._schema)
            self._definitions.define(schema.removeprefix("frozen_bn::"))
        torch.ops.load_library(library)
        self._operators = getattr(torch.ops, namespace)
        self._ptx = library.with_name("launch.ptx")
        self._module: Module | None = None
        self._programs: dict[str, Program] = {}
        self._callback = _LAUNCHER(self._on_launch)
        self._runtime = ctypes.CDLL(str(library))
        self._runtime.emulator_set_launcher(self._callback)
        self._memory = AddressSpace()
        self._error: Exception | None = None
        self.launches: list[Counters] = []
        self.seed: int | None = None
        self.count_sectors = False
        self.part: tuple[range, list[slice], int] | None = None

    def _own(self) -> Module:
        if self._module is None:
            self._module = Module(self._ptx.read_text())
        return self._module

    def _program(self, name: str) -> Program:
        if name not in self._programs:
            # Tens of thousands of objects that stay: nothing for the garbage collector to walk
            # through again and again.
            gc.disable()
            try:
                self._programs[name] = Program(self._own().kernel(name))
            finally:
                gc.enable()
            gc.freeze()
        return self._programs[name]

    @contextmanager
    def instead(self, module: Module) -> Iterator[None]:
        """Within, kernels that ``module`` has too are taken from there: compiled for another
        architecture, say."""

        def plain(name: str) -> str:
            return name[name.find("frozen_bn_") :]  # what is before tells the file

        theirs = {plain(name): name for name in module.names}
        common = {name: theirs[plain(name)] for name in self._own().names if plain(name) in theirs}
        before = self._programs
        self._programs = before | {
            name: Program(module.kernel(their_name)) for name, their_name in common.items()
        }
        try:
            yield
        finally:
            self._programs = before

    def _on_launch(self, name: bytes, grid: Any, block: Any, arguments: Any) -> int:
        try:
            program = self._program(name.decode())
            parameters = program.kernel.parameters.values()
            packed = bytearray(max((offset + size for offset, size in parameters), default=0))
            for (offset, size), address in zip(parameters, arguments, strict=False):
                packed[offset : offset + size] = ctypes.string_at(address, size)
            launch = Launch(
                program,
                (grid[0], grid[1], grid[2]),
                (block[0], block[1], block[2]),
                bytes(packed),
                self._memory,
                seed=self.seed,
                count_sectors=self.count_sectors,
                blocks=self.part and self.part[0],
            )
            self.launches.append(launch.run())
        except Exception as error:  # must not cross into C++
            self._error = error
            return 1
        return 0

    def _call(self, operator: Any, arguments: tuple[Any, ...]) -> None:
        self._memory = AddressSpace()
        self._error = None
        names = [(a.name, a.is_write) for a in operator._schema.arguments]
        tensors = [
            (name, tensor, written)
            for (name, written), tensor in zip(names, arguments, strict=True)
            if isinstance(tensor, Tensor)
        ]
        outputs = []
        for name, tensor, written in sorted(tensors, key=lambda t: t[2]):  # inputs first
            for piece in self._pieces(tensor):
                mine = register(
                    self._memory, name, piece, initialised=not written, writable=written
                )
                if written and mine is not None:
                    outputs.append((name, mine))
        try:
            with _Observer(self._memory):
                operator._op_dk(torch._C.DispatchKey.CPU, *arguments)
        except RuntimeError:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error
        if arguments[0].numel() > 0:
            for name, mine in outputs:
                _check_written(name, mine)

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        """What of a tensor the kernels may touch."""
        if self.part is not None:
            _, slices, numel = self.part
            if tensor.numel() == numel:
                return [tensor.view(-1)[s] for s in slices]
            if tensor.numel() == -(-numel // 8):
                return [tensor[s.start // 8 : -(-s.stop // 8)] for s in slices]
        return [tensor]

    def set_multiprocessors(self, count: int = 132) -> None:
        """Of the emulated device, which the launch plans depend on."""
        self._runtime.emulator_set_multiprocessors(count)

    def forward(self, *arguments: Any) -> None:
        """``torch.ops.frozen_bn.forward``, without float64."""
        self._call(self._operators.forward.default, arguments)

    def forward_pair(self, *arguments: Any) -> None:
        """``torch.ops.frozen_bn.forward_pair``, without float64."""
        self._call(self._operators.forward_pair.default, arguments)

    def backward(self, *arguments: Any) -> None:
        """``torch.ops.frozen_bn.backward``, without float64."""
        self._call(self._operators.backward.default, arguments)

    @contextmanager
    def active(self) -> Iterator[Emulator]:
        """Within, ``frozen_bn`` runs CPU tensors through the emulated CUDA operators: all but
        float64, which has no kernels there."""

        def unless_double(emulated: Any, own: Any) -> Any:
            return lambda *arguments: (own if arguments[0].dtype == torch.float64 else emulated)(
                *arguments
            )

        emulated = {
            "_forward_operator": self.forward,
            "_forward_pair_operator": self.forward_pair,
            "_backward_operator": self.backward,
        }
        places = [(ops, n, unless_double(f, getattr(ops, n))) for n, f in emulated.items()]
        with pythons_node(), replaced(places):  # which finds the emulated operators
            yield self


def _check_written(name: str, written: NDArray[np.bool_]) -> None:
    if not written.all():
        raise EmulationError(f"element {int((~written).argmax())} of {name} was never written")
