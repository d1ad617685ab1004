// A pack of lanes for the instruction set that the including file was compiled for. Arithmetic,
// comparison and selection are the compiler's own on vector types; only what those cannot say is
// here: half conversions, mask bits, streaming stores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../affine.h"

#if FROZEN_BN_CPU_LEVEL > 0
#include <immintrin.h>
#else
#include <torch/headeronly/util/Half.h>
#endif

namespace frozen_bn {
namespace {

#if FROZEN_BN_CPU_LEVEL >= 2
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
using Vec = typename VecOf<T>::type;
using Lanes32 = Vec<int32_t>;

// Subtracting zero, unlike adding it, changes nothing, and compiles to nothing.
template <class T>
FROZEN_BN_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// Storage types: the bits of a half, told apart by name.
enum class Half : uint16_t {};
enum class BFloat16 : uint16_t {};

// The type that arithmetic on a storage type is done in.
template <class Storage>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class Storage>
using acc_t = typename Accumulate<Storage>::type;

template <class To, class From>
FROZEN_BN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
FROZEN_BN_INLINE V load_unaligned(const T* from) {
  V pack;
  std::memcpy(&pack, from, sizeof(V));
  return pack;
}

FROZEN_BN_INLINE Vec<float> load(const float* from) {
  return load_unaligned<Vec<float>>(from);
}
FROZEN_BN_INLINE Vec<double> load(const double* from) {
  return load_unaligned<Vec<double>>(from);
}

#if FROZEN_BN_CPU_LEVEL >= 2
// For the masked forms of intrinsics: the plain ones draw false warnings from GCC.
constexpr __mmask16 kAllLanes = 0xffff;

// One permutation that puts each bfloat16 into the upper half of a zeroed lane takes two thirds of
// the time of widening and shifting.
FROZEN_BN_INLINE Vec<float> load(const BFloat16* from) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
  Words sources{};
  for (int word = 0; word < 32; ++word) sources[word] = word / 2;
  const __m512i bits = _mm512_castsi256_si512(load_unaligned<__m256i>(from));
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(kUpperHalves, (__m512i)sources, bits);
}

FROZEN_BN_INLINE Vec<float> load(const Half* from) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(kAllLanes, load_unaligned<__m256i>(from));
}
FROZEN_BN_INLINE Vec<uint16_t> to_storage(Vec<float> pack, Half*) {
  return (Vec<uint16_t>)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)pack, _MM_FROUND_TO_NEAREST_INT);
}
#if FROZEN_BN_CPU_LEVEL == 3
// The conversions of AVX-512 BF16 take subnormals for zero, so those go the long way.
FROZEN_BN_INLINE __mmask16 subnormal(Vec<float> pack) {
  return _mm512_fpclass_ps_mask((__m512)pack, 0x20);
}
#endif
FROZEN_BN_INLINE Vec<uint16_t> to_storage(Vec<float> pack, BFloat16*) {
#if FROZEN_BN_CPU_LEVEL == 3
  if (subnormal(pack) == 0) [[likely]] {
    return (Vec<uint16_t>)_mm512_cvtneps_pbh((__m512)pack);
  }
#endif
  // As below, in fewer instructions: masks for the odd and the NaN lanes.
  const __m512i bits = (__m512i)pack;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)pack, (__m512)pack, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_sub_epi32(rounded, odd, rounded, _mm512_set1_epi32(-1));
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  rounded = _mm512_maskz_srli_epi32(kAllLanes, rounded, 16);
  return (Vec<uint16_t>)_mm512_maskz_cvtepi32_epi16(kAllLanes, rounded);
}
FROZEN_BN_INLINE uint16_t to_bits(__mmask16 mask) {
  return mask;
}
FROZEN_BN_INLINE void stream_bytes(void* to, Vec<float> pack) {
  _mm512_stream_ps(static_cast<float*>(to), (__m512)pack);
}
FROZEN_BN_INLINE void stream_bytes(void* to, Vec<uint16_t> pack) {
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)pack);
}
#elif FROZEN_BN_CPU_LEVEL == 1
FROZEN_BN_INLINE Vec<float> load(const Half* from) {
  return (Vec<float>)_mm256_cvtph_ps(load_unaligned<__m128i>(from));
}
FROZEN_BN_INLINE Vec<uint16_t> to_storage(Vec<float> pack, Half*) {
  return (Vec<uint16_t>)_mm256_cvtps_ph((__m256)pack, _MM_FROUND_TO_NEAREST_INT);
}
FROZEN_BN_INLINE uint8_t to_bits(Lanes32 mask) {
  return _mm256_movemask_ps((__m256)mask);
}
FROZEN_BN_INLINE void stream_bytes(void* to, Vec<float> pack) {
  _mm256_stream_ps(static_cast<float*>(to), (__m256)pack);
}
FROZEN_BN_INLINE void stream_bytes(void* to, Vec<uint16_t> pack) {
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)pack);
}
#else
// Lane by lane, so long that they are better called than written out everywhere.
__attribute__((noinline)) Vec<float> load(const Half* from) {
  Vec<float> pack;
  for (int lane = 0; lane < kLanes; ++lane) {
    pack[lane] = c10::detail::fp16_ieee_to_fp32_value(static_cast<uint16_t>(from[lane]));
  }
  return pack;
}
__attribute__((noinline)) Vec<uint16_t> to_storage(Vec<float> pack, Half*) {
  Vec<uint16_t> halves;
  for (int lane = 0; lane < kLanes; ++lane) {
    halves[lane] = c10::detail::fp16_ieee_from_fp32_value(pack[lane]);
  }
  return halves;
}
#endif

