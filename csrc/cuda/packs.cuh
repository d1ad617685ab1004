// A pack of 8 elements: 16-byte accesses where memory allows, element by element at a tensor's end
// and in misaligned views. Torch-free.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../affine.h"
#include "params.h"

namespace frozen_bn::cuda {
namespace {

// max(x, 0), which passes NaN on: one instruction since sm_80.
__device__ inline float relu(float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return activate<Activation::kRelu>(x, 0.0f);
#endif
}

template <class T>
struct Storage;  // two elements as a 32-bit word, and one alone

template <>
struct Storage<__half> {
  static __device__ float2 unpack(uint32_t word) {
    float2 pair;  // in assembly, because the compiler moves the halves about more than it need
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(word));
    return pair;
  }
  static __device__ uint32_t pack(float low, float high) {
    const __half2 halves = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&halves);
  }
  static __device__ uint32_t pack_relu(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return pack(relu(low), relu(high));
#endif
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
    float2 pair;  // in assembly, for the same reason
    asm("shl.b32 %0, %2, 16; and.b32 %1, %2, 0xffff0000;" : "=f"(pair.x), "=f"(pair.y) : "r"(word));
    return pair;
  }
  static __device__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 halves = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&halves);
  }
  static __device__ uint32_t pack_relu(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return pack(relu(low), relu(high));
#endif
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

// With kRelu, negative numbers become 0.
template <class T, bool kRelu = false>
__device__ RawPack<T> pack(const Floats& x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const auto quad = [&](int k) {
      const float* lane = x.lane + k;
      return kRelu ? float4{relu(lane[0]), relu(lane[1]), relu(lane[2]), relu(lane[3])}
                   : float4{lane[0], lane[1], lane[2], lane[3]};
    };
    return {quad(0), quad(4)};
  } else {
    const auto word = [&](int k) {
      return kRelu ? Storage<T>::pack_relu(x.lane[k], x.lane[k + 1])
                   : Storage<T>::pack(x.lane[k], x.lane[k + 1]);
    };
    return {{word(0), word(2), word(4), word(6)}};
  }
}

struct Pack {
  int64_t number;  // in the tensor

  template <class T, class Pointer>
  __device__ auto in(Pointer tensor) const {
    using To = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const T, T>;
    return static_cast<To*>(tensor) + number * kPackSize;
  }
};

// How a pack may be accessed: 16 bytes at a time...
struct WholePack : Pack {
  static constexpr uint32_t count = kPackSize;
};

// ... or as whatever it is: perhaps less than 8 elements (or none), perhaps not aligned.
struct AnyPack : Pack {
  uint32_t count;
  bool vector_access;

  // `left` elements are left there.
  template <class Count>
  __device__ AnyPack(int64_t number, Count left, bool aligned)
      : Pack{number},
        count(static_cast<uint32_t>(min(max(left, Count{0}), Count{kPackSize}))),
        vector_access(aligned && count == kPackSize) {}
};

// In assembly, because the compiler takes some of these accesses apart. A generic address of global
// memory is its address there as well.
__device__ inline uint4 load_quad(const uint4* from) {
  uint4 quad;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(quad.x), "=r"(quad.y), "=r"(quad.z), "=r"(quad.w)
               : "l"(from));
  return quad;
}
__device__ inline float4 load_quad(const float4* from) {
  float4 quad;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(quad.x), "=f"(quad.y), "=f"(quad.z), "=f"(quad.w)
               : "l"(from));
  return quad;
}
__device__ inline void store_quad(uint4* to, uint4 quad) {
  asm volatile(
      "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(quad.x), "r"(quad.y), "r"(quad.z),
      "r"(quad.w));
}
__device__ inline void store_quad(float4* to, float4 quad) {
  asm volatile(
      "st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(quad.x), "f"(quad.y), "f"(quad.z),
      "f"(quad.w));
}

template <class T>
__device__ RawPack<T> load(const void* tensor, WholePack at) {
  const void* from = at.template in<T>(tensor);
  if constexpr (sizeof(T) == sizeof(float)) {
    const float4* quads = static_cast<const float4*>(from);
    return {load_quad(quads), load_quad(quads + 1)};
  } else {
    return {load_quad(static_cast<const uint4*>(from))};
  }
}

template <class T, bool kRelu = false>
__device__ void store(void* tensor, WholePack at, const Floats& x) {
  void* to = at.template in<T>(tensor);
  const RawPack<T> raw = pack<T, kRelu>(x);
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
  if (at.vector_access) return load<T>(tensor, WholePack{{at.number}});
  const T* from = at.template in<T>(tensor);
  Floats x{};
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if (k < at.count) x.lane[k] = Storage<T>::load(from[k]);
  }
  return pack<T>(x);
}

template <class T, bool kRelu = false>
__device__ void store(void* tensor, AnyPack at, const Floats& x) {
  if (at.vector_access) return store<T, kRelu>(tensor, WholePack{{at.number}}, x);
  T* to = at.template in<T>(tensor);
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if (k < at.count) to[k] = Storage<T>::store(kRelu ? relu(x.lane[k]) : x.lane[k]);
  }
}

__device__ inline float load_float(const ChannelVector& vector, int64_t channel) {
  return static_cast<const float*>(vector.data)[channel];
}

__device__ inline float load_channel(const ChannelVector& vector, int64_t channel) {
  switch (vector.dtype) {
    case Dtype::kFloat: return load_float(vector, channel);
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
