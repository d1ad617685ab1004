// The module _node: frozen batch normalization as an autograd node in C++, built for one torch. The
// operators behind it are those of every torch >= 2.10, and Python has the same node over them
// (frozen_bn/functional.py, pair.py) for every other torch, for what is no plain tensor, and
// wherever somebody watches: a TorchDispatchMode, say.
#include "node/steps.h"

#include "built.h"  // written by setup.py

namespace frozen_bn {
namespace {

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

// (input, buffers, parameters, eps, *options)
PyObject* call_layer_fast(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Layer layer;
  if (count == 9 && nobody_watches() && layer.read(o[1], o[2], o[3])) {
    Arguments a;
    a.statistics = layer.statistics();
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

// ---- Steps

// What a step in C++ came to, or else Python's.
PyObject* or_python(
    PyObject* result, PyObject* function, PyObject* const* objects, Py_ssize_t count) {
  if (result || PyErr_Occurred()) return result;
  return PyObject_Vectorcall(function, objects, count, nullptr);
}

PyObject* call_step(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return or_python(count == 2 ? called(o[0], o[1]) : nullptr, steps().call, o, count);
  END_HANDLE_TH_ERRORS
}

PyObject* value_step(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return or_python(count == 1 ? value_of(o[0]) : nullptr, steps().value, o, count);
  END_HANDLE_TH_ERRORS
}

PyObject* settle_step(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const bool settled = count == 1 && is_settled(o[0]);
  return or_python(settled ? Py_NewRef(o[0]) : nullptr, steps().settle, o, count);
  END_HANDLE_TH_ERRORS
}

PyObject* add_step(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PyObject* sum = nullptr;
  if (count == 2) {  // operator.add
    const Taken first = takes(o[0], o[1], false);
    if (first == Taken::kYes) sum = o[0];
    if (first == Taken::kNo && takes(o[1], o[0], true) == Taken::kYes) sum = o[1];
  }
  return or_python(Py_XNewRef(sum), steps().add, o, count);
  END_HANDLE_TH_ERRORS
}

PyObject* iadd_step(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const bool taken = count == 2 && takes(o[0], o[1], false) == Taken::kYes;
  return or_python(taken ? Py_NewRef(o[0]) : nullptr, steps().iadd, o, count);
  END_HANDLE_TH_ERRORS
}

PyObject* watched_step(PyObject*, PyObject* const* o, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return or_python(surely_unseen() ? Py_NewRef(Py_False) : nullptr, steps().seen, o, count);
  END_HANDLE_TH_ERRORS
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
      method("call", &call_fast),
      method("call_layer", &call_layer_fast),
      method("bind", &bind),
      method("call_step", &call_step),
      method("value_step", &value_step),
      method("settle_step", &settle_step),
      method("add_step", &add_step),
      method("iadd_step", &iadd_step),
      method("watched_step", &watched_step),
      method("bind_steps", &bind_steps),
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
