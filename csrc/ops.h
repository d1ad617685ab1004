// The operators, as far as both backends agree: arguments -> checks -> dense tensors -> the
// backend's kernels. They write to tensors that the caller allocated. A backend supplies two
// functions, `run_forward` and `run_backward`, and registers `Operators<run_forward,
// run_backward>`.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>

#include "checks.h"

namespace frozen_bn {

using OptionalTensor = std::optional<Tensor>;

// What a branch is normalized with.
struct Statistics {
  Tensor mean;  // [C], like the three after it; any supported dtype
  Tensor var;
  OptionalTensor weight;
  OptionalTensor bias;
  double eps;
};

struct ForwardArguments {
  Tensor input;  // [N, C, ...]
  Statistics statistics;
  OptionalTensor residual;                        // like input
  std::optional<Statistics> residual_statistics;  // of a pair
  Activation activation;
  double negative_slope;
  Tensor output;                // like input, or input itself
  OptionalTensor coefficients;  // [kRows, C], of a pair [kPairRows, C]: for the backward
  OptionalTensor mask;          // uint8 [ceil(numel / 8)], in the order of output's storage
};

struct BackwardArguments {
  Tensor grad_output;       // [N, C, ...]
  Tensor coefficients;      // [kRows, C], or [kPairRows, C]
  OptionalTensor mask;      // piecewise-linear activations
  OptionalTensor input;     // smooth activations, weight gradients
  OptionalTensor residual;  // smooth activations
  Activation activation;
  double negative_slope;
  // The gradients wanted.
  OptionalTensor grad_input;
  OptionalTensor grad_weight;  // [C], any supported dtype
  OptionalTensor grad_bias;
  OptionalTensor grad_residual;

  bool pair() const {
    return coefficients.dim() == 2 && coefficients.size(0) == kPairRows;
  }
};

struct StatisticsNames {
  const char *mean, *var, *weight, *bias, *eps;
};
constexpr StatisticsNames kInputNames{"running_mean", "running_var", "weight", "bias", "eps"};
constexpr StatisticsNames kResidualNames{
    "residual_mean", "residual_var", "residual_weight", "residual_bias", "residual_eps"};

inline void check(
    const char* op, const StatisticsNames& names, const Statistics& s, const Tensor& input) {
  check_channel_vector(op, names.mean, s.mean, input);
  check_channel_vector(op, names.var, s.var, input);
  if (s.weight) check_channel_vector(op, names.weight, *s.weight, input);
  if (s.bias) check_channel_vector(op, names.bias, *s.bias, input);
  check_eps(op, names.eps, s.eps);
}

inline void check(const char* op, const ForwardArguments& a) {
  check_rank(op, "input", a.input);
  check_dtype(op, "input", a.input);
  check(op, kInputNames, a.statistics, a.input);
  if (a.residual) check_like(op, "residual", *a.residual, a.input);
  const bool pair = a.residual_statistics.has_value();
  if (pair) check(op, kResidualNames, *a.residual_statistics, a.input);
  check_like(op, "output", a.output, a.input);
  check_not_expanded(op, "output", a.output);
  if (a.coefficients) check_coefficients(op, *a.coefficients, a.input, pair);
  if (a.mask) check_mask(op, *a.mask, a.input);
}

inline void check(const char* op, const BackwardArguments& a) {
  const Tensor& like = a.grad_output;
  check_rank(op, "grad_output", like);
  check_dtype(op, "grad_output", like);
  check_coefficients(op, a.coefficients, like, a.pair());
  if (a.pair()) {
    check_not_given(op, "grad_weight", a.grad_weight);
    check_not_given(op, "grad_bias", a.grad_bias);
    if (needs_input(a.activation)) check_given(op, "residual", a.residual);
  }
  if (needs_mask(a.activation)) {
    check_given(op, "mask", a.mask);
    check_mask(op, *a.mask, like);
    check_given(op, "grad_input", a.grad_input);  // the mask is in the order of its storage
  }
  if (needs_input(a.activation) || a.grad_weight) check_given(op, "input", a.input);
  if (a.input) check_like(op, "input", *a.input, like);
  if (a.residual) check_like(op, "residual", *a.residual, like);
  if (a.grad_input) check_like(op, "grad_input", *a.grad_input, like);
  if (a.grad_residual) check_like(op, "grad_residual", *a.grad_residual, like);
  if (a.grad_input) check_not_expanded(op, "grad_input", *a.grad_input);
  if (a.grad_residual) check_not_expanded(op, "grad_residual", *a.grad_residual);
  if (a.grad_weight) check_channel_gradient(op, "grad_weight", *a.grad_weight, like);
  if (a.grad_bias) check_channel_gradient(op, "grad_bias", *a.grad_bias, like);
}

inline void close_gaps(Statistics& s) {
  s.mean = gapless(s.mean);
  s.var = gapless(s.var);
  if (s.weight) s.weight = gapless(*s.weight);
  if (s.bias) s.bias = gapless(*s.bias);
}

// Gives what is indexed alike the same gapless strides, and closes the gaps of channel vectors.
inline Layout make_alike(ForwardArguments& a) {
  std::optional<Layout> layout = dense_layout(a.output);
  if (!layout) {
    a.output = make_dense(a.output);
    layout = dense_layout(a.output);
  }
  a.input = with_strides_of(a.output, a.input);
  if (a.residual) a.residual = with_strides_of(a.output, *a.residual);
  close_gaps(a.statistics);
  if (a.residual_statistics) close_gaps(*a.residual_statistics);
  return *layout;
}

inline Layout make_alike(BackwardArguments& a) {
  const Tensor& like = a.grad_input      ? *a.grad_input
                       : a.grad_residual ? *a.grad_residual
                       : a.input         ? *a.input
                                         : a.grad_output;
  const Tensor dense = dense_layout(like) ? like : make_dense(like);
  a.grad_output = with_strides_of(dense, a.grad_output);
  if (a.input) a.input = with_strides_of(dense, *a.input);
  if (a.residual) a.residual = with_strides_of(dense, *a.residual);
  if (a.grad_input) a.grad_input = with_strides_of(dense, *a.grad_input);
  if (a.grad_residual) a.grad_residual = with_strides_of(dense, *a.grad_residual);
  return *dense_layout(dense);
}

inline void copy_back(const OptionalTensor& result, const OptionalTensor& to) {
  if (to && result->data_ptr() != to->data_ptr()) {
    Tensor target = *to;
    torch::stable::copy_(target, *result);
  }
}

template <auto run_forward, auto run_backward>
struct Operators {
  static void forward(
      const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
      double eps, int64_t activation, double negative_slope, const Tensor& output,
      const OptionalTensor& coefficients, const OptionalTensor& mask) {
    run("forward", output,
        {input,
         {running_mean, running_var, weight, bias, eps},
         residual,
         std::nullopt,
         check_activation("forward", activation),
         negative_slope,
         output,
         coefficients,
         mask});
  }

