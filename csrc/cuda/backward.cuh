// The backward kernels, and the second stage of the affine gradients. Torch-free.
#pragma once

#include "traversal.cuh"

namespace frozen_bn::cuda {
namespace {

template <class T>
struct BackwardInputs {
  RawPack<T> grad_output{}, input{}, residual{};  // zeros where there is none
  uint32_t mask = 0;

  BackwardInputs() = default;
  template <class At>
  __device__ BackwardInputs(const BackwardParams& p, At at)
      : grad_output(load<T>(p.grad_output, at)) {
    if (p.input) input = load<T>(p.input, at);
    if (p.residual) residual = load<T>(p.residual, at);
    if (p.mask && at.count > 0) mask = p.mask[at.number];
  }
};

// Takes a gradient g through the activation; x and residual are its inputs.
template <Activation kAct, bool kPair, class Channels>
__device__ void behind_activation(
    Floats& g, const Floats& x, const Floats& residual, uint32_t mask, float negative_slope,
    const Channels& channels) {
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if constexpr (needs_input(kAct)) {
      const auto c = channels(k);
      g.lane[k] *= derivative<kAct>(preactivation<kPair>(x.lane[k], residual.lane[k], c));
    } else if constexpr (needs_mask(kAct)) {
      const float attenuated = kAct == Activation::kLeakyRelu ? g.lane[k] * negative_slope : 0.0f;
      g.lane[k] = mask >> k & 1 ? attenuated : g.lane[k];
    }
  }
}

// add(lane, g, g * (input - mean)) collects the sums. Lanes beyond the count have g = 0.
template <class T, Activation kAct, bool kPair = false, class At, class Channels, class Add>
__device__ void backward_pack(
    const BackwardParams& p, At at, const BackwardInputs<T>& inputs, const Channels& channels,
    Add add) {
  const Floats x = unpack<T>(inputs.input);
  Floats gradient = unpack<T>(inputs.grad_output);
  with_activation<kAct>(p.activation, [&](auto found) {
    behind_activation<decltype(found)::value, kPair>(
        gradient, x, unpack<T>(inputs.residual), inputs.mask, p.negative_slope, channels);
  });
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    add(k, gradient.lane[k], gradient.lane[k] * (x.lane[k] - channels(k).mean));
  }
  if constexpr (kPair) {
    if (p.grad_residual) {
      Floats scaled;
#pragma unroll
      for (int k = 0; k < kPackSize; ++k) {
        scaled.lane[k] = gradient.lane[k] * channels(k).residual_scale;
      }
      store<T>(p.grad_residual, at, scaled);
    }
  } else if (p.grad_residual) {
    store<T>(p.grad_residual, at, gradient);
  }
  if (!p.grad_input) return;
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) gradient.lane[k] *= channels(k).scale;
  store<T>(p.grad_input, at, gradient);
}

struct Sums {
  float g = 0, centered = 0;

  __device__ void add(float more_g, float more_centered) {
    g += more_g;
    centered += more_centered;
  }
};

// One run's sums over one tile, into the partial row of that sample and segment.
__device__ inline void write_run_sums(
    const BackwardParams& p, const Tile& tile, uint32_t run, const Sums& sums) {
  const int64_t number = tile.first_run + run;
  const int64_t tile_number = blockIdx.x;
  const int64_t first_tile = number * p.index.inner / kTileSize;
  const int64_t last_tile = ((number + 1) * p.index.inner - 1) / kTileSize;
  const RunPlace place = tile.place_of(p.index, run);
  const int64_t first_row = place.sample * p.segments;
  float* column = p.partial_sums + place.channel;
  const auto write = [&](int64_t row, const Sums& s) {
    column[2 * row * p.partial_width] = s.g;
    column[(2 * row + 1) * p.partial_width] = s.centered;
  };
  int64_t row = first_row + tile_number - first_tile;
  write(row, sums);
  if (tile_number == last_tile) {
    while (++row < first_row + p.segments) write(row, Sums{});
  }
}

