// The forward kernels. Torch-free.
#pragma once

#include "traversal.cuh"

namespace frozen_bn::cuda {
namespace {

template <class T>
struct ForwardInputs {
  RawPack<T> input{}, residual{};  // zeros where there is no residual

  ForwardInputs() = default;
  template <class At>
  __device__ ForwardInputs(const ForwardParams& p, At at) : input(load<T>(p.input, at)) {
    if (p.residual) residual = load<T>(p.residual, at);
  }
};

// channels(lane) -> Channel
template <class T, Activation kAct, class At, class Channels>
__device__ void forward_pack(
    const ForwardParams& p, At at, const ForwardInputs<T>& inputs, const Channels& channels) {
  const Floats x = unpack<T>(inputs.input), residual = unpack<T>(inputs.residual);
  Floats y;
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    const Channel c = channels(k);
    const float z = normalize(x.lane[k], c.mean, c.scale, c.bias) + residual.lane[k];
    y.lane[k] = activate<kAct>(z, p.negative_slope);
    // Written so that the compiler keeps to one comparison for activation and mask.
    if constexpr (needs_mask(kAct)) bits |= (0u - uint32_t{blocked<kAct>(z)}) & 1u << k;
  }
  store<T>(p.output, at, y);
  if constexpr (needs_mask(kAct)) {
    if (p.mask) p.mask[at.element / kPackSize] = static_cast<uint8_t>(bits);
  }
}

// Two packs of halves in flight, or one of floats: two 16-byte loads each, four with a residual.
template <class T>
constexpr int kForwardInFlight = sizeof(T) == 2 ? 2 : 1;

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_forward_planar_kernel(const __grid_constant__ ForwardParams p) {
  __shared__ PlanarTable table;
  traverse_planar<ForwardInputs<T>, kForwardInFlight<T>>(
      p, table, Tile(p.index, blockIdx.x),
      [&](auto at, const ForwardInputs<T>& inputs, const auto& channels) {
        forward_pack<T, kAct>(p, at, inputs, channels);
      });
}

template <class T, Activation kAct>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_forward_periodic_kernel(const __grid_constant__ ForwardParams p) {
  __shared__ PeriodicTable table;
  constexpr bool kInShared = needs_input(kAct);  // smooth: registers are scarce
  traverse_periodic<ForwardInputs<T>, kInShared ? 1 : kForwardInFlight<T>, kInShared>(
      p, table, Column(p.index),
      [&](auto at, const ForwardInputs<T>& inputs, const auto& channels) {
        forward_pack<T, kAct>(p, at, inputs, channels);
      });
}

}  // namespace
}  // namespace frozen_bn::cuda
