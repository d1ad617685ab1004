// The CUDA operators: device, stream, allocation, and the launch plan.
#include <torch/csrc/stable/accelerator.h>

#include "../ops.h"
#include "launch.h"

// Tests build these operators for CPU tensors, to run them on an emulated device.
#ifndef FROZEN_BN_LIBRARY
#define FROZEN_BN_LIBRARY frozen_bn
#define FROZEN_BN_DISPATCH_KEY CUDA
#define FROZEN_BN_FORCE_WIDE false
#endif

namespace frozen_bn::cuda {
namespace {

void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    fail(op, ": expected CUDA to succeed, but got ", cudaGetErrorString(error));
  }
}

// The element types that there are kernels for.
void check_kernel_dtype(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Double) {
    fail(op, ": expected ", name, " to be float16, bfloat16 or float32 on CUDA, but got float64");
  }
}

// Makes the tensor's device current while it lives.
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  int multiprocessors() const {
    int count = 0;
    check_cuda(
        "launch_plan", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

ChannelVector channel_vector(const OptionalTensor& t) {
  return t ? ChannelVector{t->data_ptr(), dtype_of(*t)} : ChannelVector{nullptr, Dtype::kFloat};
}

BranchVectors branch_vectors(const Statistics& s) {
  BranchVectors v{};
  v.mean = channel_vector(s.mean);
  v.var = channel_vector(s.var);
  v.weight = channel_vector(s.weight);
  v.bias = channel_vector(s.bias);
  v.all_float = true;
  for (const ChannelVector& vector : {v.mean, v.var, v.weight, v.bias}) {
    v.all_float &= vector.dtype == Dtype::kFloat;
  }
  v.eps = static_cast<float>(s.eps);
  return v;
}

bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
  });
}

void run_forward(const ForwardArguments& a, const Layout& layout) {
  const bool pair = a.residual_statistics.has_value();
  const char* op = pair ? "forward_pair" : "forward";
  check_kernel_dtype(op, "input", a.input);
  const Device device(a.input);
  if (layout.numel == 0) return;
  const LaunchPlan plan = plan_launch(layout, 0, FROZEN_BN_FORCE_WIDE);
  ForwardPairParams params{};
  params.input = a.input.data_ptr();
  params.residual = data_or_null(a.residual);
  params.output = a.output.data_ptr();
  params.mask = static_cast<uint8_t*>(data_or_null(a.mask));
  params.coefficients = static_cast<float*>(data_or_null(a.coefficients));
  params.vectors = branch_vectors(a.statistics);
  if (pair) params.residual_vectors = branch_vectors(*a.residual_statistics);
  params.activation = a.activation;
  params.negative_slope = static_cast<float>(a.negative_slope);
  params.index =
      make_index(layout, plan, is_aligned({params.input, params.residual, params.output}));
  const auto launch = [&](auto launcher) {
    check_cuda(op, launcher(dtype_of(a.input), plan, params, device.stream()));
  };
  pair ? launch(launch_forward_pair) : launch(launch_forward);
}

void reduce_partial_sums(
    const BackwardArguments& a, const BackwardParams& backward, const Layout& layout,
    const LaunchPlan& plan, cudaStream_t stream) {
  ReduceParams params{};
  params.partial_sums = backward.partial_sums;
  params.rows = plan.partial_rows;
  params.width = plan.partial_width;
  params.run = plan.variant == Variant::kPlanar ? 1 : layout.inner;
  params.channels = layout.channels;
  params.inv_std = backward.coefficients + kInvStd * layout.channels;
  params.grad_weight = data_or_null(a.grad_weight);
  params.grad_bias = data_or_null(a.grad_bias);
  if (a.grad_weight) params.weight_dtype = dtype_of(*a.grad_weight);
  if (a.grad_bias) params.bias_dtype = dtype_of(*a.grad_bias);
  check_cuda("backward", launch_reduce(params, stream));
}

void run_backward(const BackwardArguments& a, const Layout& layout) {
  check_kernel_dtype("backward", "grad_output", a.grad_output);
  const Device device(a.grad_output);
  if (layout.numel == 0) {
    for (OptionalTensor gradient : {a.grad_weight, a.grad_bias}) {
      if (gradient) torch::stable::zero_(*gradient);
    }
    return;
  }
  const bool wants_sums = a.grad_weight || a.grad_bias;
  const LaunchPlan plan =
      plan_launch(layout, wants_sums ? device.multiprocessors() : 0, FROZEN_BN_FORCE_WIDE);
  OptionalTensor partial_sums;
  if (wants_sums) {
    partial_sums = torch::stable::new_empty(
        a.coefficients, {plan.partial_rows, 2, plan.partial_width}, ScalarType::Float);
  }
  BackwardPairParams params{};
  params.grad_output = a.grad_output.data_ptr();
  params.input = needs_input(a.activation) || a.grad_weight ? data_or_null(a.input) : nullptr;
  params.residual = needs_input(a.activation) ? data_or_null(a.residual) : nullptr;
  params.mask = static_cast<const uint8_t*>(data_or_null(a.mask));
  params.coefficients = static_cast<const float*>(a.coefficients.data_ptr());
  params.grad_input = data_or_null(a.grad_input);
  params.grad_residual = data_or_null(a.grad_residual);
  params.partial_sums = static_cast<float*>(data_or_null(partial_sums));
  params.partial_width = plan.partial_width;
  params.segments = static_cast<uint32_t>(plan.segments);
  params.activation = a.activation;
  params.negative_slope = static_cast<float>(a.negative_slope);
  params.index = make_index(
      layout, plan,
      is_aligned(
          {params.grad_output, params.input, params.residual, params.grad_input,
           params.grad_residual}));
  const auto launch = [&](auto launcher) {
    check_cuda("backward", launcher(dtype_of(a.grad_output), plan, params, device.stream()));
  };
  a.pair() ? launch(launch_backward_pair) : launch(launch_backward);
  if (wants_sums) reduce_partial_sums(a, params, layout, plan, device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FROZEN_BN_LIBRARY, FROZEN_BN_DISPATCH_KEY, library) {
  Operators<run_forward, run_backward>::register_in(library);
}

}  // namespace frozen_bn::cuda
