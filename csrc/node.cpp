// The module _node: frozen batch normalization as an autograd node in C++, built for one torch. The
// operators behind it are those of every torch >= 2.10, and Python has the same node over them
// (frozen_bn/functional.py, pair.py) for every other torch, for what is no plain tensor, and
// wherever somebody watches: a TorchDispatchMode, say.
#include "node/backward.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "built.h"  // written by setup.py

namespace frozen_bn {
namespace {

// What a branch is normalized with; pointers to tensors, null for None.
struct Statistics {
  const Tensor *mean = nullptr, *var = nullptr, *weight = nullptr, *bias = nullptr;
  double eps = 0;
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
};

bool wants_gradient(const Tensor* t) {
  return t != nullptr && t->requires_grad();
}

// ---- From Python

// False, with or without a Python error, for what Python's node has to see itself.
bool read(PyObject* object, const Tensor*& tensor, bool optional = false) {
  if (optional && object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = &THPVariable_Unpack(object);
  return is_ordinary(*tensor);
}

bool read(PyObject* object, double& number) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) return false;
  number = PyFloat_AsDouble(object);
  return !PyErr_Occurred();
}

bool read(PyObject* object, int64_t& number) {
  number = PyLong_Check(object) ? PyLong_AsLongLong(object) : -1;
  return number >= 0 && number < kActivations;
}

bool read(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return flag || object == Py_False;
}

bool read_vectors(PyObject* const* objects, Statistics& s) {
  return read(objects[0], s.mean) && read(objects[1], s.var) && read(objects[2], s.weight, true) &&
         read(objects[3], s.bias, true);
}

bool read_run(PyObject* const* o, Py_ssize_t count, Arguments& a) {
  return count == 11 && nobody_watches() && read(o[0], a.input) &&
         read_vectors(o + 1, a.statistics) && read(o[5], a.residual, true) &&
         read(o[6], a.statistics.eps) && read(o[7], a.code) && read(o[8], a.negative_slope) &&
         read(o[9], a.inplace) && read(o[10], a.identity);
}

bool read_run_pair(PyObject* const* o, Py_ssize_t count, Arguments& a) {
  a.pair = true;
  return count == 15 && nobody_watches() && read(o[0], a.input) &&
         read_vectors(o + 1, a.statistics) && read(o[5], a.statistics.eps) &&
         read(o[6], a.residual) && read_vectors(o + 7, a.residual_statistics) &&
         read(o[11], a.residual_statistics.eps) && read(o[12], a.code) &&
         read(o[13], a.negative_slope) && read(o[14], a.inplace);
}

// ---- The forward pass

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

Results compute(const Arguments& a, bool save) {
  const BelowAutograd guard;
  const Tensor& input = *a.input;
  Results results;
  // Before the output: behind it, they would keep malloc from giving its place to the next call.
  if (save) {
    const bool wide = input.scalar_type() == at::kDouble;
    const int64_t rows = a.pair ? int64_t{kPairRows} : int64_t{kRows};
    const int64_t channels = input.dim() > 1 ? input.size(1) : 0;
    results.coefficients =
        make({rows, channels}, {channels, 1}, wide ? at::kDouble : at::kFloat, input);
    if (a.is_masked()) results.mask = make_vector((input.numel() + 7) / 8, at::kByte, input);
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

Tensor record(const Arguments& a) {
  const Results results = compute(a, true);
  const Tensor *weight = a.statistics.weight, *bias = a.statistics.bias;
  const bool weight_gradient = !a.pair && wants_gradient(weight);
  const bool bias_gradient = !a.pair && wants_gradient(bias);
  auto node = make_node<BackwardNode>();
  BackwardNode::Plan& plan = node->plan;
  plan.pair = a.pair;
  plan.code = a.code;
  plan.negative_slope = a.negative_slope;
  plan.shares = !a.pair && (a.code == 0 || a.identity);
  plan.strides = results.output.strides();
  if (weight_gradient) plan.weight_dtype = weight->scalar_type();
  if (bias_gradient) plan.bias_dtype = bias->scalar_type();
  torch::autograd::edge_list edges(kGradients);
  const auto connect = [&](Gradient gradient, const Tensor* to) {
    if (to) edges[gradient] = torch::autograd::impl::gradient_edge(*to);
  };
  connect(kOfInput, a.input);
  if (weight_gradient) connect(kOfWeight, weight);
  if (bias_gradient) connect(kOfBias, bias);
  connect(kOfResidual, a.residual);
  node->set_next_edges(std::move(edges));
  BackwardNode::Saved saved{results.coefficients, results.mask};
  if (weight_gradient || a.is_smooth()) saved.input = *a.input;
  if (a.is_smooth() && a.residual) saved.residual = *a.residual;
  if (weight_gradient) saved.weight = *weight;
  if (bias_gradient && a.is_smooth()) saved.bias = *bias;
  node->save(saved);
  if (a.inplace) {
    torch::autograd::impl::bump_version(*a.input);
    attach_to_overwritten<NodePtr>(*a.input, node);
  } else {
    attach(results.output, node);
  }
  return results.output;
}

// ---- In place

void ask_python(PyObject* check, const Arguments& a) {
  THPObjectPtr input(THPVariable_Wrap(*a.input));
  THPObjectPtr passed(PyObject_CallFunction(check, "Os", input.get(), a.operator_name()));
  if (!passed) throw python_error();
}

// Raises where writing to the input would break its gradient or itself. The words are Python's.
void check_inplace(const Arguments& a) {
  const Tensor& input = *a.input;
  const auto strides = input.strides();
  const bool recorded =
      at::GradMode::is_enabled() && (input.is_view() || (input.requires_grad() && input.is_leaf()));
  if (recorded || std::find(strides.begin(), strides.end(), 0) != strides.end()) {
    ask_python(python().check_inplace, a);
  }
}

Tensor run(Arguments a) {
  Tensor copied;
  if (a.inplace) {
    check_inplace(a);
    if (a.residual && a.residual->storage().is_alias_of(a.input->storage())) {
      copied = a.residual->clone();
      a.residual = &copied;
    }
  }
  const Statistics& s = a.statistics;
  const bool weight_gradient = !a.pair && wants_gradient(s.weight);
  const bool recorded = at::GradMode::is_enabled() &&
                        (weight_gradient || wants_gradient(a.input) || wants_gradient(a.residual) ||
                         (!a.pair && wants_gradient(s.bias)));
  if (!recorded) {
    Tensor output = compute(a, false).output;
    if (a.inplace) torch::autograd::impl::bump_version(output);
    return output;
  }
  if (!a.inplace) return record(a);
  if (a.input->is_view()) ask_python(python().check_history, a);
  if (!a.is_smooth() && !weight_gradient) return record(a);
  // Where the gradient needs the input's values, they have to outlive the overwriting.
  Tensor input = *a.input;
  const Tensor source = input.clone();
  a.input = &source;
  a.inplace = false;
  return input.copy_(record(a));
}

// ---- To Python

PyObject* wrap(PyObject* input, const Arguments& a, Tensor output) {
  return a.inplace ? Py_NewRef(input) : THPVariable_Wrap(std::move(output));
}

PyObject* fall_back(PyObject* function, PyObject* const* objects, Py_ssize_t count) {
  PyErr_Clear();
  return PyObject_Vectorcall(function, objects, count, nullptr);
}

PyObject* run_fast(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments a;
  if (!read_run(objects, count, a)) return fall_back(python().run, objects, count);
  return wrap(objects[0], a, run(a));
  END_HANDLE_TH_ERRORS
}

PyObject* run_pair_fast(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments a;
  if (!read_run_pair(objects, count, a)) return fall_back(python().run_pair, objects, count);
  return wrap(objects[0], a, run(a));
  END_HANDLE_TH_ERRORS
}

bool has_rank(const Tensor& t, PyObject* ranks) {
  if (!PyTuple_Check(ranks)) return ranks == Py_None;
  const Py_ssize_t count = PyTuple_GET_SIZE(ranks);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(ranks, i)) == t.dim()) return true;
  }
  return count == 0;
}

