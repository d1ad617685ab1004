// What packs need of their channels, and where they get it. Torch-free.
#pragma once

#include "../affine.h"
#include "index.cuh"

namespace frozen_bn::cuda {
namespace {

// What the arithmetic needs of a channel.
struct Channel {
  float mean, scale, bias;
};

// Read from the rows that the forward saved; their order is that of CoefficientRow in ../checks.h.
__device__ inline Channel find_channel(const BackwardParams& p, int64_t channel) {
  const float* row = p.coefficients + channel;
  return {row[0], row[p.index.channels], row[2 * p.index.channels]};
}

__device__ inline Channel compute_channel(const ForwardParams& p, int64_t channel, float& inv_std) {
  inv_std = inverse_std(load_channel(p.var, channel, 1.0f), p.eps);
  return {
      load_channel(p.mean, channel, 0.0f), load_channel(p.weight, channel, 1.0f) * inv_std,
      load_channel(p.bias, channel, 0.0f)};
}

__device__ inline Channel find_channel(const ForwardParams& p, int64_t channel) {
  float inv_std;
  return compute_channel(p, channel, inv_std);
}

// Fills the table with the channels of a tile's runs, and waits for it.
template <class Params>
__device__ void fill_table(Channel* table, const Params& p, const Tile& tile) {
  for (uint32_t run = threadIdx.x; run < tile.runs; run += kThreads) {
    table[run] = find_channel(p, tile.channel_of(p.index, run));
  }
  __syncthreads();
}

// The two channels that a pack can span.
struct PlanarChannels {
  Channel here, next;
  uint32_t left;

  __device__ PlanarChannels(
      const Channel* table, const Index& index, const Tile& tile, uint32_t offset, uint32_t run)
      : here(table[run]),
        next(table[run + 1 < tile.runs ? run + 1 : run]),
        left(tile.left_in_run(index, offset, run)) {}

  __device__ Channel operator()(int lane) const {
    return lane < left ? here : next;
  }
};

}  // namespace
}  // namespace frozen_bn::cuda
