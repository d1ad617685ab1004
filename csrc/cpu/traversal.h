// The two ways through a range of flat elements, pack by pack. Both call
//
//   body(i, slot, k)               a whole pack, from element i
//   body.two(i, slot, k, slot, k)  that pack and the next, where Body::kTwo
//   body.partial(i, n, slot, k)    its first n lanes: the end of the tensor
//   body.flush(channel)            puts away what was summed; a pack that crosses into the next
//                                  channel does so itself
//
// with `k` the channel coefficients of each lane, and `slot` saying which those are.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace frozen_bn::cpu {
namespace {

template <class T>
struct LaneCoefficients {
  Vec<T> mean, scale, bias;
};

// As many packs (planar) or periods (spread) are summed in single precision: more would cost digits
// that F.batch_norm keeps.
constexpr int64_t kPacksPerSum = 64;
constexpr int64_t kPeriodsPerSum = 2;

// Lanes below `split` are of `channel`, the others of the `next`.
struct PlanarSlot {
  int64_t channel;
  int64_t next;
  int64_t split;
};

template <class T>
FROZEN_BN_INLINE auto lanes_below(int64_t split) {
  const auto lanes = lane_numbers<T>();
  return lanes < (lanes - lanes + static_cast<int32_t>(split));
}

template <class T>
FROZEN_BN_INLINE LaneCoefficients<T> blend(
    int64_t split, const LaneCoefficients<T>& below, const LaneCoefficients<T>& above) {
  const auto here = lanes_below<T>(split);
  return {
      here ? below.mean : above.mean, here ? below.scale : above.scale,
      here ? below.bias : above.bias};
}

// Channels are runs of at least kMinInner elements (NCHW): their coefficients stay in registers,
// and a pack that crosses into the next run takes each lane's from one of the two.
template <class T, class Body>
FROZEN_BN_INLINE void traverse_planar(
    const Layout& layout, const Coefficients& rows, int64_t begin, int64_t end, Body body) {
  const auto* const mean = static_cast<const T*>(rows.mean);
  const auto* const scale = static_cast<const T*>(rows.scale);
  const auto* const bias = static_cast<const T*>(rows.bias);
  const auto coefficients = [&](int64_t channel) {
    return LaneCoefficients<T>{
        splat<T>(mean[channel]), splat<T>(scale[channel]), splat<T>(bias[channel])};
  };
  const int64_t last = end - kLanes;  // where a whole pack can start
  const int64_t channels = layout.channels, inner = layout.inner;
  int64_t channel = begin / inner % channels;
  int64_t boundary = (begin / inner + 1) * inner;
  auto k = coefficients(channel);
  int64_t i = begin;
  const auto next_of = [&](int64_t c) { return c + 1 == channels ? 0 : c + 1; };
  while (true) {
    const int64_t next = next_of(channel);
    const int64_t stop = std::min(boundary - kLanes, last);
    while (i <= stop) {
      const int64_t block = std::min(stop, i + (kPacksPerSum - 1) * kLanes);
      const PlanarSlot slot{channel, next, kLanes};
      if constexpr (Body::kTwo) {
        for (; i + kLanes <= block; i += 2 * kLanes) body.two(i, slot, k, slot, k);
      }
      for (; i <= block; i += kLanes) body(i, slot, k);
      if (i <= stop) body.flush(channel);
    }
    if (i > last) break;
    const auto k_next = coefficients(next);
    if (i < boundary) {
      body(i, PlanarSlot{channel, next, boundary - i}, blend<T>(boundary - i, k, k_next));
      i += kLanes;
    } else {
      body.flush(channel);
    }
    channel = next;
    k = k_next;
    boundary += inner;
  }
  if (i < end) {
    const int64_t next = next_of(channel), split = std::min<int64_t>(boundary - i, kLanes);
    const PlanarSlot slot{channel, next, split};
    body.partial(i, end - i, slot, blend<T>(split, k, coefficients(next)));
    channel = split < kLanes ? next : channel;
  }
  body.flush(channel);
}

// Channels change with every element or every few (channels_last, small maps): the coefficients
// have been spread, and each pack loads its own. (One load for the same columns of several rows was
// tried: a quarter faster in the L2 cache, but half as fast from memory, which sees several
// streams.)
template <class T, class Body>
FROZEN_BN_INLINE void traverse_spread(
    const Coefficients& rows, int64_t begin, int64_t end, Body body) {
  const auto* const mean = static_cast<const T*>(rows.mean);
  const auto* const scale = static_cast<const T*>(rows.scale);
  const auto* const bias = static_cast<const T*>(rows.bias);
  const auto coefficients = [&](int64_t slot) {
    return LaneCoefficients<T>{load(mean + slot), load(scale + slot), load(bias + slot)};
  };
  const int64_t period = rows.period;
  const int64_t last = end - kLanes;  // where a whole pack can start
  int64_t i = begin, slot = begin % period;
  for (int64_t periods = 1; i <= last; ++periods) {
    const int64_t ahead = slot - i;
    const int64_t stop = std::min(last, i + period - slot - 1);
    if constexpr (Body::kTwo) {
      for (; i + kLanes <= stop; i += 2 * kLanes) {
        const int64_t first = i + ahead, second = first + kLanes;
        body.two(i, first, coefficients(first), second, coefficients(second));
      }
    }
    for (; i <= stop; i += kLanes) body(i, i + ahead, coefficients(i + ahead));
    slot = (i + ahead) % period;
    if (periods % kPeriodsPerSum == 0) body.flush(0);
  }
  if (i < end) body.partial(i, end - i, slot, coefficients(slot));
  body.flush(0);
}

}  // namespace
}  // namespace frozen_bn::cpu