// In the memory order that the output is to have (reference.in_torchs_order).
bool is_in_torchs_order(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (t.dim() == 5 && t.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

// frozen_batch_norm(input, running_mean, running_var, weight, bias, eps, activation,
// negative_slope, residual, inplace, ranks) where that is a call of `run`; else NotImplemented.
PyObject* call(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments a;
  const bool simple =
      count == 11 && nobody_watches() && !at::impl::torch_function_mode_enabled() &&
      !forward_mode() && read(o[0], a.input) && read_vectors(o + 1, a.statistics) &&
      read(o[5], a.statistics.eps) && read(o[7], a.negative_slope) &&
      read(o[8], a.residual, true) && read(o[9], a.inplace) && has_rank(*a.input, o[10]) &&
      !a.statistics.mean->requires_grad() && !a.statistics.var->requires_grad() &&
      (a.input->is_cpu() || (python().cuda == Py_True && a.input->scalar_type() != at::kDouble));
  PyObject* const code = simple ? PyDict_GetItemWithError(python().codes, o[6]) : nullptr;
  if (!code || !read(code, a.code)) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor ordered;
  if (!a.inplace && !is_in_torchs_order(*a.input)) {
    ordered = a.input->contiguous();
    a.input = &ordered;
  }
  return wrap(o[0], a, run(a));
  END_HANDLE_TH_ERRORS
}

// bind(run, run_pair, backward, pair_backward, check_inplace, check_history, codes, cuda)
PyObject* bind(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Python& p = python();
  PyObject** const places[] = {&p.run,           &p.run_pair,      &p.backward, &p.pair_backward,
                               &p.check_inplace, &p.check_history, &p.codes,    &p.cuda};
  if (count != std::ssize(places)) {
    PyErr_SetString(PyExc_TypeError, "frozen_bn: expected 8 arguments to bind");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; ++i) Py_XSETREF(*places[i], Py_NewRef(objects[i]));
  Py_RETURN_NONE;
}

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, FastFunction function) {
  return {
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
      nullptr};
}

}  // namespace
}  // namespace frozen_bn

PyMODINIT_FUNC PyInit__node() {
  using namespace frozen_bn;
  static PyMethodDef methods[] = {
      method("run", &run_fast),
      method("run_pair", &run_pair_fast),
      method("call", &call),
      method("bind", &bind),
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT,
      "_node",
      "The autograd node of frozen_bn, for one torch.",
      -1,
      methods,
      nullptr,
      nullptr,
      nullptr,
      nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "built_with", FROZEN_BN_BUILT_TORCH) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
