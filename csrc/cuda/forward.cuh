// The forward kernels. Torch-free.
#pragma once

#include "channels.cuh"

namespace frozen_bn::cuda {
namespace {

// For the backward: every channel once, spread over the grid.
__device__ inline void save_coefficients(const ForwardParams& p) {
  if (!p.coefficients) return;
  const int64_t threads = int64_t{blockDim.x} * blockDim.y;
  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const int64_t thread = block * threads + threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t channels = p.index.channels;
  for (int64_t c = thread; c < channels; c += threads * gridDim.x * gridDim.y) {
    float inv_std;
    const Channel channel = compute_channel(p, c, inv_std);
    p.coefficients[c] = channel.mean;
    p.coefficients[c + channels] = channel.scale;
    p.coefficients[c + 2 * channels] = channel.bias;
    p.coefficients[c + 3 * channels] = inv_std;
  }
}

// channel_of(lane) -> Channel
template <class T, Activation kAct, class ChannelOf>
__device__ void forward_pack(
    const ForwardParams& p, Position at, const RawPack<T>& input, const RawPack<T>& residual,
    ChannelOf channel_of) {
  if (at.count == 0) return;
  const Floats x = unpack<T>(input), r = unpack<T>(residual);
  Floats y;
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    const Channel c = channel_of(k);
    float z = normalize(x.lane[k], c.mean, c.scale, c.bias);
    if (p.residual) z += r.lane[k];
    y.lane[k] = activate<kAct>(z, p.negative_slope);
    if constexpr (needs_mask(kAct)) bits |= static_cast<uint32_t>(blocked<kAct>(z)) << k;
  }
  store<T>(p.output, at, p.vector_access, y);
  if constexpr (needs_mask(kAct)) {
    if (p.mask) p.mask[at.element / kPackSize] = static_cast<uint8_t>(bits);
  }
}

template <class T>
struct ForwardInputs {
  RawPack<T> input{}, residual{};

  ForwardInputs() = default;
  __device__ ForwardInputs(const ForwardParams& p, Position at)
      : input(load<T>(p.input, at, p.vector_access)) {
    if (p.residual) residual = load<T>(p.residual, at, p.vector_access);
  }
};

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads)
    frozen_bn_forward_planar_kernel(const __grid_constant__ ForwardParams p) {
  __shared__ Channel table[kMaxTileRuns];
  const Tile tile(p.index, blockIdx.x);
  Position at[kPacksPerThread];
  ForwardInputs<T> inputs[kPacksPerThread];
#pragma unroll
  for (int k = 0; k < kPacksPerThread; ++k) {
    at[k] = position_at(tile.start + Tile::pack_offset(k), p.index.numel);
    inputs[k] = ForwardInputs<T>(p, at[k]);
  }
  fill_table(table, p, tile);
#pragma unroll
  for (int k = 0; k < kPacksPerThread; ++k) {
    if (at[k].count == 0) break;
    const uint32_t offset = Tile::pack_offset(k);
    const uint32_t run = tile.run_of(p.index, offset);
    const PlanarChannels channels(table, p.index, tile, offset, run);
    forward_pack<T, kAct>(p, at[k], inputs[k].input, inputs[k].residual, channels);
  }
  save_coefficients(p);
}

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads)
    frozen_bn_forward_periodic_kernel(const __grid_constant__ ForwardParams p) {
  Column column;
  Channel channels[kPackSize];
  if (column.number < p.index.columns) {
#pragma unroll
    for (int k = 0; k < kPackSize; ++k) {
      channels[k] = find_channel(p, column.channel_of(p.index, k));
    }
  }
  const auto channel_of = [&](int lane) { return channels[lane]; };
  while (column.position(p.index, 0).count > 0) {
    ForwardInputs<T> inputs[kPacksPerThread];
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      inputs[k] = ForwardInputs<T>(p, column.position(p.index, k));
    }
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      forward_pack<T, kAct>(
          p, column.position(p.index, k), inputs[k].input, inputs[k].residual, channel_of);
    }
    column.row += kPacksPerThread * column.row_step;
  }
  save_coefficients(p);
}

}  // namespace
}  // namespace frozen_bn::cuda
