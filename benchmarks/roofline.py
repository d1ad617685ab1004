"""The bytes that each layer moves on CUDA, and the least time that they take on six GPUs. Modelled,
not measured: nothing here runs on a GPU.

Ours are counted in the emulator (tests/emulator), which runs the PTX that nvcc made of the kernels:
on one sample, cut to fewer channels (contiguous) or rows (channels_last) where it is large, which
changes neither the access pattern nor the bytes an element. Those of the peers are added up from
the operators that torch really dispatches for fake CUDA tensors, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import peers, traffic
from .cases import DTYPES, LAYOUTS, PAIR, QUICK_SHAPES, Case, every_case
from .dispatched import dispatch_peers
from .rows import Line, Row, lines, problem_of
from .tables import Table
from .traffic import Emulated, Pass

#: Peak memory bandwidth in GB/s, from NVIDIA's data sheets: T4 and L4 (GDDR6), A100 80 GB SXM
#: (HBM2e), H100 SXM (HBM3), H200 SXM (HBM3e), one of HGX B200 (HBM3e).
BANDWIDTHS = {"T4": 320, "L4": 300, "A100": 2039, "H100": 3350, "H200": 4800, "B200": 8000}

MOST_ELEMENTS, QUICK_MOST_ELEMENTS = 1 << 18, 1 << 16
TARGET = 1.02

EXPLAINED = """\
Modelled, not measured. Ours: counted by running the compiled PTX in an emulator, on one sample, cut
to about 0.26M elements (fewer channels if contiguous, fewer rows if channels_last). Peers: bytes of
the inputs and outputs of each operator that torch dispatches for fake CUDA tensors, every one moved
once: too few for an operator that passes over an input twice, as the backward of F.batch_norm does.
The vectors [C] are float32 constants, but for "affine". timm's FrozenBatchNormAct2d dispatches what
torchvision's module does. In pair+relu, the residual is normalized too: by the same kernel, and by
a second layer of each peer.
  unavoidable  every activation once, and a bit an element for the ReLU: bytes an element
  activations  32-byte sectors of those, once a warp and launch, over the unavoidable
  DRAM         these, vectors once a launch, and partial sums, over the unavoidable; the times are
               these bytes over the peak bandwidth, which no kernel reaches
  L1           sectors of the activations, one access at a time, over the unavoidable
  L2           sectors of everything, once a warp and launch, over the unavoidable; on a whole batch
               of large maps it is less, where threads use their coefficients more often
"""


def cases(quick: bool) -> list[Case]:
    shapes = QUICK_SHAPES if quick else traffic.SHAPES
    pairs = [Case(d, layout, PAIR, s) for s in shapes for d in DTYPES for layout in LAYOUTS]
    return every_case(shapes) + pairs


def _ours(case: Case, which: Pass, counted: Emulated) -> Row:
    part = traffic.unavoidable_bytes(case, which, counted.shape)
    details = {
        "activations": counted.activations / part,
        "L1": counted.requested / part,
        "L2": counted.all_sectors / part,
        "instructions_per_pack": counted.instructions_per_pack,
        "narrow": counted.narrow >= traffic.PACK * counted.launches,
    }
    return Row(
        *problem_of("roofline", case),
        mode=which,
        contender=peers.OURS,
        role="ours",
        moved_bytes=counted.bytes_on(case.shape),
        unavoidable_bytes=traffic.unavoidable_bytes(case, which, case.shape),
        launches=counted.launches,
        details=details,
    )


def bench(case: Case, most: int) -> list[Row]:
    """Forward and backward of ours and the peers; behind a residual also with a trained affine."""
    emulator = traffic.load_emulator()
    shape = traffic.emulated_shape(case.shape, case.layout, most)
    counted = traffic.emulate(emulator, case, shape)
    if case.operation == "residual+relu":
        both = traffic.emulate(emulator, case, shape, affine=True)
        counted["backward, affine"] = both["backward, affine"]
    rows = [_ours(case, which, of) for which, of in counted.items()]
    for name, passes in dispatch_peers(case).items():
        for which, dispatched in passes.items():
            rows.append(
                Row(
                    *problem_of("roofline", case),
                    mode=which,
                    contender=name,
                    role="peer",
                    moved_bytes=dispatched.bytes,
                    launches=dispatched.launches,
                )
            )
    return rows


def ours_table(rows: Sequence[Row]) -> Table:
    headings = ("unavoidable", "activations", "DRAM", "L1", "L2", "instr./pack", "launches")
    table = Table(
        "frozen_bn on CUDA: modelled bytes an element, over the unavoidable; least time, us",
        ("layer", "pass", *headings, *BANDWIDTHS),
    )
    for row in (row for row in rows if row.benchmark == "roofline" and row.role == "ours"):
        assert row.moved_bytes and row.unavoidable_bytes
        table.cells.append(
            (
                row.name,
                row.mode,
                f"{row.unavoidable_bytes / row.numel:.3f}",
                f"{row.details['activations']:.3f}",
                f"{row.moved_bytes / row.unavoidable_bytes:.3f}",
                f"{row.details['L1']:.3f}",
                f"{row.details['L2']:.3f}",
                f"{row.details['instructions_per_pack']:.0f}",
                str(row.launches),
                *(f"{row.moved_bytes / speed / 1e3:.1f}" for speed in BANDWIDTHS.values()),
            )
        )
    return table


def passes(rows: Sequence[Row]) -> list[tuple[Line, Line]]:
    """Forward and backward of each layer, with a frozen affine."""
    forward, backward = (lines(rows, "roofline", mode) for mode in ("forward", "backward"))
    return list(zip(forward, backward, strict=True))


def an_element(both: tuple[Line, Line], name: str) -> float:
    """Bytes, forward and backward."""
    return sum((line.rows[name].moved_bytes or 0) / line.first.numel for line in both)


def peers_table(rows: Sequence[Row]) -> Table:
    """Of the first shape: bytes an element do not depend on it."""
    counted = traffic.COUNTED
    table = Table(
        "on CUDA, modelled: bytes an element, forward + backward (launches); bytes of the peer "
        "over ours, which is also the least times' ratio",
        ("layer", peers.OURS, *counted, *(f"{name} / {peers.OURS}" for name in counted)),
    )
    for both in passes(rows):
        if both[0].first.shape != passes(rows)[0][0].first.shape:
            continue
        cells = []
        for name in (peers.OURS, *counted):
            of = [line.rows[name] for line in both]
            amounts = " + ".join(f"{(row.moved_bytes or 0) / row.numel:.2f}" for row in of)
            cells.append(f"{amounts} ({'+'.join(str(row.launches) for row in of)})")
        ratios = (an_element(both, name) / an_element(both, peers.OURS) for name in counted)
        table.cells.append((both[0].first.name, *cells, *(f"{ratio:.2f}" for ratio in ratios)))
    return table


def verdict(rows: Sequence[Row]) -> str:
    ours = [row for row in rows if row.benchmark == "roofline" and row.role == "ours"]
    over = sum(row.details["activations"] > TARGET for row in ours)
    narrow = sum(row.details["narrow"] for row in ours)
    return (
        f"of {len(ours)} rows {over} move more than {TARGET}x the unavoidable, and {narrow} move "
        "activations by less than 16 bytes a thread (not only in a tail)"
    )
