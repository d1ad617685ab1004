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

struct PeriodicPairTable : PeriodicTable {
  Row residual_mean, residual_scale;

  __device__ void put(uint32_t i, const PairChannel& found) {
    PeriodicTable::put(i, found);
    PeriodicTable::put(residual_mean, i, found.residual_mean);
    PeriodicTable::put(residual_scale, i, found.residual_scale);
  }
};

// The channels of a thread's 8 lanes. Those of the residual would not fit into registers too.
template <bool kInShared>
struct PairLaneChannels {
  const PeriodicPairTable& table;
  LaneChannels<kInShared> own;

  __device__ explicit PairLaneChannels(const PeriodicPairTable& table) : table(table), own(table) {}

  __device__ PairChannel operator()(int lane) const {
    return {
        own(lane), table.read(table.residual_mean, lane), table.read(table.residual_scale, lane)};
  }

  template <bool kTogether = false, class Body>
  __device__ void with_channels(Body body) const {
    body(*this);
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
  traverse_periodic<Inputs, 1, PairLaneChannels<may_need_input(kAct)>>(
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
        channels.template with_channels<true>([&](const auto& channel_of) {
          backward_pack<T, kAct, true>(p, at, inputs, channel_of, [](int, float, float) {});
        });
      });
}

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_backward_pair_periodic_kernel(const __grid_constant__ BackwardPairParams p) {
  __shared__ PeriodicPairTable table;
  using Channels = PairLaneChannels<may_need_input(kAct)>;
  traverse_periodic<BackwardInputs<T>, kBackwardInFlight<T, kAct, false>, Channels>(
      p, table, Column(p.index),
      [&](auto at, const BackwardInputs<T>& inputs, const auto& channels) {
        backward_pack<T, kAct, true>(p, at, inputs, channels, [](int, float, float) {});
      });
}

}  // namespace
}  // namespace frozen_bn::cuda
