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

// -1 for what is no number, or too large a one.
inline int64_t number(PyObject* object) {
  int overflow = 0;
  const bool exact = object && PyLong_CheckExact(object);
  return exact ? PyLong_AsLongLongAndOverflow(object, &overflow) : -1;
}

inline bool has_rank(const Tensor& t, PyObject* ranks) {
  if (!PyTuple_Check(ranks)) return ranks == Py_None;
  const Py_ssize_t count = PyTuple_GET_SIZE(ranks);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (number(PyTuple_GET_ITEM(ranks, i)) == t.dim()) return true;
  }
  return count == 0;
}

// In the memory order that the output is to have (reference.in_torchs_order).
inline bool is_in_torchs_order(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast)) ||
         (t.dim() == 5 && t.is_contiguous(at::MemoryFormat::ChannelsLast3d));
}

// The rest of a call: options are activation, negative_slope, residual, inplace and
// the numbers of dimensions that the input may have. NotImplemented where this is no call of `run`.
inline PyObject* call(PyObject* input, Arguments& a, PyObject* const* options) {
  const bool simple =
      !at::impl::torch_function_mode_enabled() && !forward_mode() && read(input, a.input) &&
      read(options[1], a.negative_slope) && read(options[2], a.residual, true) &&
      read(options[3], a.inplace) && has_rank(*a.input, options[4]) && a.statistics.is_constant() &&
      (!a.pair || a.residual_statistics.is_constant()) &&
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

// What a module normalizes with: its vectors are among its buffers or its parameters. They are
// held: while other threads run, they may leave the module.
class Layer {
 public:
  bool read(PyObject* buffers, PyObject* parameters, PyObject* eps) {
    static PyObject* const names[] = {
        PyUnicode_InternFromString("running_mean"), PyUnicode_InternFromString("running_var"),
        PyUnicode_InternFromString("weight"), PyUnicode_InternFromString("bias")};
    if (!PyDict_Check(buffers) || !PyDict_Check(parameters)) return false;
    PyObject* vectors[kVectors] = {};
    for (size_t i = 0; i < kVectors; ++i) {
      vectors[i] = PyDict_GetItemWithError(buffers, names[i]);
      if (!vectors[i]) vectors[i] = PyDict_GetItemWithError(parameters, names[i]);
      if (!vectors[i]) return false;
      held_[i] = Py_NewRef(vectors[i]);
    }
    return read_vectors(vectors, statistics_) && frozen_bn::read(eps, statistics_.eps);
  }

  const Statistics& statistics() const {
    return statistics_;
  }
  bool trains_affine() const {
    const auto trains = [](const Tensor* t) { return t && t->requires_grad(); };
    return trains(statistics_.weight) || trains(statistics_.bias);
  }

 private:
  static constexpr size_t kVectors = 4;
  THPObjectPtr held_[kVectors];
  Statistics statistics_;
};

}  // namespace frozen_bn
