// The two ways of a thread through its packs. Both load the Inputs of kInFlight packs at a time,
// then call body(at, inputs, channels) for each. Torch-free.
#pragma once

#include "channels.cuh"

namespace frozen_bn::cuda {
namespace {

// `at(k)`: where the thread's k-th pack is.
template <class Inputs, int kInFlight, class Params, class At, class Body>
__device__ void traverse_tile(
    const Params& p, PlanarTable& table, const Tile& tile, At at, Body body) {
#pragma unroll 1
  for (int first = 0; first < kPacksPerThread; first += kInFlight) {
    Inputs inputs[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) inputs[k] = Inputs(p, at(first + k));
    if (first == 0) table.fill(p, tile);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const auto here = at(first + k);
      if (here.count == 0) continue;
      const uint32_t place = Tile::pack_offset(first + k) + tile.skipped;
      const uint32_t run = divide(place, p.index.by_tile_inner);
      const uint32_t left = (run + 1) * p.index.tile_inner - place;  // elements of the run
      const Channel* channel = table.channels + run;
      if (left >= here.count) {
        body(here, inputs[k], OneChannel{channel[0]});
      } else {
        body(here, inputs[k], TwoChannels{channel[0], channel[1], left});
      }
    }
  }
}

template <class Inputs, int kInFlight, class Params, class Body>
__device__ void traverse_planar(const Params& p, PlanarTable& table, const Tile& tile, Body body) {
  if (p.vector_access && tile.size == kTileSize) {
    const auto at = [&](int k) { return WholePack{tile.start + Tile::pack_offset(k)}; };
    traverse_tile<Inputs, kInFlight>(p, table, tile, at, body);
  } else {
    const auto at = [&](int k) {
      const uint32_t offset = Tile::pack_offset(k);
      return AnyPack(tile.start + offset, int64_t{tile.size} - offset, p.vector_access);
    };
    traverse_tile<Inputs, 1>(p, table, tile, at, body);
  }
}

// The thread's channels stay in registers, or in shared memory where the body needs those itself.
template <class Inputs, int kInFlight, bool kInShared, class Params, class Body>
__device__ void traverse_periodic(
    const Params& p, PeriodicTable& table, const Column& column, Body body) {
  table.fill(p);
  if (!column.exists) return;
  const std::conditional_t<kInShared, SharedChannels, EightChannels> channels(table);
  int64_t i = column.first;
  if (p.vector_access) {
    const int64_t reach = (kInFlight - 1) * column.step + kPackSize;
    for (; i + reach <= p.index.numel; i += kInFlight * column.step) {
      Inputs inputs[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) inputs[k] = Inputs(p, WholePack{i + k * column.step});
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) body(WholePack{i + k * column.step}, inputs[k], channels);
    }
    if constexpr (kInFlight > 1) {
      for (; i + kPackSize <= p.index.numel; i += column.step) {
        const WholePack at{i};
        body(at, Inputs(p, at), channels);
      }
    }
  }
  for (; i < p.index.numel; i += column.step) {
    const AnyPack at(i, p.index.numel - i, p.vector_access);
    body(at, Inputs(p, at), channels);
  }
}

}  // namespace
}  // namespace frozen_bn::cuda
