// The arithmetic of the project, once: the CPU kernels instantiate it with SIMD vectors, the CUDA
// kernels with float. Torch-free.
//
//   y = act((x - mean) * scale + bias + residual),   scale = weight / sqrt(var + eps)
//
// In a pair, the residual is normalized as well, with statistics of its own.
//
// `T` is float, double, or a GCC/Clang vector of them; a comparison then gives a bool or a lane
// mask, and `?:` selects on either.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define FROZEN_BN_INLINE __host__ __device__ __forceinline__
#else
#define FROZEN_BN_INLINE inline __attribute__((always_inline))
#endif

namespace frozen_bn {

// The order is that of ACTIVATIONS in frozen_bn/checks.py. kAnyRare is what a kernel is compiled
// for in combinations that networks hardly have: any but none and ReLU, told apart at run time.
enum class Activation : int64_t { kNone, kRelu, kRelu6, kLeakyRelu, kSilu, kHardswish, kAnyRare };
constexpr int64_t kActivations = 6;

// Rows of the coefficients tensor, [kRows, C] in the dtype of the arithmetic: all that the
// backward needs of the channels, safe from later changes to the buffers that it came from.
enum CoefficientRow : int64_t { kMean, kScale, kBias, kInvStd, kRows };

// Of a pair they are [kPairRows, C]: kMean, kScale, the sum of both biases as kBias, and these.
// (Nothing there needs kInvStd: it has no affine gradients.)
enum PairCoefficientRow : int64_t { kResidualMean = kBias + 1, kResidualScale, kPairRows };

// Piecewise-linear: the gradient needs one bit an element.
FROZEN_BN_INLINE constexpr bool needs_mask(Activation a) {
  return a == Activation::kRelu || a == Activation::kRelu6 || a == Activation::kLeakyRelu;
}

// Smooth: the gradient needs the pre-activation, so the input (and the residual) again.
FROZEN_BN_INLINE constexpr bool needs_input(Activation a) {
  return a == Activation::kSilu || a == Activation::kHardswish;
}

// The backward pass sees no difference between activations that block a gradient alike.
FROZEN_BN_INLINE constexpr Activation gradient_kind(Activation a) {
  return a == Activation::kRelu6 ? Activation::kRelu : a;
}

// Whether a kernel for `a` may have to do with a smooth activation.
FROZEN_BN_INLINE constexpr bool may_need_input(Activation a) {
  return needs_input(a) || a == Activation::kAnyRare;
}

// Anonymous, because the CPU kernels compile this file once an instruction set: merged by the
// linker, a machine could be handed another machine's instructions.
namespace {

template <class T>
FROZEN_BN_INLINE T constant(float value) {
  return T{} + value;
}

// What the arithmetic needs beyond operators; SIMD vectors add theirs. max and min return the
// second argument if either is NaN.
template <class T>
struct Math;

template <class T>
struct ScalarMath {
  FROZEN_BN_INLINE static T exp(T x) {
    return std::exp(x);
  }
  FROZEN_BN_INLINE static T sqrt(T x) {
    return std::sqrt(x);
  }
  // Compared as in `blocked`, so that one comparison serves both.
  FROZEN_BN_INLINE static T max(T a, T b) {
    return !(b <= a) ? b : a;
  }
  FROZEN_BN_INLINE static T min(T a, T b) {
    return !(a <= b) ? b : a;
  }
  FROZEN_BN_INLINE static bool less_equal(T a, T b) {
    return a <= b;
  }
  FROZEN_BN_INLINE static bool not_greater(T a, T b) {
    return !(a > b);
  }
};
template <>
struct Math<float> : ScalarMath<float> {};

// On CUDA within 2 units in the last place, unless 1 / b is subnormal: to the nearest takes three
// times as many instructions.
template <class T>
FROZEN_BN_INLINE T divide(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) {
    float inverse;
    asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    return a * inverse;
  }
#endif
  return a / b;
}

template <class T>
FROZEN_BN_INLINE T inverse_std(T var, T eps) {
  return constant<T>(1.0f) / Math<T>::sqrt(var + eps);
}

// Subtracting first keeps the digits that `x * scale + shift` loses when the mean is large.
template <class T>
FROZEN_BN_INLINE T normalize(T x, T mean, T scale, T bias) {
  return (x - mean) * scale + bias;
}

// NaN passes through every activation, as in torch.
template <Activation kAct, class T>
FROZEN_BN_INLINE T activate(T z, T negative_slope) {
  if constexpr (kAct == Activation::kRelu) {
    return Math<T>::max(T{}, z);
  } else if constexpr (kAct == Activation::kRelu6) {
    return Math<T>::min(constant<T>(6.0f), Math<T>::max(T{}, z));
  } else if constexpr (kAct == Activation::kLeakyRelu) {
    return z > T{} ? z : z * negative_slope;
  } else if constexpr (kAct == Activation::kSilu) {
    return divide(z, constant<T>(1.0f) + Math<T>::exp(-z));
  } else if constexpr (kAct == Activation::kHardswish) {
    const T sixth = constant<T>(1.0f) / constant<T>(6.0f);
    return z * activate<Activation::kRelu6>(z + constant<T>(3.0f), T{}) * sixth;
  } else {
    return z;
  }
}

// The lanes that the gradient does not pass unchanged, with torch's choices at NaN: a mask bit an
// element.
template <Activation kAct, class T>
FROZEN_BN_INLINE auto blocked(T z) {
  if constexpr (kAct == Activation::kRelu6) {
    return Math<T>::less_equal(z, T{}) | Math<T>::less_equal(constant<T>(6.0f), z);
  } else if constexpr (kAct == Activation::kLeakyRelu) {
    return Math<T>::not_greater(z, T{});
  } else {
    return Math<T>::less_equal(z, T{});
  }
}

// d act / d z of the smooth activations, with torch's values at the kinks of hardswish.
template <Activation kAct, class T>
FROZEN_BN_INLINE T derivative(T z) {
  const T one = constant<T>(1.0f);
  if constexpr (kAct == Activation::kSilu) {
    const T sigmoid = divide(one, one + Math<T>::exp(-z));
    return sigmoid * (one + z * (one - sigmoid));
  } else {
    const T three = constant<T>(3.0f);
    const T ramp = z * (one / three) + constant<T>(0.5f);
    return z <= -three ? T{} : (z < three ? ramp : one);
  }
}

template <Activation kAct>
using ActivationConstant = std::integral_constant<Activation, kAct>;

#define FROZEN_BN_CASE(A) \
  case Activation::A: return f(ActivationConstant<Activation::A>{})

// Calls f with the activation as a compile-time constant.
template <class F>
void dispatch_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kAnyRare:
      return;  // never an argument
      FROZEN_BN_CASE(kNone);
      FROZEN_BN_CASE(kRelu);
      FROZEN_BN_CASE(kRelu6);
      FROZEN_BN_CASE(kLeakyRelu);
      FROZEN_BN_CASE(kSilu);
      FROZEN_BN_CASE(kHardswish);
  }
}