#if FROZEN_BN_CPU_LEVEL < 2
FROZEN_BN_INLINE Vec<float> load(const BFloat16* from) {
  const auto bits = load_unaligned<Vec<uint16_t>>(from);
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}
FROZEN_BN_INLINE Vec<uint16_t> to_storage(Vec<float> pack, BFloat16*) {
  const auto bits = bit_cast<Vec<uint32_t>>(pack);
  const auto nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet_nan = (bits >> 16) | 0x40u;
  const auto rounded = pack != pack ? quiet_nan : nearest_even;
  return __builtin_convertvector(rounded, Vec<uint16_t>);
}
#endif

// Lane k as bit k, and back.
using MaskBits = std::conditional_t<kLanes == 16, uint16_t, uint8_t>;

// Of a pack and the next, to be stored at once.
using TwoMaskBits = std::conditional_t<kLanes == 16, uint32_t, uint16_t>;
FROZEN_BN_INLINE TwoMaskBits both(MaskBits first, MaskBits second) {
  return static_cast<TwoMaskBits>(first | static_cast<uint32_t>(second) << kLanes);
}

template <class Mask>
FROZEN_BN_INLINE auto to_bits(Mask mask) -> decltype(mask[0], MaskBits{}) {
  MaskBits bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (mask[lane] & 1) << lane;
  return bits;
}

template <class T>
FROZEN_BN_INLINE auto lane_numbers() {
  std::conditional_t<sizeof(T) == 8, Vec<int64_t>, Lanes32> numbers{};
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// Of each lane, a's value where its bit is set, else b's.
template <class T>
FROZEN_BN_INLINE Vec<T> select(MaskBits bits, Vec<T> a, Vec<T> b) {
#if FROZEN_BN_CPU_LEVEL >= 2
  if constexpr (sizeof(T) == sizeof(float)) {
    return (Vec<T>)_mm512_mask_blend_ps(bits, (__m512)b, (__m512)a);
  }
#endif
  const auto lanes = lane_numbers<T>();
  return ((lanes - lanes + bits) >> lanes & 1) != 0 ? a : b;
}

FROZEN_BN_INLINE Vec<float> to_storage(Vec<float> pack, float*) {
  return pack;
}
FROZEN_BN_INLINE Vec<double> to_storage(Vec<double> pack, double*) {
  return pack;
}

template <class V>
FROZEN_BN_INLINE void stream_bytes(void* to, V pack) {
  std::memcpy(to, &pack, sizeof(V));
}

// Streaming bypasses the cache: for outputs that would not stay in it. `to` must then be aligned.
template <class Storage>
FROZEN_BN_INLINE void store(Storage* to, Vec<acc_t<Storage>> pack, bool stream) {
  const auto stored = to_storage(pack, to);
  if (stream) {
    stream_bytes(to, stored);
  } else {
    std::memcpy(to, &stored, sizeof(stored));
  }
}

// Two packs of this type are stored in fewer instructions together than apart.
template <class Storage>
constexpr bool kPaired = (FROZEN_BN_CPU_LEVEL == 3 && std::is_same_v<Storage, BFloat16>) ||
                         (FROZEN_BN_CPU_LEVEL >= 2 && std::is_same_v<Storage, Half>);

template <class Storage>
FROZEN_BN_INLINE void store_two(
    Storage* to, Vec<acc_t<Storage>> first, Vec<acc_t<Storage>> second, bool stream) {
#if FROZEN_BN_CPU_LEVEL == 3
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    if (!stream && _kortestz_mask16_u8(subnormal(first), subnormal(second))) [[likely]] {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
      std::memcpy(to, &both, sizeof(both));
      return;
    }
  }
#endif
  store(to, first, stream);
  store(to + kLanes, second, stream);
}