// Adds up each run's sums from those of its packs. As many lanes share a run as it has packs, at
// most a warp; the order of additions is fixed.
__device__ inline void reduce_runs(
    const BackwardParams& p, const Tile& tile, const Sums (*packs)[2]) {
  const uint32_t inner = p.index.tile_inner;
  uint32_t lanes = 1;
  while (lanes < 32 && lanes < inner / kPackSize + 1) lanes *= 2;
  const uint32_t lane = threadIdx.x % lanes;
  const uint32_t runs_at_once = kThreads / lanes;
  for (uint32_t first = 0; tile.has(p.index, first); first += runs_at_once) {
    const uint32_t run = first + threadIdx.x / lanes;
    Sums sums;
    const bool exists = tile.has(p.index, run);
    if (exists) {
      // The run's elements are [begin, end) of the tile.
      const uint32_t begin = run == 0 ? 0 : run * inner - tile.skipped;
      const uint32_t end = min((run + 1) * inner - tile.skipped, tile.size);
      for (uint32_t i = begin / kPackSize + lane; i * kPackSize < end; i += lanes) {
        const Sums& pack = packs[i][i * kPackSize < begin];  // it starts before: its second run
        sums.add(pack.g, pack.centered);
      }
    }
    for (uint32_t distance = lanes / 2; distance > 0; distance /= 2) {
      const float g = __shfl_down_sync(~0u, sums.g, distance, lanes);
      const float centered = __shfl_down_sync(~0u, sums.centered, distance, lanes);
      sums.add(g, centered);
    }
    if (lane == 0 && exists) write_run_sums(p, tile, run, sums);
  }
}

// At least two 16-byte loads in flight; more packs at once would cost registers.
template <class T, Activation kAct, bool kSums>
constexpr int kBackwardInFlight = sizeof(T) == 2 && !kSums && !may_need_input(kAct) ? 2 : 1;

template <class T, Activation kAct, bool kSums>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_backward_planar_kernel(const __grid_constant__ BackwardParams p) {
  __shared__ PlanarTable table;
  __shared__ Sums pack_sums[kSums ? kTilePacks : 1][2];
  const Tile tile = traverse_planar<BackwardInputs<T>, kBackwardInFlight<T, kAct, kSums>>(
      p, table, [&](auto at, const BackwardInputs<T>& inputs, const auto& channels) {
        [[maybe_unused]] Sums first, second;
        channels.template with_channels<true>([&](const auto& channel_of) {
          backward_pack<T, kAct>(p, at, inputs, channel_of, [&](int lane, float g, float centered) {
            if constexpr (kSums) {
              const bool is_first = channel_of.is_first(lane);
              first.add(is_first ? g : 0.0f, is_first ? centered : 0.0f);
              second.add(is_first ? 0.0f : g, is_first ? 0.0f : centered);
            }
          });
        });
        if constexpr (kSums) {
          const uint32_t pack = at.number % kTilePacks;
          pack_sums[pack][0] = first;
          pack_sums[pack][1] = second;
        }
      });
  if constexpr (kSums) {
    __syncthreads();
    reduce_runs(p, tile, pack_sums);
  }
}

// Sums of each thread's 8 lanes: of g, then of g * (input - mean).
using LaneSums = float[2 * kPackSize][kThreads];

// Adds up the rows of a block, and writes them to its partial row.
__device__ inline void reduce_rows(
    const BackwardParams& p, const Column& column, const LaneSums& sums) {
  __syncthreads();
  const uint32_t first_column = column.number - threadIdx.x;
  for (uint32_t i = thread_in_block(); i < 2 * kPackSize * blockDim.x;
       i += blockDim.x * blockDim.y) {
    const uint32_t value = i / blockDim.x, x = i % blockDim.x;
    if (first_column + x >= p.index.columns) continue;
    float sum = 0;
    for (uint32_t y = 0; y < blockDim.y; ++y) sum += sums[value][y * blockDim.x + x];
    const int64_t row = 2 * int64_t{blockIdx.y} + value / kPackSize;
    const int64_t lane = int64_t{first_column + x} * kPackSize + value % kPackSize;
    p.partial_sums[row * p.partial_width + lane] = sum;
  }
}

