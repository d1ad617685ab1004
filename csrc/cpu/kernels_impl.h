// The CPU kernels. Included once for each instruction set, by kernels_*.cpp.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "traversal.h"

namespace frozen_bn::cpu {
namespace {

// The last elements of a tensor, in a buffer as long as a pack.
template <class T>
struct PartialPack {
  T values[kLanes] = {};
  PartialPack(const T* from, int64_t i, int64_t n) {
    if (from) std::memcpy(values, from + i, n * sizeof(T));
  }
  T* or_null(const T* tensor) {
    return tensor ? values : nullptr;
  }
};

void write_partial_mask(uint8_t* mask, int64_t i, int64_t n, const uint8_t* bits) {
  if (mask) std::memcpy(mask + (i >> 3), bits, (n + 7) / 8);
}

template <class T>
void compute_coefficients(const CoefficientParams& p) {
  T *scale = static_cast<T*>(p.scale), *inv_std = static_cast<T*>(p.inv_std);
  const auto compute = [&](const double* var, const double* weight, T* scale, T* inv_std) {
    const Vec<double> inverse = inverse_std(load(var), splat(p.eps));
    store(inv_std, __builtin_convertvector(inverse, Vec<T>), false);
    store(scale, __builtin_convertvector(inverse * load(weight), Vec<T>), false);
  };
  int64_t c = 0;
  for (; c + kLanes <= p.channels; c += kLanes) {
    compute(p.var + c, p.weight + c, scale + c, inv_std + c);
  }
  if (const int64_t n = p.channels - c) {
    PartialPack<double> var(p.var, c, n), weight(p.weight, c, n);
    PartialPack<T> last_scale(nullptr, 0, 0), last_inv_std(nullptr, 0, 0);
    compute(var.values, weight.values, last_scale.values, last_inv_std.values);
    std::memcpy(scale + c, last_scale.values, n * sizeof(T));
    std::memcpy(inv_std + c, last_inv_std.values, n * sizeof(T));
  }
}

// (x - mean) * scale + bias, and the residual: if there is one, and in a pair normalized as well.
template <class S, bool kPair>
FROZEN_BN_INLINE Vec<acc_t<S>> preactivation(
    Vec<acc_t<S>> x, const S* residual, const LaneCoefficients<acc_t<S>, kPair>& k) {
  const auto z = normalize(x, k.row[kMean], k.row[kScale], k.row[kBias]);
  if constexpr (kPair) {
    return normalize(load(residual), k.row[kResidualMean], k.row[kResidualScale], z);
  } else {
    return residual ? z + load(residual) : z;
  }
}

template <class S, Activation kAct, bool kPair>
struct ForwardBody {
  using T = acc_t<S>;
  using Lanes = LaneCoefficients<T, kPair>;
  const S* input;
  const S* residual;
  S* output;
  uint8_t* mask;
  Activation activation;
  Vec<T> negative_slope;
  bool stream;

  static constexpr bool kTwo = kPaired<S>;

  template <class Slot>
  FROZEN_BN_INLINE void operator()(int64_t i, Slot, const Lanes& k) const {
    const Vec<T> z = before(i, k);
    with_activation<kAct>(activation, [&](auto act) __attribute__((always_inline)) {
      if constexpr (needs_mask(act)) {
        if (mask) {
          const MaskBits bits = to_bits(blocked<act>(z));
          std::memcpy(mask + (i >> 3), &bits, sizeof(bits));
        }
      }
      store(output + i, activate<act>(z, negative_slope), stream);
    });
  }

  template <class Slot>
  FROZEN_BN_INLINE void two(int64_t i, Slot, const Lanes& k, Slot, const Lanes& k2) const {
    const Vec<T> z = before(i, k), z2 = before(i + kLanes, k2);
    with_activation<kAct>(activation, [&](auto act) __attribute__((always_inline)) {
      if constexpr (needs_mask(act)) {
        if (mask) {
          const TwoMaskBits bits = both(to_bits(blocked<act>(z)), to_bits(blocked<act>(z2)));
          std::memcpy(mask + (i >> 3), &bits, sizeof(bits));
        }
      }
      const Vec<T> y = activate<act>(z, negative_slope), y2 = activate<act>(z2, negative_slope);
      store_two(output + i, y, y2, stream);
    });
  }

