// What the CPU operators hand to the kernels, and the kernels there are: one set for each
// instruction set, chosen at run time. Torch-free.
#pragma once

#include <cstdint>

#include "../affine.h"
#include "../dtype.h"
#include "../layout.h"

namespace frozen_bn::cpu {

// Rows of channel coefficients, in float (double for a double input). Where `period` is not 0,
// they have been spread over the flat storage instead: entry j belongs to the elements i with
// i % period == j, and the first kMaxLanes entries are repeated at the end, so that a pack can
// start anywhere.
struct Coefficients {
  const void* row[kPairRows];  // the first row_count(pair), numbered as in the coefficients tensor
  bool pair;
  int64_t period;
};
constexpr int64_t row_count(bool pair) {
  return pair ? int64_t{kPairRows} : int64_t{kBias} + 1;
}
constexpr int64_t kMaxLanes = 16;

// Ranges of flat elements that one thread works on start at multiples of this.
constexpr int64_t kRangeAlignment = 64;

// A pack of the kernels spans at most two channels when `inner` is at least this; below it, the
// coefficients are spread.
constexpr int64_t kMinInner = kMaxLanes;

struct ForwardParams {
  const void* input;
  const void* residual;  // or null; never of a pair
  void* output;
  uint8_t* mask;  // or null; bit i % 8 of byte i / 8 is set where the gradient is blocked
  Layout layout;
  Coefficients coefficients;
  Activation activation;
  double negative_slope;
  bool stream;
};

struct BackwardParams {
  const void* grad_output;
  const uint8_t* mask;   // piecewise-linear activations
  const void* input;     // smooth activations, weight gradients; or null
  const void* residual;  // smooth activations; or null
  void* grad_input;      // or null
  void* grad_residual;   // or null
  Layout layout;
  Coefficients coefficients;
  Activation activation;
  double negative_slope;
  bool stream;
};

// Sums over one thread's range, [channels] each: of the gradient g behind the activation, and of
// g * (input - mean). Null where not asked for. The other two are working space where the
// coefficients are spread: 2 * (period + kMaxLanes) zeros each.
struct ChannelSums {
  double* g;
  double* g_centered;
  double* spread;
  void* spread_few;  // in float (double for a double input)
};

// In double, so that each coefficient is rounded only once.
struct CoefficientParams {
  const double* var;     // [channels]
  const double* weight;  // [channels]
  void* scale;           // out: weight / sqrt(var + eps), float (double for a double input)
  void* inv_std;         // out: 1 / sqrt(var + eps), likewise
  int64_t channels;
  double eps;
};

struct Kernels {
  const char* name;
  void (*coefficients)(Dtype, const CoefficientParams&);
  void (*forward)(Dtype, const ForwardParams&, int64_t begin, int64_t end);
  void (*backward)(Dtype, const BackwardParams&, int64_t begin, int64_t end, ChannelSums);
};

// The best of the machine for the type, unless others were selected. Those for float64, which is
// there for gradient checks, are compiled for any machine and no other; and what AVX-512 BF16 adds
// concerns bfloat16 alone.
const Kernels& kernels(Dtype dtype);

// The name of the best, or of those selected.
const char* level();

// "portable", "avx2", "avx512" or "avx512_bf16"; false if this machine cannot run it.
bool select_kernels(const char* name);

}  // namespace frozen_bn::cpu
