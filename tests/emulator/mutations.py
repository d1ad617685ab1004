"""Ways to break the CUDA sources, each of which mutate.py has to notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # in csrc; none: the sources as they are
    before: str  # occurs once there
    after: str
    wide: bool = False  # seen only with 64-bit index arithmetic


MUTATIONS = [
    Mutation("nothing", "", "", ""),
    Mutation("nothing, 64-bit", "", "", "", wide=True),
    Mutation(
        "tail stored one too long", "cuda/packs.cuh",
        "if (k < at.count) to[k]", "if (k <= at.count) to[k]",
    ),
    Mutation(
        "tail loaded one too short", "cuda/packs.cuh",
        "if (k < at.count) x.lane[k]", "if (k + 1 < at.count) x.lane[k]",
    ),
    Mutation(
        "scale and bias swapped", "cuda/channels.cuh",
        "return {row[kMean], row[kScale * p.index.channels], row[kBias * p.index.channels]};",
        "return {row[kMean], row[kBias * p.index.channels], row[kScale * p.index.channels]};",
    ),
    Mutation(
        "a mask bit dropped", "cuda/forward.cuh",
        "uint32_t{blocked<kAct>(z.lane[k])}", "uint32_t{k != 5 && blocked<kAct>(z.lane[k])}",
    ),
    Mutation(
        "a mask bit of ReLU misplaced", "cuda/forward.cuh",
        "FROZEN_BN_LANE(6, 32)", "FROZEN_BN_LANE(6, 16)",
    ),
    Mutation(
        "ReLU forgotten in a tail", "cuda/packs.cuh",
        "kRelu ? relu(x.lane[k]) : x.lane[k]", "x.lane[k]",
    ),
    Mutation(
        "wrong channel at a boundary", "cuda/channels.cuh",
        "lane < split;", "lane <= split;",
    ),
    Mutation(
        "no barrier behind the table", "cuda/channels.cuh",
        "place.sample == 0 && begins));\n  }\n  __syncthreads();",
        "place.sample == 0 && begins));\n  }",
    ),
    Mutation(
        "no barrier before a tile's sums", "cuda/backward.cuh",
        "__syncthreads();\n    reduce_runs(", "reduce_runs(",
    ),
    Mutation(
        "no barrier before the rows' sums", "cuda/backward.cuh",
        "const LaneSums& sums) {\n  __syncthreads();", "const LaneSums& sums) {",
    ),
    Mutation(
        "no barrier in the reduction", "cuda/backward.cuh",
        "rows /= 2) {\n    __syncthreads();", "rows /= 2) {",
    ),
    Mutation(
        "last block not launched", "launch_plan.h",
        "ceil_div(layout.numel, kTileSize)", "std::max<int64_t>(1, layout.numel / kTileSize)",
    ),
    Mutation(
        "wrong period", "launch_plan.h",
        "std::lcm(layout.channels * layout.inner,", "std::lcm(layout.channels,",
    ),
    Mutation(
        "vectors although misaligned", "cuda/ops.cpp",
        "is_aligned({params.input, params.residual, params.output})", "true",
    ),
    Mutation(
        "wrong magic number to divide by", "cuda/params.h", "/ d + 1);", "/ d);",
    ),
    Mutation(
        "last partial row not added", "cuda/backward.cuh",
        "row < p.rows;", "row < p.rows - 1;",
    ),
    Mutation(
        "unused partial rows not cleared", "cuda/backward.cuh",
        "while (++row < first_row + p.segments) write(row, Sums{});", "",
    ),
    Mutation(
        "two tiles write one partial row", "cuda/backward.cuh",
        "first_row + tile_number - first_tile;", "first_row;",
    ),
    Mutation(
        "residual ignored", "cuda/forward.cuh", "x.lane[k] += residual.lane[k];", ";",
    ),
    Mutation(
        "32-bit overflow of a tile's start", "cuda/index.cuh",
        "int64_t{number} * kTileSize", "number * kTileSize",
    ),
    Mutation(
        "32-bit overflow of an element's index", "cuda/packs.cuh",
        "+ number * kPackSize", "+ static_cast<uint32_t>(number) * kPackSize",
    ),
    Mutation(
        "scales of a pair swapped", "cuda/backward.cuh",
        "gradient.lane[k] * channels(k).residual_scale;", "gradient.lane[k] * channels(k).scale;",
    ),
    Mutation(
        "mean of the wrong branch", "cuda/channels.cuh",
        "return {own, residual.mean, residual.scale};", "return {own, own.mean, residual.scale};",
    ),
    Mutation(
        "bias of a pair's residual dropped", "cuda/channels.cuh", "own.bias += residual.bias;", "",
    ),
    Mutation(
        "no barrier behind the table of columns", "cuda/channels.cuh",
        "blockIdx.y == 0 && occurs));\n  }\n  __syncthreads();",
        "blockIdx.y == 0 && occurs));\n  }",
    ),
    Mutation(
        "channels from 1024 on not summed", "cuda/backward.cuh",
        "channel < p.channels && k <", "channel < p.channels && channel < 1024 && k <",
    ),
    Mutation(
        "an activation loaded twice", "cuda/backward.cuh",
        "if (p.input) input = load<T>(p.input, at);",
        "grad_output = load<T>(p.grad_output, at);\n    if (p.input) input = load<T>(p.input, at);",
    ),
    Mutation(
        "a division too many", "cuda/backward.cuh",
        "gradient.lane[k] *= channels(k).scale;",
        "gradient.lane[k] = gradient.lane[k] * channels(k).scale / 3.0f * 3.0f;",
    ),
    Mutation(
        "wrong run", "cuda/index.cuh",
        "first_run = start / index.inner;", "first_run = start / index.tile_inner;", wide=True,
    ),
]  # fmt: skip
