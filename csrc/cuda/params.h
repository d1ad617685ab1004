// What the host hands to the CUDA kernels. Torch-free; travels by value.
#pragma once

#include <cstdint>

#include "../affine.h"
#include "../dtype.h"
#include "../launch_plan.h"

namespace frozen_bn::cuda {

// Blocks that fit a multiprocessor at the same time, at least: half of its threads.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
constexpr int kResidentBlocks = 3;
#else
constexpr int kResidentBlocks = 4;
#endif

// x / divisor for x < 2^31 by multiplication (Granlund & Montgomery, "Division by Invariant
// Integers using Multiplication", 1994).
struct FastDivisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
};

// The index model, ready for the device.
struct Index {
  int64_t numel;
  int64_t inner;
  int64_t channels;
  FastDivisor by_inner;     // periodic, and where not wide
  FastDivisor by_channels;  // likewise
  uint32_t tile_inner;      // min(inner, kTileSize)
  int64_t beyond_tile;      // inner - tile_inner
  FastDivisor by_tile_inner;
  // What can be accessed as vectors: none if a tensor is not aligned to 16 bytes.
  uint32_t whole_tiles;  // planar
  int64_t whole_packs;
  int64_t columns;
  bool wide;
  bool vector_access;
};

// [C], of any floating type.
struct ChannelVector {
  const void* data;  // or null
  Dtype dtype;
};

// What a branch is normalized with.
struct BranchVectors {
  ChannelVector mean, var, weight, bias;
  bool all_float;
  float eps;
};

struct ForwardParams {
  Index index;
  const void* input;
  const void* residual;  // or null
  void* output;
  uint8_t* mask;        // or null; one byte a pack
  float* coefficients;  // or null; [kRows, C]
  BranchVectors vectors;
  Activation activation;
  float negative_slope;
};

// Of a pair: the residual is never null, the coefficients are [kPairRows, C].
struct ForwardPairParams : ForwardParams {
  BranchVectors residual_vectors;
};

struct BackwardParams {
  Index index;
  const void* grad_output;
  const void* input;     // smooth activations, weight gradients; or null: no centered sums then
  const void* residual;  // smooth activations; or null
  const uint8_t* mask;   // piecewise-linear activations
  const float* coefficients;
  void* grad_input;     // or null
  void* grad_residual;  // or null
  float* partial_sums;  // or null; [partial_rows, 2, partial_width]
  int64_t partial_width;
  uint32_t segments;
  Activation activation;
  float negative_slope;
};

// Of a pair, likewise: smooth activations have both branches, and there are no sums.
struct BackwardPairParams : BackwardParams {};

struct ReduceParams {
  const float* partial_sums;  // [rows, 2, width]
  int64_t rows;
  int64_t width;
  int64_t run;  // neighbouring sums of one channel: inner where periodic, else 1
  int64_t channels;
  const float* inv_std;  // [C]
  void* grad_weight;     // or null
  void* grad_bias;       // or null
  Dtype weight_dtype;
  Dtype bias_dtype;
};

}  // namespace frozen_bn::cuda
