// The forward pass of one branch and of two, recorded where a gradient is wanted.
#pragma once

#include <ATen/ops/clone.h>

#include <algorithm>

#include "backward.h"

namespace frozen_bn {

// What a branch is normalized with; pointers to tensors, null for None.
struct Statistics {
  const Tensor *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  double eps = 0;

  bool is_constant() const {
    return !mean->requires_grad() && !var->requires_grad();
  }
};

struct Arguments {
  const Tensor* input = nullptr;  // [N, C, ...]
  Statistics statistics;
  const Tensor* residual = nullptr;
  bool pair = false;
  Statistics residual_statistics;  // of a pair
  int64_t code = 0;
  double negative_slope = 0;
  bool inplace = false;
  bool identity = false;  // the statistics are those of one

  const char* operator_name() const {
    return pair ? "forward_pair" : "forward";
  }
  bool is_smooth() const {
    return needs_input(static_cast<Activation>(code));
  }
  bool is_masked() const {
    return needs_mask(static_cast<Activation>(code));
  }
  // Of a pair, there are no gradients of these.
  bool trains_weight() const {
    return !pair && statistics.weight && statistics.weight->requires_grad();
  }
  bool trains_bias() const {
    return !pair && statistics.bias && statistics.bias->requires_grad();
  }
  bool is_recorded() const {
    return at::GradMode::is_enabled() &&
           (input->requires_grad() || (residual && residual->requires_grad()) || trains_weight() ||
            trains_bias());
  }
};

class ReleaseGil {
 public:
  explicit ReleaseGil(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~ReleaseGil() {
    if (state_) PyEval_RestoreThread(state_);
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

// What a forward operator fills.
struct Results {
  Tensor coefficients, mask, output;
};

inline Results compute(const Arguments& a, bool save) {
  const BelowAutograd guard;
  const Tensor& input = *a.input;
  Results results;
  // Before the output: behind it, they would keep malloc from giving its place to the next call.
  if (save) {
    const bool wide = input.scalar_type() == at::kDouble;
    const int64_t rows = a.pair ? int64_t{kPairRows} : int64_t{kRows};
    const int64_t channels = input.dim() > 1 ? input.size(1) : 0;
    results.coefficients = make({rows, channels}, wide ? at::kDouble : at::kFloat, input);
    if (a.is_masked()) results.mask = make({(input.numel() + 7) / 8}, at::kByte, input);
  }
  results.output = a.inplace ? input : make_like(input);
  const Statistics &s = a.statistics, &r = a.residual_statistics;
  Call call(a.pair ? forward_pair_operator() : forward_operator());
  call << &input << s.mean << s.var << s.weight << s.bias;
  if (a.pair) {
    call << s.eps << a.residual << r.mean << r.var << r.weight << r.bias << r.eps;
  } else {
    call << a.residual << s.eps;
  }
  call << a.code << a.negative_slope << &results.output << results.coefficients << results.mask;
  const ReleaseGil released(takes_long(input));
  call.run();
  return results;
}

inline void save(BackwardNode& node, const Arguments& a, const Results& results) {
  BackwardNode::Saved saved{results.coefficients, results.mask};
  if (a.trains_weight() || a.is_smooth()) saved.input = *a.input;
  if (a.is_smooth() && a.residual) saved.residual = *a.residual;
  if (a.trains_weight()) saved.weight = *a.statistics.weight;
  if (a.trains_bias() && a.is_smooth()) saved.bias = *a.statistics.bias;
  node.save(saved);
}

inline void connect(BackwardNode& node, const Arguments& a) {
  torch::autograd::edge_list edges(kGradients);
  const auto to = [&](Gradient gradient, const Tensor* tensor) {
    if (tensor) edges[gradient] = torch::autograd::impl::gradient_edge(*tensor);
  };
  to(kOfInput, a.input);
  if (a.trains_weight()) to(kOfWeight, a.statistics.weight);
  if (a.trains_bias()) to(kOfBias, a.statistics.bias);
  to(kOfResidual, a.residual);
  node.set_next_edges(std::move(edges));
}

inline Tensor record(const Arguments& a) {
  Results results = compute(a, true);
  auto node = make_node<BackwardNode>();
  BackwardNode::Plan& plan = node->plan;
  plan.pair = a.pair;
  plan.code = a.code;
  plan.negative_slope = a.negative_slope;
  plan.shares = !a.pair && (a.code == 0 || a.identity);
  plan.strides = results.output.strides();
  if (a.trains_weight()) plan.weight_dtype = a.statistics.weight->scalar_type();
  if (a.trains_bias()) plan.bias_dtype = a.statistics.bias->scalar_type();
  connect(*node, a);
  save(*node, a, results);
  if (a.inplace) {
    torch::autograd::impl::bump_version(*a.input);
    attach_to_overwritten(*a.input, node);
  } else {
    attach(results.output, node);
  }
  return std::move(results.output);
}

// ---- In place

inline void ask_python(PyObject* check, const Arguments& a) {
  THPObjectPtr input(THPVariable_Wrap(*a.input));
  THPObjectPtr passed(PyObject_CallFunction(check, "Os", input.get(), a.operator_name()));
  if (!passed) throw python_error();
}

// Raises where writing to the input would break its gradient or itself. The words are Python's.
inline void check_inplace(const Arguments& a) {
  const Tensor& input = *a.input;
  const auto strides = input.strides();
  const bool watched =
      at::GradMode::is_enabled() && (input.is_view() || (input.requires_grad() && input.is_leaf()));
  if (watched || std::find(strides.begin(), strides.end(), 0) != strides.end()) {
    ask_python(python().check_inplace, a);
  }
}

// What functional._run and pair._run do in Python.
inline Tensor run(Arguments a) {
  Tensor copied;
  if (a.inplace) {
    check_inplace(a);
    if (a.residual && a.residual->storage().is_alias_of(a.input->storage())) {
      copied = a.residual->clone();
      a.residual = &copied;
    }
  }
  if (!a.is_recorded()) {
    Tensor output = compute(a, false).output;
    if (a.inplace) torch::autograd::impl::bump_version(output);
    return output;
  }
  if (!a.inplace) return record(a);
  if (a.input->is_view()) ask_python(python().check_history, a);
  if (!a.is_smooth() && !a.trains_weight()) return record(a);
  // Where the gradient needs the input's values, they have to outlive the overwriting.
  Tensor input = *a.input;
  const Tensor source = input.clone();
  a.input = &source;
  a.inplace = false;
  return input.copy_(record(a));
}

}  // namespace frozen_bn
