// What comes from Python and goes back; and the call of a layer, if nothing about it is unusual.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "forward.h"

namespace frozen_bn {

// ---- From Python

// False, with or without a Python error, for what Python's node has to see itself.
inline bool read(PyObject* object, const Tensor*& tensor, bool optional = false) {
  if (optional && object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = &THPVariable_Unpack(object);
  return is_ordinary(*tensor);
}

inline bool read(PyObject* object, double& number) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) return false;
  number = PyFloat_AsDouble(object);
  return !PyErr_Occurred();
}

inline bool read(PyObject* object, int64_t& number) {
  number = PyLong_Check(object) ? PyLong_AsLongLong(object) : -1;
  return number >= 0 && number < kActivations;
}

inline bool read(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return flag || object == Py_False;
}

inline bool read_vectors(PyObject* const* objects, Statistics& s) {
  return read(objects[0], s.mean) && read(objects[1], s.var) && read(objects[2], s.weight, true) &&
         read(objects[3], s.bias, true);
}

// ---- To Python

inline PyObject* wrap(PyObject* input, const Arguments& a, Tensor output) {
  return a.inplace ? Py_NewRef(input) : THPVariable_Wrap(std::move(output));
}

inline bool has_rank(const Tensor& t, PyObject* ranks) {
  if (!PyTuple_Check(ranks)) return ranks == Py_None;
  const Py_ssize_t count = PyTuple_GET_SIZE(ranks);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (PyLong_AsLongLong(PyTuple_GET_ITEM(ranks, i)) == t.dim()) return true;
  }
  return count == 0;
}

// In the memory order that the output is to have (reference.in_torchs_order).
inline bool is_in_torchs_order(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (t.dim() == 5 && t.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

// What the two below have in common: options are activation, negative_slope, residual, inplace and
// the numbers of dimensions that the input may have. NotImplemented where this is no call of `run`.
inline PyObject* call(PyObject* input, Arguments& a, PyObject* const* options) {
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

// Of a module that has its vectors among its buffers, or its parameters.
inline PyObject* call_layer(
    PyObject* input, PyObject* buffers, PyObject* parameters, PyObject* eps,
    PyObject* const* options) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("running_mean"), PyUnicode_InternFromString("running_var"),
      PyUnicode_InternFromString("weight"), PyUnicode_InternFromString("bias")};
  Arguments a;
  PyObject* vectors[std::size(names)] = {};
  THPObjectPtr held[std::size(names)];  // while other threads run, they may leave the module
  bool simple = nobody_watches() && PyDict_Check(buffers) && PyDict_Check(parameters);
  for (size_t i = 0; simple && i < std::size(names); ++i) {
    vectors[i] = PyDict_GetItemWithError(buffers, names[i]);
    if (!vectors[i]) vectors[i] = PyDict_GetItemWithError(parameters, names[i]);
    held[i] = Py_XNewRef(vectors[i]);
    simple = vectors[i] != nullptr;
  }
  if (simple && read_vectors(vectors, a.statistics) && read(eps, a.statistics.eps)) {
    return call(input, a, options);
  }
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

}  // namespace frozen_bn
