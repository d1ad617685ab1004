// The two ways through a range of flat elements, pack by pack. Both call
//
//   body(i, slot, k)             a whole pack, from element i
//   body.partial(i, n, slot, k)  its first n lanes: the end of the tensor
//
// with `k` the channel coefficients of each lane and `slot` where sums over this pack belong.
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

// Packs up to this many share an accumulator in single precision.
constexpr int64_t kPacksPerSum = 64;

// Lanes below `split` are of `channel`, the others of the one after it.
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

// Channels are runs of at least kMinInner elements (NCHW): their coefficients stay in registers,
// and a pack that crosses into the next run takes each lane's from one of the two.
template <class T, class Body>
void traverse_planar(
    const Layout& layout, const Coefficients& rows, int64_t begin, int64_t end, Body& body) {
  const auto coefficients = [&](int64_t channel) {
    const Vec<T> zero{};
    return LaneCoefficients<T>{
        zero + static_cast<const T*>(rows.mean)[channel],
        zero + static_cast<const T*>(rows.scale)[channel],
        zero + static_cast<const T*>(rows.bias)[channel]};
  };
  const int64_t plane = begin / layout.inner;
  int64_t channel = plane % layout.channels;
  int64_t boundary = (plane + 1) * layout.inner;
  auto k = coefficients(channel);
  for (int64_t i = begin; i < end; boundary += layout.inner) {
    const int64_t next = channel + 1 == layout.channels ? 0 : channel + 1;
    const int64_t stop = std::min(boundary, end);
    while (i + kLanes <= stop) {
      const int64_t packs = std::min((stop - i) / kLanes, kPacksPerSum);
      for (const int64_t last = i + packs * kLanes; i < last; i += kLanes) {
        body(i, PlanarSlot{channel, next, kLanes}, k);
      }
      body.flush(channel);
    }
    const auto k_next = coefficients(next);
    if (i < stop) {
      const PlanarSlot slot{channel, next, boundary - i};
      const auto here = lanes_below<T>(slot.split);
      const LaneCoefficients<T> mixed{
          here ? k.mean : k_next.mean,
          here ? k.scale : k_next.scale,
          here ? k.bias : k_next.bias};
      if (i + kLanes <= end) {
        body(i, slot, mixed);
      } else {
        body.partial(i, end - i, slot, mixed);
      }
      i += kLanes;
    }
    channel = next;
    k = k_next;
  }
  body.flush(channel);
}

// Channels change with every element or every few (channels_last, small maps): the coefficients
// have been spread, and each pack loads its own.
template <class T, class Body>
void traverse_spread(const Coefficients& rows, int64_t begin, int64_t end, Body& body) {
  const int64_t step = kLanes % rows.period;
  int64_t slot = begin % rows.period;
  int64_t packs = 0;
  for (int64_t i = begin; i < end; i += kLanes) {
    const LaneCoefficients<T> k{
        load(static_cast<const T*>(rows.mean) + slot),
        load(static_cast<const T*>(rows.scale) + slot),
        load(static_cast<const T*>(rows.bias) + slot)};
    if (i + kLanes <= end) {
      body(i, slot, k);
    } else {
      body.partial(i, end - i, slot, k);
    }
    slot += step;
    if (slot >= rows.period) slot -= rows.period;
    if (++packs * kLanes >= kPacksPerSum * rows.period) {
      body.flush();
      packs = 0;
    }
  }
  body.flush();
}

}  // namespace
}  // namespace frozen_bn::cpu
