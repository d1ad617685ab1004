// The forward kernels. Torch-free.
#pragma once

#include "traversal.cuh"

namespace frozen_bn::cuda {
namespace {

template <class T, bool kResidual>
struct ForwardInputs {
  RawPack<T> input, residual;

  ForwardInputs() = default;
  template <class At>
  __device__ ForwardInputs(const ForwardParams& p, At at) : input(load<T>(p.input, at)) {
    if constexpr (kResidual) residual = load<T>(p.residual, at);
  }
};

// Mask bits of a pack: the lanes whose gradient is blocked.
template <Activation kAct>
__device__ uint32_t mask_bits(const Floats& z) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) bits |= uint32_t{blocked<kAct>(z.lane[k])} << k;
  return bits;
}

// In assembly, because the compiler takes two instructions to set a bit under a predicate.
template <>
__device__ inline uint32_t mask_bits<Activation::kRelu>(const Floats& z) {
  uint32_t bits;
#define FROZEN_BN_LANE(k, bit) \
  "setp.le.f32 blocked, %" #k ", 0f00000000; @blocked or.b32 %0, %0, " #bit ";"
  asm("{.reg .pred blocked; mov.b32 %0, 0;"  //
      FROZEN_BN_LANE(1, 1) FROZEN_BN_LANE(2, 2) FROZEN_BN_LANE(3, 4) FROZEN_BN_LANE(4, 8)
          FROZEN_BN_LANE(5, 16) FROZEN_BN_LANE(6, 32) FROZEN_BN_LANE(7, 64)
              FROZEN_BN_LANE(8, 128) "}"
      : "=&r"(bits)
      : "f"(z.lane[0]), "f"(z.lane[1]), "f"(z.lane[2]), "f"(z.lane[3]), "f"(z.lane[4]),
        "f"(z.lane[5]), "f"(z.lane[6]), "f"(z.lane[7]));
#undef FROZEN_BN_LANE
  return bits;
}

template <class T, Activation kAct, bool kPair = false, bool kResidual, class At, class Channels>
__device__ void forward_pack(
    const ForwardParams& p, At at, const ForwardInputs<T, kResidual>& inputs,
    const Channels& channels) {
  Floats x = unpack<T>(inputs.input);
  channels.with_channels([&](const auto& channel_of) {
#pragma unroll
    for (int k = 0; k < kPackSize; ++k) {
      const auto c = channel_of(k);
      x.lane[k] = normalize(x.lane[k], c.mean, c.scale, c.bias);
    }
    if constexpr (kPair) {
      const Floats residual = unpack<T>(inputs.residual);
#pragma unroll
      for (int k = 0; k < kPackSize; ++k) {
        const auto c = channel_of(k);
        x.lane[k] = normalize(residual.lane[k], c.residual_mean, c.residual_scale, x.lane[k]);
      }
    }
  });
  if constexpr (kResidual && !kPair) {
    const Floats residual = unpack<T>(inputs.residual);
#pragma unroll
    for (int k = 0; k < kPackSize; ++k) x.lane[k] += residual.lane[k];
  }
  with_activation<kAct>(p.activation, [&](auto found) {
    constexpr Activation kThis = decltype(found)::value;
    if constexpr (needs_mask(kThis)) {
      if (p.mask) p.mask[at.number] = static_cast<uint8_t>(mask_bits<kThis>(x));
    }
    if constexpr (kThis != Activation::kRelu) {
#pragma unroll
      for (int k = 0; k < kPackSize; ++k) x.lane[k] = activate<kThis>(x.lane[k], p.negative_slope);
    }
  });
  store<T, kAct == Activation::kRelu>(p.output, at, x);
}

// Two packs of halves in flight, or one of floats: two 16-byte loads each, four with a residual.
template <class T>
constexpr int kForwardInFlight = sizeof(T) == 2 ? 2 : 1;

template <class T, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_forward_planar_kernel(const __grid_constant__ ForwardParams p) {
  __shared__ PlanarTable table;
  using Inputs = ForwardInputs<T, kResidual>;
  traverse_planar<Inputs, kForwardInFlight<T>>(
      p, table, [&](auto at, const Inputs& inputs, const auto& channels) {
        forward_pack<T, kAct>(p, at, inputs, channels);
      });
}

template <class T, Activation kAct, bool kResidual>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    frozen_bn_forward_periodic_kernel(const __grid_constant__ ForwardParams p) {
  __shared__ PeriodicTable table;
  constexpr bool kInShared = may_need_input(kAct);  // smooth: registers are scarce
  using Inputs = ForwardInputs<T, kResidual>;
  constexpr int kInFlight = kInShared && kResidual ? 1 : kForwardInFlight<T>;
  traverse_periodic<Inputs, kInFlight, LaneChannels<kInShared>>(
      p, table, Column(p.index), [&](auto at, const Inputs& inputs, const auto& channels) {
        forward_pack<T, kAct>(p, at, inputs, channels);
      });
}

}  // namespace
}  // namespace frozen_bn::cuda
