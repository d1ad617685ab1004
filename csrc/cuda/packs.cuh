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
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
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
  uint4 quads[sizeof(T) * kPackSize / sizeof(uint4)];
};

struct Floats {
  float lane[kPackSize];
};

template <class T>
__device__ Floats unpack(const RawPack<T>& raw) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&raw);
  Floats x;
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if constexpr (sizeof(T) == sizeof(float)) {
      x.lane[k] = __uint_as_float(words[k]);
    } else if (k % 2 == 0) {
      const float2 pair = Storage<T>::unpack(words[k / 2]);
      x.lane[k] = pair.x;
      x.lane[k + 1] = pair.y;
    }
  }
  return x;
}

template <class T>
__device__ RawPack<T> pack(const Floats& x) {
  RawPack<T> raw;
  uint32_t* words = reinterpret_cast<uint32_t*>(&raw);
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if constexpr (sizeof(T) == sizeof(float)) {
      words[k] = __float_as_uint(x.lane[k]);
    } else if (k % 2 == 0) {
      words[k / 2] = Storage<T>::pack(x.lane[k], x.lane[k + 1]);
    }
  }
  return raw;
}

// Which elements a thread is at: the first, and how many of the 8 there are.
struct Position {
  int64_t element;
  int count;
};

__device__ inline Position position_at(int64_t element, int64_t numel) {
  const int64_t left = numel - element;
  return {element, left >= kPackSize ? kPackSize : (left > 0 ? static_cast<int>(left) : 0)};
}

// Lanes beyond the count read as 0.
template <class T>
__device__ RawPack<T> load(const void* tensor, Position at, bool vector_access) {
  const T* from = static_cast<const T*>(tensor) + at.element;
  if (vector_access && at.count == kPackSize) return *reinterpret_cast<const RawPack<T>*>(from);
  Floats x{};
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if (k < at.count) x.lane[k] = Storage<T>::load(from[k]);
  }
  return pack<T>(x);
}

template <class T>
__device__ void store(void* tensor, Position at, bool vector_access, const Floats& x) {
  T* to = static_cast<T*>(tensor) + at.element;
  if (vector_access && at.count == kPackSize) {
    *reinterpret_cast<RawPack<T>*>(to) = pack<T>(x);
    return;
  }
#pragma unroll
  for (int k = 0; k < kPackSize; ++k) {
    if (k < at.count) to[k] = Storage<T>::store(x.lane[k]);
  }
}

__device__ inline float load_channel(const ChannelVector& vector, int64_t channel, float missing) {
  if (!vector.data) return missing;
  switch (vector.dtype) {
    case Dtype::kHalf: return __half2float(static_cast<const __half*>(vector.data)[channel]);
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(vector.data)[channel]);
    case Dtype::kDouble:
      return static_cast<float>(static_cast<const double*>(vector.data)[channel]);
    default: return static_cast<const float*>(vector.data)[channel];
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
