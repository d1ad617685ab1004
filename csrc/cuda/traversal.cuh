// The two ways of a thread through its packs. Both load the Inputs of kInFlight packs at a time,
// then call body(at, inputs, channels) for each. Torch-free.
#pragma once

#include "channels.cuh"

namespace frozen_bn::cuda {
namespace {

// What the pack at `here`, the thread's k-th, needs of its channels.
template <class Index, class Table, class At>
__device__ PlanarChannels<Table, At> channels_of(
    const Index& index, const Table& table, const Tile& tile, int k, At here) {
  const uint32_t place = Tile::pack(k) * kPackSize + tile.skipped;
  const uint32_t run = divide(place, index.by_tile_inner);
  const uint32_t passed = place - run * index.tile_inner;
  return {table, here, run, passed, index.tile_inner};
}

// `at(k)`: where the thread's k-th pack is.
template <class Inputs, int kInFlight, class Params, class Table, class At, class Body>
__device__ void traverse_whole_tile(
    const Params& p, Table& table, const Tile& tile, At at, Body body) {
#pragma unroll
  for (int first = 0; first < kPacksPerThread; first += kInFlight) {
    Inputs inputs[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) inputs[k] = Inputs(p, at(first + k));
    if (first == 0) fill(p, tile, table);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const auto here = at(first + k);
      body(here, inputs[k], channels_of(p.index, table, tile, first + k, here));
    }
  }
}

// Likewise, but compiled for one pack: unrolled, it would be twice as much.
template <class Inputs, class Params, class Table, class At, class Body>
__device__ void traverse_any_tile(
    const Params& p, Table& table, const Tile& tile, At at, Body body) {
  fill(p, tile, table);
#pragma unroll 1
  for (int k = 0; k < kPacksPerThread; ++k) {
    const AnyPack here = at(k);
    if (here.count == 0) return;
    body(here, Inputs(p, here), channels_of(p.index, table, tile, k, here));
  }
}

// Returns the block's tile.
template <class Inputs, int kInFlight, class Params, class Table, class Body>
__device__ Tile traverse_planar(const Params& p, Table& table, Body body) {
  if (blockIdx.x < p.index.whole_tiles) [[likely]] {
    const Tile tile(p.index, blockIdx.x, kTileSize);
    const int64_t first = int64_t{blockIdx.x} * kTilePacks + Tile::pack(0);
    const auto at = [&](int k) { return WholePack{{first + k * kThreads}}; };
    traverse_whole_tile<Inputs, kInFlight>(p, table, tile, at, body);
    return tile;
  }
  const int64_t rest = p.index.numel - int64_t{blockIdx.x} * kTileSize;
  const Tile tile(p.index, blockIdx.x, static_cast<uint32_t>(min(rest, int64_t{kTileSize})));
  const auto at = [&](int k) {
    const auto left = static_cast<int32_t>(tile.size - Tile::pack(k) * kPackSize);
    return AnyPack(int64_t{blockIdx.x} * kTilePacks + Tile::pack(k), left, p.index.vector_access);
  };
  traverse_any_tile<Inputs>(p, table, tile, at, body);
  return tile;
}

// Channels: what gives the thread's lanes theirs, from the table.
template <class Inputs, int kInFlight, class Channels, class Params, class Table, class Body>
__device__ void traverse_periodic(const Params& p, Table& table, const Column& column, Body body) {
  fill(p, table);
  if (!column.exists) return;
  const Channels channels(table);
  int64_t i = column.first;
  const int64_t ahead = (kInFlight - 1) * column.step;
#pragma unroll 1
  for (; i + ahead < p.index.whole_packs; i += kInFlight * column.step) {
    Inputs inputs[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) inputs[k] = Inputs(p, WholePack{{i + k * column.step}});
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) body(WholePack{{i + k * column.step}}, inputs[k], channels);
  }
  if constexpr (kInFlight > 1) {
    for (; i < p.index.whole_packs; i += column.step) {
      const WholePack at{{i}};
      body(at, Inputs(p, at), channels);
    }
  }
#pragma unroll 1
  for (int64_t left; (left = p.index.numel - i * kPackSize) > 0; i += column.step) {
    const AnyPack at(i, left, p.index.vector_access);
    body(at, Inputs(p, at), channels);
  }
}

}  // namespace
}  // namespace frozen_bn::cuda
