// The operator schemas, and the Python module _C: what was built, and hooks for the tests.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "built.h"  // written by setup.py
#include "cpu/kernels.h"
#include "launch_plan.h"

STABLE_TORCH_LIBRARY(frozen_bn, library) {
  // output = act((input - running_mean) * weight / sqrt(running_var + eps) + bias + residual),
  // and what backward takes of it: coefficients and, for a piecewise-linear activation, mask.
  library.def(
      "forward(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight,"
      " Tensor? bias, Tensor? residual, float eps, int activation, float negative_slope,"
      " Tensor(a!) output, Tensor(b!)? coefficients, Tensor(c!)? mask) -> ()");
  // The same of a residual that is normalized as well, with its own statistics, in one pass.
  library.def(
      "forward_pair(Tensor input, Tensor running_mean, Tensor running_var, Tensor? weight,"
      " Tensor? bias, float eps, Tensor residual, Tensor residual_mean, Tensor residual_var,"
      " Tensor? residual_weight, Tensor? residual_bias, float residual_eps, int activation,"
      " float negative_slope, Tensor(a!) output, Tensor(b!)? coefficients, Tensor(c!)? mask)"
      " -> ()");
  // Of either, told apart by the coefficients: the gradients that are given a tensor. With a mask,
  // grad_input is always one of them.
  library.def(
      "backward(Tensor grad_output, Tensor coefficients, Tensor? mask, Tensor? input,"
      " Tensor? residual, int activation, float negative_slope, Tensor(a!)? grad_input,"
      " Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? grad_residual) -> ()");
}

PYBIND11_MODULE(_C, module) {
  namespace cpu = frozen_bn::cpu;
  module.doc() =
      "Build information and test hooks of frozen_bn; the operators are torch.ops.frozen_bn.";
  module.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = FROZEN_BN_BUILT_TORCH;
    info["cuda"] = FROZEN_BN_BUILT_CUDA;
    info["architectures"] = FROZEN_BN_BUILT_ARCHITECTURES;
    info["why"] = FROZEN_BN_BUILT_WHY;
    info["compiler"] = __VERSION__;
    return info;
  });
  module.def(
      "launch_plan",
      [](int64_t numel, int64_t channels, int64_t inner, int summing) {
        const auto plan = frozen_bn::plan_launch({numel, channels, inner}, summing);
        pybind11::dict fields;
        fields["variant"] = plan.variant == frozen_bn::Variant::kPlanar ? "planar" : "periodic";
        fields["wide"] = plan.wide;
        fields["grid"] = pybind11::make_tuple(plan.grid_x, plan.grid_y);
        fields["block"] = pybind11::make_tuple(plan.block_x, plan.block_y);
        fields["columns"] = plan.columns;
        fields["segments"] = plan.segments;
        fields["partial_rows"] = plan.partial_rows;
        fields["partial_width"] = plan.partial_width;
        return fields;
      },
      pybind11::arg("numel"), pybind11::arg("channels"), pybind11::arg("inner"),
      pybind11::arg("summing"));
  module.def("cpu_level", [] { return std::string(cpu::level()); });
  module.def("select_cpu_level", [](const std::string& name) {
    if (!cpu::select_kernels(name.c_str())) {
      throw pybind11::value_error(
          "frozen_bn: expected a CPU level that this machine can run "
          "(portable, avx2, avx512, avx512_bf16), but got " +
          name);
    }
  });
}
