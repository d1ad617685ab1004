// The kernels of a pair: the residual is normalized as well. Torch-free.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace frozen_bn::cuda {
namespace {

struct PlanarPairTable {
  float4 four[kMaxTileRuns];
  float residual_scale[kMaxTileRuns];

  __device__ PairChannel operator[](uint32_t run) const {
    const float4 found = four[run];
    return {{found.x, found.y, found.z}, found.w, residual_scale[run]};
  }
  __device__ void put(uint32_t run, const PairChannel& found) {
    four[run] = {found.mean, found.scale, found.bias, found.residual_mean};
    residual_scale[run] = found.residual_scale;
  }
};

// By lane, then column: that neighbours in a warp read neighbours. A column more than there can be,
// that those who fill a column write to different banks.
struct PeriodicPairTable {
  using Row = float[kPackSize][kMaxBlockColumns + 1];
  Row mean, scale, bias, residual_mean, residual_scale;

  __device__ void put(uint32_t i, const PairChannel& found) {
    const uint32_t lane = i % kPackSize, column = i / kPackSize;
    mean[lane][column] = found.mean;
    scale[lane][column] = found.scale;
    bias[lane][column] = found.bias;
    residual_mean[lane][column] = found.residual_mean;
    residual_scale[lane][column] = found.residual_scale;
  }
};

// The channels of a thread's 8 lanes: those of the input in registers, unless kInShared; those of
// the residual would not fit there too.
template <bool kInShared>
struct PairLaneChannels {
  const PeriodicPairTable& table;
  Channel own[kInShared ? 1 : kPackSize];

  __device__ explicit PairLaneChannels(const PeriodicPairTable& table) : table(table) {
    if constexpr (!kInShared) {
#pragma unroll
      for (int k = 0; k < kPackSize; ++k) own[k] = read(k);
    }
  }

  __device__ PairChannel operator()(int lane) const {
    Channel channel;
    if constexpr (kInShared) {
      channel = read(lane);
    } else {
      channel = own[lane];
    }
    return {channel, read(table.residual_mean, lane), read(table.residual_scale, lane)};
  }

  template <class Body>
  __device__ void with_channels(uint32_t, Body body) const {
    body(*this);
  }

 private:
  __device__ Channel read(int lane) const {
    return {read(table.mean, lane), read(table.scale, lane), read(table.bias, lane)};
  }
  // Whenever it is needed: volatile, or the compiler would keep it after all.
  static __device__ float read(const volatile PeriodicPairTable::Row& row, int lane) {
    return row[lane][threadIdx.x];
  }
};

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_forward_pair_planar_kernel(const __grid_constant__ ForwardPairParams p) {
  __shared__ PlanarPairTable table;
  using Inputs = ForwardInputs<T, true>;
  traverse_planar<Inputs, kForwardInFlight<T>>(
      p, table, [&](auto at, const Inputs& inputs, const auto& channels) {
        forward_pack<T, kAct, true>(p, at, inputs, channels);
      });
}

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_forward_pair_periodic_kernel(const __grid_constant__ ForwardPairParams p) {
  __shared__ PeriodicPairTable table;
  using Inputs = ForwardInputs<T, true>;
  traverse_periodic<Inputs, 1, PairLaneChannels<needs_input(kAct)>>(
      p, table, Column(p.index), [&](auto at, const Inputs& inputs, const auto& channels) {
        forward_pack<T, kAct, true>(p, at, inputs, channels);
      });
}

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_backward_pair_planar_kernel(const __grid_constant__ BackwardPairParams p) {
  __shared__ PlanarPairTable table;
  traverse_planar<BackwardInputs<T>, kBackwardInFlight<T, kAct, false>>(
      p, table, [&](auto at, const BackwardInputs<T>& inputs, const auto& channels) {
        channels.with_channels(at.count, [&](const auto& channel_of) {
          backward_pack<T, kAct, true>(p, at, inputs, channel_of, [](int, float, float) {});
        });
      });
}

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_backward_pair_periodic_kernel(const __grid_constant__ BackwardPairParams p) {
  __shared__ PeriodicPairTable table;
  using Channels = PairLaneChannels<needs_input(kAct)>;
  traverse_periodic<BackwardInputs<T>, kBackwardInFlight<T, kAct, false>, Channels>(
      p, table, Column(p.index),
      [&](auto at, const BackwardInputs<T>& inputs, const auto& channels) {
        backward_pack<T, kAct, true>(p, at, inputs, channels, [](int, float, float) {});
      });
}

}  // namespace
}  // namespace frozen_bn::cuda
