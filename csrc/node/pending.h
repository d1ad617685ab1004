// What steps.py and pending.py hand over: functions, tables, and objects that wait to be computed.
#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <initializer_list>

#include <structmember.h>  // wants Python.h before it

namespace frozen_bn {

// What is taken from them, for as long as the process lives.
struct Steps {
  PyObject *call, *value, *settle, *add, *iadd, *compute, *finish, *seen;  // in Python
  PyObject *convolve, *normalize, *activate;                               // handlers
  PyObject *kinds, *without_options, *of_module, *recorders;
  PyObject *module, *module_call, *call_impl, *conv2d_class, *functions;
  // What torch has between a call of a Conv2d and the operator; or what equals nothing.
  PyObject *own_call, *own_call_impl, *own_getattr, *own_forward, *own_conv_forward, *own_conv2d;
  PyObject* hooks[4];  // of all modules
  PyTypeObject *convolution, *normalized;
  // Where their slots are.
  struct {
    Py_ssize_t conv, input, output;
  } of_convolution;
  struct {
    Py_ssize_t bn, branch, conv, folded, grad, inference, input, other, output, bias;
  } of_normalized;
  PyObject *no_ranks, *slope;
};

inline Steps& steps() {
  static Steps s;
  return s;
}

inline PyObject*& slot(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

inline void set(PyObject* object, Py_ssize_t offset, PyObject* value) {
  Py_XSETREF(slot(object, offset), Py_XNewRef(value));
}

inline bool is_convolution(PyObject* x) {
  return Py_TYPE(x) == steps().convolution;
}

inline bool is_normalized(PyObject* x) {
  return Py_TYPE(x) == steps().normalized;
}

inline bool is_tensor(PyObject* x) {
  return reinterpret_cast<PyObject*>(Py_TYPE(x)) == THPVariableClass;
}

// Interned once: names by which dictionaries are asked.
inline PyObject* name(const char* text) {
  return PyUnicode_InternFromString(text);
}

inline PyObject* item(PyObject* dictionary, PyObject* key) {
  return PyDict_GetItemWithError(dictionary, key);
}

// What a class has under that name, or null. Runs no code.
inline PyObject* looked_up(PyObject* kind, PyObject* key) {
  return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(kind), key);
}

// Whether it has nothing in it. What is no dictionary may have.
inline bool is_empty(PyObject* dictionary) {
  return dictionary && PyDict_Check(dictionary) && PyDict_GET_SIZE(dictionary) == 0;
}

// Whether calling the module is calling the forward of its class, with nothing before or after.
inline bool is_plain(PyObject* attributes, PyTypeObject* kind, PyObject* forward) {
  static PyObject* const hooks[] = {
      name("_forward_hooks"), name("_forward_pre_hooks"), name("_backward_hooks"),
      name("_backward_pre_hooks")};
  static PyObject *const own = name("forward"), *const compiled = name("_compiled_call_impl");
  for (PyObject* const hook : hooks) {
    if (!is_empty(item(attributes, hook))) return false;
  }
  if (item(attributes, own)) return false;
  PyObject* const implementation = item(attributes, compiled);
  if (implementation && implementation != Py_None) return false;
  return looked_up(reinterpret_cast<PyObject*>(kind), own) == forward;
}

// Whether there are no hooks of all modules.
inline bool nothing_is_hooked_to_all() {
  for (PyObject* const hooks : steps().hooks) {
    if (!is_empty(hooks)) return false;
  }
  return true;
}

// Whether the modes are those in which `n` was written.
inline bool in_its_modes(PyObject* n) {
  const auto& at = steps().of_normalized;
  return (slot(n, at.grad) == Py_True) == at::GradMode::is_enabled() &&
         (slot(n, at.inference) == Py_True) == c10::InferenceMode::is_enabled();
}

inline bool waits(PyObject* x) {
  return is_normalized(x) && slot(x, steps().of_normalized.output) == Py_None && in_its_modes(x);
}

// Where objects of a class keep what is called `name`; -1 with an error.
inline Py_ssize_t slot_offset(PyObject* kind, const char* name) {
  THPObjectPtr member(PyObject_GetAttrString(kind, name));
  if (!member) return -1;
  if (!Py_IS_TYPE(member.get(), &PyMemberDescr_Type)) {
    PyErr_Format(PyExc_TypeError, "frozen_bn: expected a slot for %s in %R", name, kind);
    return -1;
  }
  return reinterpret_cast<PyMemberDescrObject*>(member.get())->d_member->offset;
}

struct Named {
  const char* name;
  PyObject** place;
};

struct NamedSlot {
  const char* name;
  Py_ssize_t* place;
};

inline bool find_slots(PyObject* kind, std::initializer_list<NamedSlot> slots) {
  for (const auto& [name, place] : slots) {
    if ((*place = slot_offset(kind, name)) < 0) return false;
  }
  return true;
}

// bind_steps(what they have): see Steps.
inline PyObject* bind_steps(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Steps& s = steps();
  PyObject *convolution = nullptr, *normalized = nullptr;
  const Named taken[] = {
      {"_call", &s.call},
      {"value", &s.value},
      {"settle", &s.settle},
      {"_add", &s.add},
      {"_iadd", &s.iadd},
      {"compute", &s.compute},
      {"finish", &s.finish},
      {"_watched", &s.seen},
      {"_convolve", &s.convolve},
      {"_normalize", &s.normalize},
      {"_activate", &s.activate},
      {"_kinds", &s.kinds},
      {"_without_options", &s.without_options},
      {"of_module", &s.of_module},
      {"recorders", &s.recorders},
      {"Module", &s.module},
      {"MODULE_CALL", &s.module_call},
      {"_call_impl", &s.call_impl},
      {"Conv2d", &s.conv2d_class},
      {"functions", &s.functions},
      {"own_call", &s.own_call},
      {"own_call_impl", &s.own_call_impl},
      {"own_getattr", &s.own_getattr},
      {"own_forward", &s.own_forward},
      {"own_conv_forward", &s.own_conv_forward},
      {"own_conv2d", &s.own_conv2d},
      {"_hooks", &s.hooks[0]},
      {"_pre_hooks", &s.hooks[1]},
      {"_backward_hooks", &s.hooks[2]},
      {"_backward_pre_hooks", &s.hooks[3]},
      {"Convolution", &convolution},
      {"Normalized", &normalized}};
  for (const auto& [name, place] : taken) {
    PyObject* const found = count == 1 ? PyDict_GetItemString(objects[0], name) : nullptr;
    if (!found) return PyErr_Format(PyExc_TypeError, "frozen_bn: steps without %s", name);
    Py_XSETREF(*place, Py_NewRef(found));
  }
  auto& c = s.of_convolution;
  auto& n = s.of_normalized;
  if (!find_slots(convolution, {{"conv", &c.conv}, {"input", &c.input}, {"output", &c.output}}) ||
      !find_slots(
          normalized, {{"bn", &n.bn},
                       {"branch", &n.branch},
                       {"conv", &n.conv},
                       {"folded", &n.folded},
                       {"grad", &n.grad},
                       {"inference", &n.inference},
                       {"input", &n.input},
                       {"other", &n.other},
                       {"output", &n.output},
                       {"bias", &n.bias}})) {
    return nullptr;
  }
  s.convolution = reinterpret_cast<PyTypeObject*>(convolution);
  s.normalized = reinterpret_cast<PyTypeObject*>(normalized);
  s.no_ranks = PyTuple_New(0);
  s.slope = PyFloat_FromDouble(0.01);
  Py_RETURN_NONE;
}

}  // namespace frozen_bn
