"""What nvcc made of the CUDA kernels, without a GPU: no spills, enough occupancy, wide accesses."""

from __future__ import annotations

import re

import pytest

from frozen_bn.checks import SMOOTH

compiled = pytest.importorskip(
    "benchmarks.compiled", reason="needs the repository's root as working directory"
)

ARCHITECTURES = sorted(compiled.MULTIPROCESSORS)
VECTOR = 16  # bytes
SMOOTH_NAMES = {compiled.ACTIVATIONS[code] for code in SMOOTH} | {"rare"}


@pytest.fixture(scope="module")
def every_kernel() -> list:
    try:
        return compiled.read()
    except (compiled.MissingTool, FileNotFoundError) as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=ARCHITECTURES, ids=lambda number: f"sm_{number}")
def kernels(request: pytest.FixtureRequest, every_kernel: list) -> list:
    """Those of one architecture."""
    found = [kernel for kernel in every_kernel if kernel.architecture == request.param]
    if not found:
        pytest.skip(f"frozen_bn is not built for sm_{request.param}")
    return found


def test_there_is_every_kind_of_kernel(kernels):
    kinds = {kernel.name.partition("<")[0] for kernel in kernels}
    ways = [f"{way}_{walk}" for way in ("forward", "backward") for walk in ("planar", "periodic")]
    assert kinds >= {*ways, *(way.replace("_", "_pair_") for way in ways)}
    names = [kernel.name for kernel in kernels]
    assert len(set(names)) == len(names)
    for dtype in ("float", "half", "bfloat16"):
        assert f"forward_planar<{dtype}, relu, true>" in names  # with a residual


def test_nothing_spills(kernels):
    spilling = [(k.name, f"{k.stack} B, {k.local_accesses} local") for k in kernels if k.spills]
    assert spilling == []


def test_half_of_the_warps_fit(kernels):
    worst = compiled.OCCUPANCY_WORST
    low = [
        f"{k.name}: {k.occupancy:.0%} ({k.registers} registers, {k.shared} B shared)"
        for k in kernels
        if k.occupancy < worst
    ]
    assert low == []


def _vector_accesses(name: str) -> tuple[int, int]:
    """The fewest 16-byte loads and stores that a pack of 8 elements takes, tensor by tensor."""
    kind, dtype, activation, *rest = re.split(r"[<>, ]+", name.rstrip(">"))
    smooth = activation in SMOOTH_NAMES
    if kind.startswith("forward"):
        loads, stores = 1 + ("true" in rest), 1  # input, residual; output
    else:
        loads = 1 + (smooth or "true" in rest) + smooth  # grad_output; input; residual
        stores = 1 + (activation != "none" or "pair" in kind)  # grad_input; grad_residual
    a_pack = 2 if dtype == "float" else 1
    return loads * a_pack, stores * a_pack


def _wide(counter) -> int:
    return sum(n * width // VECTOR for width, n in counter.items() if width >= VECTOR)


def test_activations_move_16_bytes_at_a_time(kernels):
    """The machine code has them; that they are what runs outside tails is for test_roofline."""
    narrow = []
    for kernel in kernels:
        if kernel.name.startswith(("forward", "backward")):
            loads, stores = _vector_accesses(kernel.name)
            if _wide(kernel.loads) < loads or _wide(kernel.stores) < stores:
                narrow.append((kernel.name, dict(kernel.loads), dict(kernel.stores)))
    assert narrow == []


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "expected"),
    [
        (90, 256, 32, 0, 1.0),
        (90, 256, 64, 0, 0.5),
        (90, 256, 65, 0, 3 / 8),  # 72 registers a thread are allocated
        (90, 1024, 32, 100 * 1024, 1.0),
        (90, 256, 32, 56 * 1024, 4 / 8),  # 57 KiB with the driver's: four of 228
        (90, 256, 32, 57 * 1024, 3 / 8),
        (75, 256, 64, 0, 1.0),
        (75, 256, 128, 0, 0.5),
        (75, 256, 32, 17 * 1024, 3 / 4),  # nothing reserved: three of 64 KiB
        (86, 256, 48, 0, 5 / 6),
        (86, 256, 80, 0, 0.5),
        (120, 256, 81, 0, 1 / 3),
        (80, 32, 16, 0, 0.5),  # 32 blocks at most
    ],
)
def test_occupancy(architecture, threads, registers, shared, expected):
    limits = compiled.MULTIPROCESSORS[architecture]
    assert limits.occupancy(threads, registers, shared) == pytest.approx(expected)


def test_widths_from_machine_code():
    code = """
        /*0a40*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;      /* 0x00000a00ff017b82 */
        /*0a50*/                   LDG.E.U16 R4, desc[UR6][R2.64] ;      /* 0x00000a00ff017b82 */
        /*0a60*/                   LDG.E.SYS R4, [R2] ;                  /* 0x00000a00ff017b82 */
        /*0a70*/                   LDGSTS.E.128 [R4], [R2.64] ;          /* 0x00000a00ff017b82 */
        /*0a80*/                   STG.E.64 desc[UR6][R2.64], R4 ;       /* 0x00000a00ff017b82 */
        /*0a90*/                   STG.E.ENL2.256 desc[UR6][R2.64], R4 ; /* 0x00000a00ff017b82 */
        /*0aa0*/                   STL.64 [R1], R4 ;                     /* 0x00000a00ff017b82 */
        /*0ab0*/                   LDL.LU R4, [R1] ;                     /* 0x00000a00ff017b82 */
    """
    loads, stores, local = compiled.accesses(code)
    assert (loads, stores, local) == ({16: 1, 2: 1, 4: 1}, {8: 1, 32: 1}, 2)


def test_names_are_readable():
    symbol = (
        "_ZN9frozen_bn4cuda41_GLOBAL__N__1fe7de3d_9_launch_cu_c6feb6a732"
        "frozen_bn_backward_planar_kernelI6__halfLNS_10ActivationE1ELb1EEEvNS0_14BackwardParamsE"
    )
    assert compiled.readable(symbol) == "backward_planar<half, relu, true>"