FROZEN_BN_INLINE void streaming_done() {
#if FROZEN_BN_CPU_LEVEL > 0
  _mm_sfence();
#endif
}

template <>
struct Math<Vec<float>> {
  using V = Vec<float>;

#if FROZEN_BN_CPU_LEVEL >= 2
  FROZEN_BN_INLINE static V max(V a, V b) {
    return (V)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
  }
  FROZEN_BN_INLINE static V min(V a, V b) {
    return (V)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
  }
  FROZEN_BN_INLINE static __mmask16 less_equal(V a, V b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ);
  }
  FROZEN_BN_INLINE static __mmask16 not_greater(V a, V b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NGT_UQ);
  }
#else
  FROZEN_BN_INLINE static V max(V a, V b) {
    return a > b ? a : b;
  }
  FROZEN_BN_INLINE static V min(V a, V b) {
    return a < b ? a : b;
  }
  FROZEN_BN_INLINE static Lanes32 less_equal(V a, V b) {
    return a <= b;
  }
  FROZEN_BN_INLINE static Lanes32 not_greater(V a, V b) {
    return ~(a > b);
  }
#endif

  // To about one unit in the last place: 2^n * e^r, |r| <= ln(2) / 2, e^r by its Taylor series,
  // ln(2) in two parts (Cody & Waite, Software Manual for the Elementary Functions, 1980).
  FROZEN_BN_INLINE static V exp(V x) {
    const V zero{};
    const V clamped = min(zero + 89.0f, max(zero - 104.0f, x));
    const V shifter = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (clamped * 1.44269504f + shifter) - shifter;
    const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    V series = zero + 1.0f / 5040;
#pragma GCC unroll 7
    for (float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
      series = series * r + coefficient;
    }
    // 2^n in two factors, for the subnormal and the overflowing ends.
    const auto exponent = __builtin_convertvector(n, Lanes32);
    const auto half = exponent >> 1;
    return x != x ? x : series * power_of_two(half) * power_of_two(exponent - half);
  }

  FROZEN_BN_INLINE static V power_of_two(Lanes32 exponent) {
    return bit_cast<V>((exponent + 127) << 23);
  }
};

template <>
struct Math<Vec<double>> {
  using V = Vec<double>;

  FROZEN_BN_INLINE static V max(V a, V b) {
    return a > b ? a : b;
  }
  FROZEN_BN_INLINE static V min(V a, V b) {
    return a < b ? a : b;
  }
  FROZEN_BN_INLINE static V sqrt(V x) {
#if FROZEN_BN_CPU_LEVEL >= 2
    __m512d halves[2];
    std::memcpy(halves, &x, sizeof(V));
    for (__m512d& half : halves) half = _mm512_maskz_sqrt_pd(0xff, half);
    return load_unaligned<V>(halves);
#elif FROZEN_BN_CPU_LEVEL == 1
    __m256d halves[2];
    std::memcpy(halves, &x, sizeof(V));
    for (__m256d& half : halves) half = _mm256_sqrt_pd(half);
    return load_unaligned<V>(halves);
#else
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
  }
  FROZEN_BN_INLINE static auto less_equal(V a, V b) {
    return a <= b;
  }
  FROZEN_BN_INLINE static auto not_greater(V a, V b) {
    return ~(a > b);
  }
  __attribute__((noinline)) static V exp(V x) {
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = std::exp(x[lane]);
    return x;
  }
};

}  // namespace
}  // namespace frozen_bn
