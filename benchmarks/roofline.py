"""The bytes that each layer moves on CUDA. Modelled, not measured: nothing here runs on a GPU.

Ours are counted in the emulator (tests/emulator), which runs the PTX that nvcc made of the kernels:
on one sample, cut to fewer channels (contiguous) or rows (channels_last) where it is large, which
changes neither the access pattern nor the bytes an element. Those of the peers are added up from
the operators that torch dispatches, forward and backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from pandas import DataFrame

from . import peers, traffic
from .cases import DTYPES, LAYOUTS, PAIR, QUICK_SHAPES, Case, every_case
from .dispatched import dispatch_peers
from .rows import Row, problem_of
from .tables import Table, by_contender, rounded
from .traffic import Emulated, Pass

MOST_ELEMENTS, QUICK_MOST_ELEMENTS = 1 << 18, 1 << 16
TARGET = 1.02

EXPLAINED = """\
Modelled, not measured. Ours: counted by running the compiled PTX in an emulator, on one sample, cut
to about 0.26M elements (fewer channels if contiguous, fewer rows if channels_last): 32-byte sectors
of activations, once a warp and launch; vectors once a launch; partial sums. Peers: bytes of the
inputs and outputs of each operator that torch dispatches, every one moved once: too few for an
operator that passes over an input twice, as the backward of F.batch_norm does. The vectors [C] are
float32 constants. timm's FrozenBatchNormAct2d dispatches what torchvision's module does. In
pair+relu, the residual is normalized too: by the same kernel, and by a second layer of each peer.
"Over": sectors of activations over what is unavoidable, every activation once, and a bit an element
for the ReLU; "instructions": of PTX for a pack of 8 elements; the most of any pass, also with a
trained affine where there is one.
"""


def cases(quick: bool) -> list[Case]:
    shapes = QUICK_SHAPES if quick else traffic.SHAPES
    pairs = itertools.product(DTYPES, LAYOUTS, (PAIR,), shapes)
    return every_case(shapes) + [Case(*kind) for kind in pairs]


def _ours(case: Case, which: Pass, counted: Emulated) -> Row:
    part = traffic.unavoidable_bytes(case, which, counted.shape)
    return Row(
        *problem_of("roofline", case),
        mode=which,
        contender=peers.OURS,
        role="ours",
        moved_bytes=counted.bytes_on(case.shape),
        unavoidable_bytes=traffic.unavoidable_bytes(case, which, case.shape),
        launches=counted.launches,
        details={
            "activations": counted.activations / part,
            "instructions_per_pack": counted.instructions_per_pack,
            "narrow": counted.narrow >= traffic.PACK * counted.launches,
        },
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
        for which, of in passes.items():
            problem = (*problem_of("roofline", case), which, name, "peer")
            rows.append(Row(*problem, moved_bytes=of.bytes, launches=of.launches))
    return rows


def tables(rows: DataFrame) -> Iterator[Table]:
    rows = rows[rows["benchmark"] == "roofline"]
    if not len(rows):
        return
    worst = rows.groupby("name")[["details.activations", "details.instructions_per_pack"]].max()
    frozen = rows[rows["mode"] != "backward, affine"]
    frozen = frozen.assign(
        amounts=rounded(frozen["moved_bytes"] / frozen["numel"]),
        launches=rounded(frozen["launches"], "{:.0f}"),
    )
    passes = {"amounts": " + ".join, "launches": "+".join, "moved_bytes": "sum"}
    both = frozen.groupby(["name", "contender"], sort=False, as_index=False).agg(passes)
    table = by_contender(both, both["amounts"] + " (" + both["launches"] + ")")
    moved = both.pivot(index="name", columns="contender", values="moved_bytes")
    for name in traffic.COUNTED:
        table[f"{name} / {peers.OURS}"] = rounded(moved[name] / moved[peers.OURS])
    table["over"] = rounded(worst["details.activations"], "{:.3f}")
    table["instructions"] = rounded(worst["details.instructions_per_pack"], "{:.0f}")
    title = "on CUDA, modelled: bytes an element, forward + backward (launches), and over ours"
    yield title, table


def verdict(rows: DataFrame) -> str:
    ours = rows[(rows["benchmark"] == "roofline") & (rows["role"] == "ours")]
    over, narrow = (ours["details.activations"] > TARGET).sum(), ours["details.narrow"].sum()
    return (
        f"of {len(ours)} rows {over} move more than {TARGET}x the unavoidable, and {narrow} move "
        "activations by less than 16 bytes a thread (not only in a tail)"
    )