  FROZEN_BN_INLINE Vec<T> before(int64_t i, const Lanes& k) const {
    const S* const r = kPair || residual ? residual + i : nullptr;
    return preactivation<S, kPair>(load(input + i), r, k);
  }

  template <class Slot>
  __attribute__((noinline)) void partial(int64_t i, int64_t n, Slot slot, Lanes k) const {
    PartialPack<S> x(input, i, n), r(residual, i, n), y(nullptr, 0, 0);
    uint8_t bits[2] = {};
    ForwardBody{x.values,   r.or_null(residual), y.values, mask ? bits : nullptr,
                activation, negative_slope,      false}(0, slot, k);
    std::memcpy(output + i, y.values, n * sizeof(S));
    write_partial_mask(mask, i, n, bits);
  }

  void flush(int64_t) const {}
};

template <class S, Activation kAct, bool kPair>
void forward_range(const ForwardParams& p, int64_t begin, int64_t end) {
  using T = acc_t<S>;
  ForwardBody<S, kAct, kPair> body{
      static_cast<const S*>(p.input),
      static_cast<const S*>(p.residual),
      static_cast<S*>(p.output),
      p.mask,
      p.activation,
      splat<T>(p.negative_slope),
      p.stream};
  if (p.coefficients.period == 0) {
    traverse_planar<T>(p.layout, p.coefficients, begin, end, body);
  } else {
    traverse_spread<T>(p.coefficients, begin, end, body);
  }
  if (p.stream) streaming_done();
}

// The channel sums of a backward pass: a few packs are summed in the precision of the arithmetic,
// then put away in double.
struct NoSums {
  template <class V, class Slot>
  FROZEN_BN_INLINE void add(V, V, Slot) {}
  FROZEN_BN_INLINE void flush(int64_t) {}
};

template <class T>
FROZEN_BN_INLINE double sum_lanes(Vec<T> pack) {
  double sums[kLanes];
  store(sums, __builtin_convertvector(pack, Vec<double>), false);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class T>
struct PlanarSums {
  ChannelSums totals;
  Vec<T> g{}, centered{};

  FROZEN_BN_INLINE void add(Vec<T> pack_g, Vec<T> pack_centered, PlanarSlot slot) {
    if (slot.split == kLanes) {
      g += pack_g;
      centered += pack_centered;
      return;
    }
    const Vec<T> zero{};
    const auto here = lanes_below<T>(slot.split);
    g += here ? pack_g : zero;
    centered += here ? pack_centered : zero;
    flush(slot.channel);
    g = here ? zero : pack_g;
    centered = here ? zero : pack_centered;
  }

  void flush(int64_t channel) {
    totals.g[channel] += sum_lanes<T>(g);
    totals.g_centered[channel] += sum_lanes<T>(centered);
    g = centered = Vec<T>{};
  }
};

template <class T>
struct SpreadSums {
  ChannelSums totals;
  const Layout& layout;
  int64_t period;
  int64_t entries = period + kMaxLanes;
  T* g = static_cast<T*>(totals.spread_few);
  T* centered = g + entries;

  FROZEN_BN_INLINE void add(Vec<T> pack_g, Vec<T> pack_centered, int64_t slot) {
    store(g + slot, load(g + slot) + pack_g, false);
    store(centered + slot, load(centered + slot) + pack_centered, false);
  }

  void flush(int64_t) {
    int64_t j = 0;
    for (; j + kLanes <= 2 * entries; j += kLanes) {
      const Vec<double> few = __builtin_convertvector(load(g + j), Vec<double>);
      store(totals.spread + j, load(totals.spread + j) + few, false);
      store(g + j, Vec<T>{}, false);
    }
    for (; j < 2 * entries; ++j) totals.spread[j] += std::exchange(g[j], T{});
  }

  void gather() const {
    for (int64_t j = 0; j < entries; ++j) {
      const int64_t channel = j % period / layout.inner % layout.channels;
      totals.g[channel] += totals.spread[j];
      totals.g_centered[channel] += totals.spread[entries + j];
    }
  }
};

template <class S, Activation kAct, bool kPair, class Sums>
struct BackwardBody {
  using T = acc_t<S>;
  using Lanes = LaneCoefficients<T, kPair>;
  const S* grad_output;
  const uint8_t* mask;
  const S* input;
  const S* residual;
  S* grad_input;
  S* grad_residual;
  Activation activation;
  Vec<T> negative_slope;
  bool stream;
  Sums& sums;

  static constexpr bool kTwo = kPaired<S>;

  template <class Slot>
  FROZEN_BN_INLINE void operator()(int64_t i, Slot slot, const Lanes& k) const {
    const Vec<T> g = gradient(i, slot, k);
    if (grad_input) store(grad_input + i, g * k.row[kScale], stream);
    if (grad_residual) store(grad_residual + i, of_residual(g, k), stream);
  }

  template <class Slot>
  FROZEN_BN_INLINE void two(
      int64_t i, Slot slot, const Lanes& k, Slot slot2, const Lanes& k2) const {
    const Vec<T> g = gradient(i, slot, k), g2 = gradient(i + kLanes, slot2, k2);
    if (grad_input) {
      store_two(grad_input + i, g * k.row[kScale], g2 * k2.row[kScale], stream);
    }
    if (grad_residual) {
      store_two(grad_residual + i, of_residual(g, k), of_residual(g2, k2), stream);
    }
  }

  FROZEN_BN_INLINE static Vec<T> of_residual(Vec<T> g, const Lanes& k) {
    if constexpr (kPair) {
      return g * k.row[kResidualScale];
    } else {
      return g;
    }
  }

  // Behind the activation; added to the sums.
  template <class Slot>
  FROZEN_BN_INLINE Vec<T> gradient(int64_t i, Slot slot, const Lanes& k) const {
    const Vec<T> zero{};
    Vec<T> g = load(grad_output + i);
    const Vec<T> x = input ? load(input + i) : zero;
    with_activation<kAct>(activation, [&](auto act) __attribute__((always_inline)) {
      if constexpr (needs_input(act)) {
        const S* const r = kPair || residual ? residual + i : nullptr;
        g *= derivative<act>(preactivation<S, kPair>(x, r, k));
      } else if constexpr (needs_mask(act)) {
        MaskBits bits;
        std::memcpy(&bits, mask + (i >> 3), sizeof(bits));
        const Vec<T> attenuated = act == Activation::kLeakyRelu ? g * negative_slope : zero;
        g = select<T>(bits, attenuated, g);
      }
    });
    sums.add(g, g * (x - k.row[kMean]), slot);
    return g;
  }

  template <class Slot>
  __attribute__((noinline)) void partial(int64_t i, int64_t n, Slot slot, Lanes k) const {
    PartialPack<S> dy(grad_output, i, n), x(input, i, n), r(residual, i, n);
    PartialPack<S> dx(nullptr, 0, 0), dr(nullptr, 0, 0);
    uint8_t bits[2] = {};
    if (mask) std::memcpy(bits, mask + (i >> 3), (n + 7) / 8);
    BackwardBody{
        dy.values,
        bits,
        x.or_null(input),
        r.or_null(residual),
        dx.or_null(grad_input),
        dr.or_null(grad_residual),
        activation,
        negative_slope,
        false,
        sums}(0, slot, k);
    if (grad_input) std::memcpy(grad_input + i, dx.values, n * sizeof(S));
    if (grad_residual) std::memcpy(grad_residual + i, dr.values, n * sizeof(S));
  }

  FROZEN_BN_INLINE void flush(int64_t channel) const {
    sums.flush(channel);
  }
};

template <class S, Activation kAct, bool kPair, class Sums>
BackwardBody<S, kAct, kPair, Sums> backward_body(const BackwardParams& p, Sums& sums) {
  using T = acc_t<S>;
  return {
      static_cast<const S*>(p.grad_output),
      p.mask,
      static_cast<const S*>(p.input),
      static_cast<const S*>(p.residual),
      static_cast<S*>(p.grad_input),
      static_cast<S*>(p.grad_residual),
      p.activation,
      splat<T>(p.negative_slope),
      p.stream,
      sums};
}

template <class S, Activation kAct, bool kPair, class Sums>
void traverse_backward(const BackwardParams& p, int64_t begin, int64_t end, Sums& sums) {
  using T = acc_t<S>;
  const auto body = backward_body<S, kAct, kPair>(p, sums);
  if (p.coefficients.period == 0) {
    traverse_planar<T>(p.layout, p.coefficients, begin, end, body);
  } else {
    traverse_spread<T>(p.coefficients, begin, end, body);
  }
}

template <class S, Activation kAct>
void backward_range(const BackwardParams& p, int64_t begin, int64_t end, ChannelSums totals) {
  using T = acc_t<S>;
  const int64_t period = p.coefficients.period;
  NoSums none;
  if (!totals.g) {
    traverse_backward<S, kAct, false>(p, begin, end, none);
  } else if (period == 0) {
    PlanarSums<T> sums{totals};
    traverse_planar<T>(
        p.layout, p.coefficients, begin, end, backward_body<S, kAct, false>(p, sums));
  } else {
    SpreadSums<T> sums{totals, p.layout, period};
    traverse_spread<T>(p.coefficients, begin, end, backward_body<S, kAct, false>(p, sums));
    sums.gather();
  }
}

// Calls f with a zero of the storage type, if this instruction set has kernels of its own for it.
template <class F>
void dispatch(Dtype dtype, F f) {
  switch (dtype) {
#if FROZEN_BN_CPU_LEVEL < 3
    case Dtype::kFloat: return f(float{});
    case Dtype::kHalf: return f(Half{});
#endif
#if FROZEN_BN_CPU_LEVEL == 0
    case Dtype::kDouble: return f(double{});
#endif
    default: return f(BFloat16{});
  }
}

// Of a pair. Told apart pack by pack, silu would be up to a tenth slower.
template <class F>
void dispatch_of_pair(Activation activation, F f) {
  if (activation == Activation::kSilu) return f(ActivationConstant<Activation::kSilu>{});
  dispatch_common(activation, f);
}

void coefficients(Dtype dtype, const CoefficientParams& p) {
  dispatch(dtype, [&](auto storage) { compute_coefficients<acc_t<decltype(storage)>>(p); });
}

void forward(Dtype dtype, const ForwardParams& p, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    if (p.coefficients.pair) {
      dispatch_of_pair(p.activation, [&](auto act) { forward_range<S, act, true>(p, begin, end); });
    } else {
      dispatch_activation(
          p.activation, [&](auto act) { forward_range<S, act, false>(p, begin, end); });
    }
  });
}

void backward(
    Dtype dtype, const BackwardParams& p, int64_t begin, int64_t end, ChannelSums totals) {
  const Activation kind = gradient_kind(p.activation);
  dispatch(dtype, [&](auto storage) {
    using S = decltype(storage);
    if (p.coefficients.pair) {
      NoSums none;
      dispatch_of_pair(
          kind, [&](auto act) { traverse_backward<S, act, true>(p, begin, end, none); });
    } else {
      dispatch_gradient(kind, [&](auto act) { backward_range<S, act>(p, begin, end, totals); });
    }
  });
  if (p.stream) streaming_done();
}

}  // namespace
}  // namespace frozen_bn::cpu
