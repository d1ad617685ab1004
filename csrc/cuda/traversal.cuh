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
#pragma unroll
  for (int first = 0; first < kPacksPerThread; first += kInFlight) {
    Inputs inputs[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) inputs[k] = Inputs(p, at(first + k));
    if (first == 0) table.fill(p, tile);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const uint32_t offset = Tile::pack_offset(first + k);
      if (offset >= tile.size) continue;
      const uint32_t run = tile.run_of(p.index, offset);
      const uint32_t left = tile.left_in_run(p.index, offset, run);
      const Channel& channel = table.channels[run];
      if (left >= kPackSize) {
        body(at(first + k), inputs[k], OneChannel{channel});
      } else {
        const Channel& next = table.channels[run + 1 < tile.runs ? run + 1 : run];
        body(at(first + k), inputs[k], TwoChannels{channel, next, left});
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

// The thread's channels stay in registers, or where the body needs those itself (`kReload`), come
// from shared memory for every pack.
template <class Inputs, int kInFlight, bool kReload, class Params, class Body>
__device__ void traverse_periodic(
    const Params& p, PeriodicTable& table, const Column& column, Body body) {
  table.fill(p);
  if (!column.exists) return;
  EightChannels channels = table.of_thread();
  const auto one = [&](auto at, const Inputs& inputs) {
    if constexpr (kReload) {
      asm volatile("" ::: "memory");  // else the compiler would keep them after all
      channels = table.of_thread();
    }
    body(at, inputs, channels);
  };
  int64_t i = column.first;
  if (p.vector_access) {
    const int64_t reach = (kInFlight - 1) * column.step + kPackSize;
    for (; i + reach <= p.index.numel; i += kInFlight * column.step) {
      Inputs inputs[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) inputs[k] = Inputs(p, WholePack{i + k * column.step});
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) one(WholePack{i + k * column.step}, inputs[k]);
    }
  }
  for (; i < p.index.numel; i += column.step) {
    const AnyPack at(i, p.index.numel - i, p.vector_access);
    one(at, Inputs(p, at));
  }
}

}  // namespace
}  // namespace frozen_bn::cuda
