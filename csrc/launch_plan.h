// Shape and alignment -> kernel variant, grid, block. Torch-free, and tested without a GPU.
//
// Two variants cover every dense layout, both in packs of 8 elements of the flat storage:
//
//   planar    a channel is a run of at least 8 elements (NCHW), so a pack spans at most two. A
//             block takes one tile, and looks its channels' coefficients up in shared memory.
//   periodic  channels change faster (channels_last, small maps), but repeat with period
//             C * inner. Packs that are a multiple of the period apart have the same channels: a
//             thread walks down such a column, and keeps its 8 lanes' coefficients in registers.
//             A block takes some neighbouring columns, whose coefficients it works out together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "layout.h"

namespace frozen_bn {

constexpr int kPackSize = 8;
constexpr int kThreads = 256;
constexpr int kPacksPerThread = 2;  // planar
constexpr int kTilePacks = kThreads * kPacksPerThread;
constexpr int kTileSize = kTilePacks * kPackSize;
constexpr int kMaxBlockColumns = 64;
constexpr int kMaxTileRuns = kTilePacks + 2;  // runs that a tile can touch, planar

enum class Variant { kPlanar, kPeriodic };

struct LaunchPlan {
  Variant variant;
  bool wide;  // 64-bit index arithmetic
  uint32_t grid_x, grid_y;
  uint32_t block_x, block_y;
  int64_t columns;  // periodic: packs after which the channels repeat
  // Sums for the affine gradients come as [partial_rows, 2, partial_width] partial sums.
  int64_t segments;  // planar: the most tiles that one run can touch
  int64_t partial_rows;
  int64_t partial_width;
};

inline LaunchPlan plan_planar(const Layout& layout) {
  LaunchPlan plan{};
  plan.variant = Variant::kPlanar;
  plan.grid_x = static_cast<uint32_t>(ceil_div(layout.numel, kTileSize));
  plan.grid_y = 1;
  plan.block_x = kThreads;
  plan.block_y = 1;
  plan.segments = ceil_div(layout.inner - 1, kTileSize) + 1;
  plan.partial_rows = ceil_div(layout.numel / layout.inner, layout.channels) * plan.segments;
  plan.partial_width = layout.channels;
  return plan;
}

// Neighbouring columns of one block: few, so that many packs share the work for their coefficients,
// but where there are more, even parts that are a multiple of 4, so that a row of the block's packs
// starts and ends with a sector of memory. Rows of an odd number start anywhere: keep those whole.
inline int64_t block_columns(int64_t columns) {
  constexpr int64_t kPreferred = 32;
  const bool odd = columns % 2 != 0;
  if (columns <= (odd ? kMaxBlockColumns : kPreferred)) return columns;
  return ceil_div(ceil_div(columns, ceil_div(columns, kPreferred)), 4) * 4;
}

// Rows of one block: an even number of packs, so that the next block starts with a sector.
inline int64_t block_rows(int64_t columns, int64_t rows) {
  const int64_t most = kThreads / columns;
  return std::min(rows, columns % 2 == 0 ? most : most / 2 * 2);
}

// Many blocks of a few rows each share the memory best: on an H100 at 0.98 of a copy's bandwidth,
// where as many as are resident twice over reach 0.92. With sums, of which each block leaves a row,
// it is these.
inline LaunchPlan plan_periodic(const Layout& layout, int summing) {
  constexpr int64_t kMostBlocks = 65535, kBlocksPerMultiprocessor = 8, kLeastPacksPerThread = 4;
  LaunchPlan plan{};
  plan.variant = Variant::kPeriodic;
  plan.columns = std::lcm(layout.channels * layout.inner, int64_t{kPackSize}) / kPackSize;
  const int64_t rows = ceil_div(ceil_div(layout.numel, kPackSize), plan.columns);
  plan.block_x = static_cast<uint32_t>(block_columns(plan.columns));
  plan.block_y = static_cast<uint32_t>(block_rows(plan.block_x, rows));
  const int64_t parts = ceil_div(plan.columns, plan.block_x);
  const int64_t most =
      summing > 0 ? ceil_div(kBlocksPerMultiprocessor * summing, parts) : kMostBlocks;
  const int64_t blocks =
      std::min(most, ceil_div(rows, int64_t{plan.block_y} * kLeastPacksPerThread));
  plan.grid_x = static_cast<uint32_t>(parts);
  plan.grid_y = static_cast<uint32_t>(blocks);
  plan.partial_rows = blocks;
  plan.partial_width = plan.columns * kPackSize;
  return plan;
}

// `layout.numel` must not be 0. `summing`: multiprocessors that leave partial sums, or 0 if none
// are wanted. `force_wide` is for tests.
inline LaunchPlan plan_launch(const Layout& layout, int summing, bool force_wide = false) {
  LaunchPlan plan =
      layout.inner >= kPackSize ? plan_planar(layout) : plan_periodic(layout, summing);
  plan.wide = force_wide || layout.numel > INT32_MAX - kTileSize;
  return plan;
}

}  // namespace frozen_bn
