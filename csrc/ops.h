// The operators, as far as both backends agree: the order of work is arguments -> checks -> dense
// tensors -> the backend's kernels. A backend supplies two functions, `run_forward` and
// `run_backward`, and registers `Operators<run_forward, run_backward>`.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace frozen_bn {

struct ForwardArguments {
  Tensor input;         // [N, C, ...]
  Tensor running_mean;  // [C], like the three after it; any supported dtype
  Tensor running_var;
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  std::optional<Tensor> residual;  // like input
  double eps;
  Activation activation;
  double negative_slope;
  bool save;  // what the backward needs
};

struct Saved {
  std::optional<Tensor> coefficients;
  std::optional<Tensor> mask;  // uint8 [ceil(numel / 8)], in storage order
};

struct BackwardArguments {
  Tensor grad_output;              // [N, C, ...]
  Tensor coefficients;             // [kRows, C]
  std::optional<Tensor> mask;      // piecewise-linear activations
  std::optional<Tensor> input;     // smooth activations, weight gradients
  std::optional<Tensor> residual;  // smooth activations
  Activation activation;
  double negative_slope;
};

// Which gradients to compute. Tensors in: allocated, dense. The backend writes them.
struct Gradients {
  std::optional<Tensor> input;
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  std::optional<Tensor> residual;
};

inline ScalarType accumulate_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Saved allocate_saved(const ForwardArguments& a, const Layout& layout) {
  Saved saved;
  if (!a.save) return saved;
  saved.coefficients =
      empty_contiguous({kRows, layout.channels}, accumulate_dtype(a.input), a.input);
  if (needs_mask(a.activation)) {
    saved.mask = empty_contiguous({ceil_div(layout.numel, 8)}, ScalarType::Byte, a.input);
  }
  return saved;
}

inline void check(const char* op, const ForwardArguments& a) {
  check_rank(op, "input", a.input);
  check_dtype(op, "input", a.input);
  check_channel_vector(op, "running_mean", a.running_mean, a.input);
  check_channel_vector(op, "running_var", a.running_var, a.input);
  check_channel_vector(op, "weight", a.weight, a.input);
  check_channel_vector(op, "bias", a.bias, a.input);
  check_like(op, "residual", a.residual, a.input);
  check_eps(op, a.eps);
}

inline void check(const char* op, const BackwardArguments& a, bool weight_gradient) {
  check_rank(op, "grad_output", a.grad_output);
  check_dtype(op, "grad_output", a.grad_output);
  check_coefficients(op, a.coefficients, a.grad_output);
  check_like(op, "input", a.input, a.grad_output);
  check_like(op, "residual", a.residual, a.grad_output);
  if (needs_mask(a.activation)) check_mask(op, a.mask, a.grad_output);
  if ((needs_input(a.activation) || weight_gradient) && !a.input) {
    fail(op, ": expected input, but got None");
  }
}

// Makes the input dense, gives what is indexed with it the same strides, and closes the gaps of
// the channel vectors.
inline void make_alike(ForwardArguments& a) {
  if (!dense_layout(a.input)) a.input = make_dense(a.input);
  if (a.residual) a.residual = with_strides(*a.residual, strides_of(a.input));
  a.running_mean = gapless(a.running_mean);
  a.running_var = gapless(a.running_var);
  a.weight = gapless(a.weight);
  a.bias = gapless(a.bias);
}

inline void make_alike(BackwardArguments& a, const std::vector<int64_t>& strides) {
  a.grad_output = with_strides(a.grad_output, strides);
  if (a.input) a.input = with_strides(*a.input, strides);
  if (a.residual) a.residual = with_strides(*a.residual, strides);
}

template <auto run_forward, auto run_backward>
struct Operators {
  using OptionalTensor = std::optional<Tensor>;

  static std::tuple<Tensor, OptionalTensor, OptionalTensor> forward(
      Tensor input,
      Tensor running_mean,
      Tensor running_var,
      OptionalTensor weight,
      OptionalTensor bias,
      OptionalTensor residual,
      double eps,
      int64_t activation,
      double negative_slope,
      bool save) {
    const char* op = "forward";
    ForwardArguments a{
        input, running_mean, running_var, weight, bias, residual, eps,
        check_activation(op, activation), negative_slope, save};
    check(op, a);
    make_alike(a);
    Tensor output = empty_dense(a.input);
    Saved saved = run_forward(a, *dense_layout(a.input), output);
    return {output, saved.coefficients, saved.mask};
  }

  static std::tuple<OptionalTensor, OptionalTensor> forward_(
      Tensor input,
      Tensor running_mean,
      Tensor running_var,
      OptionalTensor weight,
      OptionalTensor bias,
      OptionalTensor residual,
      double eps,
      int64_t activation,
      double negative_slope,
      bool save) {
    const char* op = "forward";
    ForwardArguments a{
        input, running_mean, running_var, weight, bias, residual, eps,
        check_activation(op, activation), negative_slope, save};
    check(op, a);
    check_not_expanded(op, "input", input);
    make_alike(a);
    Saved saved = run_forward(a, *dense_layout(a.input), a.input);
    if (a.input.data_ptr() != input.data_ptr()) torch::stable::copy_(input, a.input);
    return {saved.coefficients, saved.mask};
  }

  // `strides` are those of the forward's output; the gradients get them too.
  static std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> backward(
      Tensor grad_output,
      Tensor coefficients,
      OptionalTensor mask,
      OptionalTensor input,
      OptionalTensor residual,
      std::vector<int64_t> strides,
      int64_t activation,
      double negative_slope,
      bool input_gradient,
      std::optional<ScalarType> weight_gradient,
      std::optional<ScalarType> bias_gradient,
      bool residual_gradient) {
    const char* op = "backward";
    BackwardArguments a{
        grad_output, coefficients, mask, input, residual,
        check_activation(op, activation), negative_slope};
    check(op, a, weight_gradient.has_value());
    make_alike(a, check_strides(op, strides, grad_output));
    const std::vector<int64_t> channels{grad_output.size(1)};
    Gradients gradients;
    if (input_gradient) gradients.input = empty_dense(a.grad_output);
    if (residual_gradient) gradients.residual = empty_dense(a.grad_output);
    if (weight_gradient) {
      gradients.weight = empty_contiguous(channels, *weight_gradient, grad_output);
    }
    if (bias_gradient) gradients.bias = empty_contiguous(channels, *bias_gradient, grad_output);
    run_backward(a, *dense_layout(a.grad_output), gradients);
    return {gradients.input, gradients.weight, gradients.bias, gradients.residual};
  }

  static void register_in(torch::stable::detail::StableLibrary& library) {
    library.impl("forward", TORCH_BOX(&forward));
    library.impl("forward_", TORCH_BOX(&forward_));
    library.impl("backward", TORCH_BOX(&backward));
  }
};

}  // namespace frozen_bn
