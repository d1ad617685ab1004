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

// Of a pack, those of each lane.
template <class T, bool kPair>
struct LaneCoefficients {
  Vec<T> row[row_count(kPair)];

  // row_of(number) -> Vec<T>
  template <class F>
  FROZEN_BN_INLINE static LaneCoefficients of(F row_of) {
    if constexpr (kPair) {
      return {{row_of(0), row_of(1), row_of(2), row_of(3), row_of(4)}};
    } else {
      return {{row_of(0), row_of(1), row_of(2)}};
    }
  }
};

// As many packs (planar) or periods (spread) are summed in single precision: more would cost digits
// that F.batch_norm keeps.
constexpr int64_t kPacksPerSum = 64;
constexpr int64_t kPeriodsPerSum = 2;

// Shorter runs of a channel (maps up to 10x10) are not worth the loops of longer ones.
constexpr int64_t kLongRun = 8 * kMaxLanes;

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

template <class T, bool kPair>
FROZEN_BN_INLINE LaneCoefficients<T, kPair> blend(
    int64_t split, const LaneCoefficients<T, kPair>& below,
    const LaneCoefficients<T, kPair>& above) {
  const auto here = lanes_below<T>(split);
  return LaneCoefficients<T, kPair>::of([&](int row) __attribute__((always_inline)) {
    return here ? below.row[row] : above.row[row];
  });
}

// Channels are runs of at least kMinInner elements (NCHW): their coefficients stay in registers,
// and a pack that crosses into the next run takes each lane's from one of the two.
template <class T, class Body>
FROZEN_BN_INLINE void traverse_planar(
    const Layout& layout, Coefficients rows, int64_t begin, int64_t end, Body body) {
  using Lanes = typename Body::Lanes;
  const auto coefficients = [&](int64_t channel) {
    return Lanes::of([&](int number) __attribute__((always_inline)) {
      return splat<T>(static_cast<const T*>(rows.row[number])[channel]);
    });
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
    const PlanarSlot slot{channel, next, kLanes};
    while (inner >= kLongRun && i <= stop) {
      const int64_t block = std::min(stop, i + (kPacksPerSum - 1) * kLanes);
      if constexpr (Body::kTwo) {
        for (; i + kLanes <= block; i += 2 * kLanes) body.two(i, slot, k, slot, k);
      }
      for (; i <= block; i += kLanes) body(i, slot, k);
      if (i <= stop) body.flush(channel);
    }
    for (; i <= stop; i += kLanes) body(i, slot, k);
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
FROZEN_BN_INLINE void traverse_spread(Coefficients rows, int64_t begin, int64_t end, Body body) {
  const auto coefficients = [&](int64_t slot) __attribute__((always_inline)) {
    return Body::Lanes::of([&](int number) __attribute__((always_inline)) {
      return load(static_cast<const T*>(rows.row[number]) + slot);
    });
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
    slot = i + ahead - (i + ahead >= period ? period : 0);
    if (periods % kPeriodsPerSum == 0) body.flush(0);
  }
  if (i < end) body.partial(i, end - i, slot, coefficients(slot));
  body.flush(0);
}

}  // namespace
}  // namespace frozen_bn::cpu
