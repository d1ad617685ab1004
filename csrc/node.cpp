// The module _node: frozen batch normalization as an autograd node in C++, built for one torch. The
// operators behind it are those of every torch >= 2.10, and Python has the same node over them
// (frozen_bn/functional.py, pair.py) for every other torch, for what is no plain tensor, and
// wherever somebody watches: a TorchDispatchMode, say.
#include "node/forward.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "built.h"  // written by setup.py

namespace frozen_bn {
namespace {

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

// What the two below have in common: options are activation, negative_slope, residual, inplace and
// the numbers of dimensions that the input may have. NotImplemented where this is no call of `run`.
PyObject* call(PyObject* input, Arguments& a, PyObject* const* options) {
  const bool simple =
      !at::impl::torch_function_mode_enabled() && !forward_mode() && read(input, a.input) &&
      read(options[1], a.negative_slope) && read(options[2], a.residual, true) &&
      read(options[3], a.inplace) && has_rank(*a.input, options[4]) &&
      !a.statistics.mean->requires_grad() && !a.statistics.var->requires_grad() &&
      (a.input->is_cpu() || (python().cuda == Py_True && a.input->scalar_type() != at::kDouble));
  PyObject* const code = simple ? PyDict_GetItemWithError(python().codes, options[0]) : nullptr;
  if (!code || !read(code, a.code)) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  Tensor ordered;
  if (!a.inplace && !is_in_torchs_order(*a.input)) {
    ordered = a.input->contiguous();
    a.input = &ordered;
  }
  return wrap(input, a, run(a));
}

// (input, running_mean, running_var, weight, bias, eps, *options)
PyObject* call_fast(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Arguments a;
  if (count == 11 && nobody_watches() && read_vectors(o + 1, a.statistics) &&
      read(o[5], a.statistics.eps)) {
    return call(o[0], a, o + 6);
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

// Of a module that has its vectors among its buffers, or its parameters:
// (input, buffers, parameters, eps, *options)
PyObject* call_layer_fast(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject* const names[] = {
      PyUnicode_InternFromString("running_mean"), PyUnicode_InternFromString("running_var"),
      PyUnicode_InternFromString("weight"), PyUnicode_InternFromString("bias")};
  Arguments a;
  PyObject* vectors[std::size(names)] = {};
  bool simple = count == 9 && nobody_watches() && PyDict_Check(o[1]) && PyDict_Check(o[2]);
  for (size_t i = 0; simple && i < std::size(names); ++i) {
    vectors[i] = PyDict_GetItemWithError(o[1], names[i]);
    if (!vectors[i]) vectors[i] = PyDict_GetItemWithError(o[2], names[i]);
    simple = vectors[i] != nullptr;
  }
  if (simple && read_vectors(vectors, a.statistics) && read(o[3], a.statistics.eps)) {
    return call(o[0], a, o + 4);
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
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
      method("run", &run_fast),   method("run_pair", &run_pair_fast),
      method("call", &call_fast), method("call_layer", &call_layer_fast),
      method("bind", &bind),      {nullptr, nullptr, 0, nullptr}};
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