// Likewise, of those that the backward pass tells apart.
template <class F>
void dispatch_gradient(Activation activation, F f) {
  switch (activation) {
    FROZEN_BN_CASE(kNone);
    FROZEN_BN_CASE(kLeakyRelu);
    FROZEN_BN_CASE(kSilu);
    FROZEN_BN_CASE(kHardswish);
    default: return f(ActivationConstant<Activation::kRelu>{});
  }
}

// Likewise, with all that is rare as one.
template <class F>
void dispatch_common(Activation activation, F f) {
  switch (activation) {
    FROZEN_BN_CASE(kNone);
    FROZEN_BN_CASE(kRelu);
    default: return f(ActivationConstant<Activation::kAnyRare>{});
  }
}

// In a kernel for kAct: calls f with kAct, or with the one that `activation` says.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <Activation kAct, class F>
FROZEN_BN_INLINE void with_activation(Activation activation, F f) {
  if constexpr (kAct != Activation::kAnyRare) {
    f(ActivationConstant<kAct>{});
  } else {
    switch (activation) {
      FROZEN_BN_CASE(kRelu6);
      FROZEN_BN_CASE(kLeakyRelu);
      FROZEN_BN_CASE(kSilu);
      default: return f(ActivationConstant<Activation::kHardswish>{});
    }
  }
}
#undef FROZEN_BN_CASE

}  // namespace
}  // namespace frozen_bn
