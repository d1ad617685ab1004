// A pack of 8 elements: 16-byte accesses where memory allows, element by element at a tensor's end
// and in misaligned views. Torch-free.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace frozen_bn::cuda {
namespace {

template <class T>
struct Storage;  // two elements as a 32-bit word, and one alone

template <>
struct Storage<__half> {
  static __device__ float2 unpack(uint32_t word) {
    float2 pair;  // in assembly, because __half22float2 takes the word apart twice
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(word));
    return pair;
  }
  static __device__ uint32_t pack(float low, float high) {
    const __half2 halves = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&halves);
  }
  static __device__ float load(__half value) {
    return __half2float(value);
  }
  static __device__ __half store(float value) {
    return __float2half_rn(value);
  }
};

template <>
struct Storage<__nv_bfloat16> {
  static __device__ float2 unpack(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  static __device__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 halves = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&halves);
  }
  static __device__ float load(__nv_bfloat16 value) {
    return __bfloat162float(value);
  }
  static __device__ __nv_bfloat16 store(float value) {
    return __float2bfloat16_rn(value);
  }
};

template <>
struct Storage<float> {
  static __device__ float load(float value) {
    return value;
  }
  static __device__ float store(float value) {
    return value;
  }
};

// As it lies in memory: 16 bytes of halves, 32 of floats.
template <class T>
struct RawPack {
  uint4 words;
};
template <>
struct RawPack<float> {
  float4 low, high;
};

struct Floats {
  float lane[kPackSize];
};

template <class T>
__device__ Floats unpack(const RawPack<T>& raw) {
  Floats x;
  if constexpr (sizeof(T) == sizeof(float)) {
    x = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
         raw.high.x, raw.high.y, raw.high.z, raw.high.w};
  } else {
    const uint32_t words[] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
#pragma unroll
    for (int k = 0; k < kPackSize / 2; ++k) {
      const float2 pair = Storage<T>::unpack(words[k]);
      x.lane[2 * k] = pair.x;
      x.lane[2 * k + 1] = pair.y;
    }
  }
  return x;
}

template <class T>
__device__ RawPack<T> pack(const Floats& x) {
  const float* lane = x.lane;
  if constexpr (sizeof(T) == sizeof(float)) {
    return {{lane[0], lane[1], lane[2], lane[3]}, {lane[4], lane[5], lane[6], lane[7]}};
  } else {
    return {
        {Storage<T>::pack(lane[0], lane[1]), Storage<T>::pack(lane[2], lane[3]),
         Storage<T>::pack(lane[4], lane[5]), Storage<T>::pack(lane[6], lane[7])}};
  }
}

// Where a pack starts, and how it may be accessed: 16 bytes at a time...
struct WholePack {
  int64_t element;
  static constexpr uint32_t count = kPackSize;
};

// ... or as whatever it is: perhaps less than 8 elements (or none), perhaps not aligned.
struct AnyPack {
  int64_t element;
  uint32_t count;
  bool vector_access;

  // `left` elements are left there.
  __device__ AnyPack(int64_t element, int64_t left, bool aligned)
      : element(element),
        count(left >= kPackSize ? kPackSize : (left > 0 ? static_cast<uint32_t>(left) : 0)),
        vector_access(aligned && count == kPackSize) {}
};

// In assembly, because the compiler takes some of these accesses apart.
__device__ inline uint4 load_quad(const uint4* from) {
  uint4 quad;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(quad.x), "=r"(quad.y), "=r"(quad.z), "=r"(quad.w)
               : "l"(__cvta_generic_to_global(from)));
  return quad;
}
__device__ inline float4 load_quad(const float4* from) {
  float4 quad;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(quad.x), "=f"(quad.y), "=f"(quad.z), "=f"(quad.w)
               : "l"(__cvta_generic_to_global(from)));
  return quad;
}
__device__ inline void store_quad(uint4* to, uint4 quad) {
  asm volatile(
      "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(quad.x),
      "r"(quad.y), "r"(quad.z), "r"(quad.w));
}
__device__ inline void store_quad(float4* to, float4 quad) {
  asm volatile(
      "st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(quad.x),
      "f"(quad.y), "f"(quad.z), "f"(quad.w));
}

template <class T>
__device__ RawPack<T> load(const void* tensor, WholePack at) {
  const void* from = static_cast<const T*>(tensor) + at.element;
  if constexpr (sizeof(T) == sizeof(float)) {
    const float4* quads = static_cast<const float4*>(from);
    return {load_quad(quads), load_quad(quads + 1)};
  } else {
    return {load_quad(static_cast<const uint4*>(from))};
  }
}

template <class T>
__device__ void store(void* tensor, WholePack at, const Floats& x) {
  void* to = static_cast<T*>(tensor) + at.element;
  const RawPack<T> raw = pack<T>(x);
  if constexpr (sizeof(T) == sizeof(float)) {
    store_quad(static_cast<float4*>(to), raw.low);
    store_quad(static_cast<float4*>(to) + 1, raw.high);
  } else {
    store_quad(static_cast<uint4*>(to), raw.words);
  }
}

// Lanes beyond the count read as 0.
template <class T>
__device__ RawPack<T> load(const void* tensor, AnyPack at) {
  if (at.vector_access) return load<T>(tensor, WholePack{at.element});
  const T* from = static_cast<const T*>(tensor) + at.element;
  Floats x{};
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if (k < at.count) x.lane[k] = Storage<T>::load(from[k]);
  }
  return pack<T>(x);
}

template <class T>
__device__ void store(void* tensor, AnyPack at, const Floats& x) {
  if (at.vector_access) return store<T>(tensor, WholePack{at.element}, x);
  T* to = static_cast<T*>(tensor) + at.element;
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if (k < at.count) to[k] = Storage<T>::store(x.lane[k]);
  }
}

__device__ inline float load_channel(const ChannelVector& vector, int64_t channel) {
  if (vector.dtype == Dtype::kFloat) return static_cast<const float*>(vector.data)[channel];
  switch (vector.dtype) {
    case Dtype::kHalf: return __half2float(static_cast<const __half*>(vector.data)[channel]);
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(vector.data)[channel]);
    default: return static_cast<float>(static_cast<const double*>(vector.data)[channel]);
  }
}

__device__ inline void store_channel(void* vector, Dtype dtype, int64_t channel, float value) {
  switch (dtype) {
    case Dtype::kHalf: static_cast<__half*>(vector)[channel] = __float2half_rn(value); break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(vector)[channel] = __float2bfloat16_rn(value);
      break;
    case Dtype::kDouble: static_cast<double*>(vector)[channel] = value; break;
    default: static_cast<float*>(vector)[channel] = value;
  }
}

}  // namespace
}  // namespace frozen_bn::cuda