  static void forward_pair(
      const Tensor& input, const Tensor& running_mean, const Tensor& running_var,
      const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& residual,
      const Tensor& residual_mean, const Tensor& residual_var,
      const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
      double residual_eps, int64_t activation, double negative_slope, const Tensor& output,
      const OptionalTensor& coefficients, const OptionalTensor& mask) {
    run("forward_pair", output,
        {input,
         {running_mean, running_var, weight, bias, eps},
         residual,
         Statistics{residual_mean, residual_var, residual_weight, residual_bias, residual_eps},
         check_activation("forward_pair", activation),
         negative_slope,
         output,
         coefficients,
         mask});
  }

  static void backward(
      const Tensor& grad_output, const Tensor& coefficients, const OptionalTensor& mask,
      const OptionalTensor& input, const OptionalTensor& residual, int64_t activation,
      double negative_slope, const OptionalTensor& grad_input, const OptionalTensor& grad_weight,
      const OptionalTensor& grad_bias, const OptionalTensor& grad_residual) {
    BackwardArguments a{grad_output,    coefficients, mask,
                        input,          residual,     check_activation("backward", activation),
                        negative_slope, grad_input,   grad_weight,
                        grad_bias,      grad_residual};
    check("backward", a);
    run_backward(a, make_alike(a));
    copy_back(a.grad_input, grad_input);
    copy_back(a.grad_residual, grad_residual);
  }

  static void register_in(torch::stable::detail::StableLibrary& library) {
    library.impl("forward", TORCH_BOX(&forward));
    library.impl("forward_pair", TORCH_BOX(&forward_pair));
    library.impl("backward", TORCH_BOX(&backward));
  }

 private:
  static void run(const char* op, const Tensor& output, ForwardArguments a) {
    check(op, a);
    run_forward(a, make_alike(a));
    copy_back(a.output, output);
  }
};

}  // namespace frozen_bn
