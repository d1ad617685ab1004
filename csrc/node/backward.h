// The autograd node of one branch and of two.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <mutex>
#include <string>
#include <utility>

#include "compat.h"
#include "operators.h"

namespace frozen_bn {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Functions of the package's Python, set once it is imported. Never freed: the process ends first.
struct Python {
  PyObject* run = nullptr;            // functional._run
  PyObject* run_pair = nullptr;       // pair._run
  PyObject* backward = nullptr;       // functional._differentiable_backward
  PyObject* pair_backward = nullptr;  // pair._differentiable_backward
  PyObject* check_inplace = nullptr;  // checks.check_inplace
  PyObject* check_history = nullptr;  // checks.check_history
  PyObject* codes = nullptr;          // functional._CODES: of activations
  PyObject* cuda = nullptr;           // whether there are kernels for it
};

inline Python& python() {
  static Python functions;
  return functions;
}

inline THPObjectPtr to_python(const Tensor& t) {
  if (!t.defined()) return THPObjectPtr(Py_NewRef(Py_None));
  return THPObjectPtr(THPVariable_Wrap(t));
}

// Of the node, in this order.
enum Gradient : size_t { kOfInput, kOfWeight, kOfBias, kOfResidual, kGradients };

struct BackwardNode final : Node {
  // What the forward leaves behind. `input` only where the gradient of the weight or of a smooth
  // activation needs it, `residual` for a smooth one. The others are undefined where there is no
  // use for them.
  struct Saved {
    Tensor coefficients, mask, input, residual;
    Tensor weight, bias;  // for the second derivative
  };

  // What stays the same.
  struct Plan {
    bool pair = false;
    int64_t code = 0;
    double negative_slope = 0;
    bool shares = false;  // the gradient of the residual is one that exists anyway
    at::DimVector strides;
    std::optional<at::ScalarType> weight_dtype, bias_dtype;  // where their gradient is wanted
  };

  Plan plan;

  void save(const Saved& s) {
    // In the order in which saved-tensor hooks have always seen them.
    const Tensor* const tensors[] = {&s.coefficients, &s.mask,   &s.input,
                                     &s.residual,     &s.weight, &s.bias};
    for (size_t i = 0; i < kSaved; ++i) {
      if (tensors[i]->defined()) saved_[i].emplace(*tensors[i], false);
    }
  }

  std::string name() const override {
    return plan.pair ? "FrozenBatchNormPairBackward" : "FrozenBatchNormBackward";
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : saved_) {
      if (saved) saved->reset_data();
    }
  }

  variable_list apply(variable_list&& gradients) override {
    Tensor grad_output = std::move(gradients[0]);
    if (!grad_output.defined()) return variable_list(kGradients);
    Saved saved = unpack();
    if (at::GradMode::is_enabled() || !is_ordinary(grad_output)) {
      return differentiable(grad_output, saved);
    }
    const BelowAutograd guard;
    return by_the_kernels(std::move(grad_output), saved);
  }

  // Compiled autograd would have to be handed a function to trace.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "frozen_bn: compiled autograd cannot look into ", name(),
        "; expected FROZEN_BN_NODE=0 in the environment, which chooses a node in Python");
  }

 private:
  static constexpr size_t kSaved = 6;
  std::optional<SavedVariable> saved_[kSaved];
  std::mutex mutex_;  // of what is saved: another thread may release it

  Saved unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto tensor = [&](size_t i) { return saved_[i] ? saved_[i]->unpack() : Tensor(); };
    return {tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5)};
  }

  // Whether nobody would notice if it was written over: no other tensor, storage or foreign memory
  // (NumPy's, say) holds these bytes. The rule by which torch itself accumulates in place.
  static bool is_ours(const Tensor& t) {
    return is_nobody_elses(t) && t.is_non_overlapping_and_dense() && !t.is_inference() &&
           t.storage().use_count() == 1 &&
           t.storage().unsafeGetStorageImpl()->allocator() != nullptr;
  }

  variable_list by_the_kernels(Tensor&& grad_output, const Saved& saved) {
    const bool with_input = task_should_compute_output(kOfInput);
    const bool with_residual = task_should_compute_output(kOfResidual);
    const bool plain = plan.code == 0;
    const auto like_output = [&] {
      return make(grad_output.sizes(), plan.strides, grad_output.scalar_type(), grad_output);
    };
    variable_list results(kGradients);
    Tensor& grad_input = results[kOfInput];
    Tensor& grad_residual = results[kOfResidual];
    if (plan.weight_dtype && task_should_compute_output(kOfWeight)) {
      results[kOfWeight] = make({grad_output.size(1)}, *plan.weight_dtype, grad_output);
    }
    if (plan.bias_dtype && task_should_compute_output(kOfBias)) {
      results[kOfBias] = make({grad_output.size(1)}, *plan.bias_dtype, grad_output);
    }
    // With a mask always: it is in the order of its storage.
    if (with_input || saved.mask.defined() || (with_residual && plan.shares && !plain)) {
      const bool handed_on = plain && plan.shares && with_residual;
      const bool over = !handed_on && is_ours(grad_output) && grad_output.strides() == plan.strides;
      grad_input = over ? grad_output : like_output();
    }
    if (with_residual && !plan.shares) grad_residual = like_output();
    Call call(backward_operator());
    call << &grad_output << &saved.coefficients << saved.mask << saved.input << saved.residual
         << plan.code << plan.negative_slope << grad_input << results[kOfWeight] << results[kOfBias]
         << grad_residual;
    call.run();
    if (with_residual && plan.shares) grad_residual = plain ? std::move(grad_output) : grad_input;
    if (!with_input) grad_input.reset();
    return results;
  }

  // By the formula in Python, which autograd and vmap can look into.
  variable_list differentiable(const Tensor& grad_output, const Saved& saved) {
    const pybind11::gil_scoped_acquire gil;
    const size_t dimensions = plan.strides.size();
    THPObjectPtr strides(PyTuple_New(static_cast<Py_ssize_t>(dimensions)));
    for (size_t d = 0; d < dimensions; ++d) {
      PyTuple_SET_ITEM(strides.get(), d, PyLong_FromLongLong(plan.strides[d]));
    }
    THPObjectPtr tensors[] = {to_python(grad_output),    to_python(saved.coefficients),
                              to_python(saved.mask),     to_python(saved.input),
                              to_python(saved.residual), to_python(saved.weight),
                              to_python(saved.bias)};
    THPObjectPtr code(PyLong_FromLongLong(plan.code));
    THPObjectPtr slope(PyFloat_FromDouble(plan.negative_slope));
    THPObjectPtr given(PyTuple_Pack(
        10, tensors[0].get(), tensors[1].get(), tensors[2].get(), tensors[3].get(),
        tensors[4].get(), tensors[5].get(), tensors[6].get(), strides.get(), code.get(),
        slope.get()));
    THPObjectPtr found(PyObject_Call(
        plan.pair ? python().pair_backward : python().backward, given.get(), nullptr));
    if (!found) {
      python_error error;
      error.persist();
      throw error;
    }
    variable_list results(kGradients);
    for (size_t i = 0; i < kGradients; ++i) {
      PyObject* const result = PyTuple_GET_ITEM(found.get(), i);
      if (result != Py_None && task_should_compute_output(i)) {
        results[i] = THPVariable_Unpack(result);
      }
    }
    if (results[kOfWeight].defined())
      results[kOfWeight] = results[kOfWeight].to(*plan.weight_dtype);
    if (results[kOfBias].defined()) results[kOfBias] = results[kOfBias].to(*plan.bias_dtype);
    return results;
  }
};

}  // namespace frozen_bn