// A smooth activation needs the registers for its arithmetic: coefficients and sums stay in shared
// memory then.
template <class T, Activation kAct, bool kSums>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_backward_periodic_kernel(const __grid_constant__ BackwardParams p) {
  constexpr bool kInShared = may_need_input(kAct);
  __shared__ PeriodicTable table;
  __shared__ LaneSums shared_sums;
  const uint32_t thread = thread_in_block();
  const Column column(p.index);
  Sums sums[kPackSize];
  const auto put = [&] {
#pragma unroll
    for (int k = 0; k < kPackSize; ++k) {
      shared_sums[k][thread] = sums[k].g;
      shared_sums[kPackSize + k][thread] = sums[k].centered;
    }
  };
  if constexpr (kSums && kInShared) put();
  traverse_periodic<BackwardInputs<T>, kBackwardInFlight<T, kAct, kSums>, LaneChannels<kInShared>>(
      p, table, column, [&](auto at, const BackwardInputs<T>& inputs, const auto& channels) {
        backward_pack<T, kAct>(p, at, inputs, channels, [&](int lane, float g, float centered) {
          if constexpr (kSums && kInShared) {
            shared_sums[lane][thread] += g;
            shared_sums[kPackSize + lane][thread] += centered;
          } else if constexpr (kSums) {
            sums[lane].add(g, centered);
          }
        });
      });
  if constexpr (kSums && !kInShared) put();
  if constexpr (kSums) reduce_rows(p, column, shared_sums);
}

constexpr int kReduceChannels = 32, kMostReduceRows = 32;

// The second stage of the affine gradients: adds up the partial rows, in an order that is fixed.
// Rows of threads are a power of 2.
__global__ void __launch_bounds__(kReduceChannels* kMostReduceRows)
    frozen_bn_reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ double g[kMostReduceRows][kReduceChannels];
  __shared__ double centered[kMostReduceRows][kReduceChannels];
  const int64_t channel = int64_t{blockIdx.x} * kReduceChannels + threadIdx.x;
  double sum_g = 0, sum_centered = 0;
  for (int64_t i = channel * p.run; i < p.width; i += p.channels * p.run) {
    for (int64_t k = i; channel < p.channels && k < i + p.run; ++k) {
      // Several rows at a time: one after the other, the kernel would wait for each.
#pragma unroll 4
      for (int64_t row = threadIdx.y; row < p.rows; row += blockDim.y) {
        const float* partial = p.partial_sums + 2 * row * p.width + k;
        sum_g += partial[0];
        sum_centered += partial[p.width];
      }
    }
  }
  double& total_g = g[threadIdx.y][threadIdx.x] = sum_g;
  double& total_centered = centered[threadIdx.y][threadIdx.x] = sum_centered;
  for (uint32_t rows = blockDim.y / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (threadIdx.y >= rows) continue;
    total_g += g[threadIdx.y + rows][threadIdx.x];
    total_centered += centered[threadIdx.y + rows][threadIdx.x];
  }
  if (threadIdx.y > 0 || channel >= p.channels) return;
  const float grad_weight = static_cast<float>(total_centered * p.inv_std[channel]);
  if (p.grad_weight) store_channel(p.grad_weight, p.weight_dtype, channel, grad_weight);
  if (p.grad_bias) store_channel(p.grad_bias, p.bias_dtype, channel, static_cast<float>(total_g));
}

}  // namespace
}  // namespace frozen_bn::cuda
