// The steps of frozen_bn/fusion/steps.py for what models nearly always do: a 2d convolution, a
// frozen layer, an activation, a sum, without hooks and on plain tensors. They take and leave the
// same objects as the steps in Python, to which they leave whatever is in any way unusual: nothing
// is decided here that would be decided otherwise there.
//
// Most return null, without an error, for what Python's step has to do from here on. What has been
// computed by then stands in the objects.
#pragma once

#include <ATen/ops/conv2d.h>

#include <array>
#include <optional>

#include "pending.h"
#include "python.h"

namespace frozen_bn {

// ---- Convolutions

inline bool read(PyObject* pair, std::array<int64_t, 2>& numbers) {
  if (!pair || !PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2) return false;
  for (size_t i = 0; i < 2; ++i) numbers[i] = number(PyTuple_GET_ITEM(pair, i));
  return numbers[0] >= 0 && numbers[1] >= 0;
}

// Of a convolution, what torch.conv2d takes.
struct Geometry {
  const Tensor *weight = nullptr, *bias = nullptr;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups = 1;
};

// Whether calling it is torch's way from `Module.__call__` to `F.conv2d`, and nobody looks on.
inline bool is_torchs(PyObject* conv, PyObject* attributes) {
  static PyObject *const kCall = name("__call__"), *const kImpl = name("_call_impl"),
                         *const kGetattr = name("__getattr__"), *const kFunction = name("conv2d"),
                         *const kForward = name("_conv_forward"), *const kWeight = name("weight"),
                         *const kBias = name("bias");
  const Steps& s = steps();
  PyObject* const kind = reinterpret_cast<PyObject*>(Py_TYPE(conv));
  const PyThreadState* const thread = PyThreadState_Get();
  return kind == s.conv2d_class && is_plain(attributes, Py_TYPE(conv), s.own_forward) &&
         looked_up(kind, kCall) == s.own_call && looked_up(kind, kImpl) == s.own_call_impl &&
         looked_up(kind, kGetattr) == s.own_getattr &&
         looked_up(kind, kForward) == s.own_conv_forward && !item(attributes, kForward) &&
         item(s.functions, kFunction) == s.own_conv2d && !looked_up(kind, kWeight) &&
         !looked_up(kind, kBias) && !item(attributes, kWeight) && !item(attributes, kBias) &&
         nothing_is_hooked_to_all() && !at::impl::torch_function_mode_enabled() &&
         !thread->c_profilefunc && !thread->c_tracefunc;
}

// False for what F.conv2d has to be told in another way.
inline bool read(PyObject* attributes, Geometry& g) {
  static PyObject *const kParameters = name("_parameters"), *const kMode = name("padding_mode"),
                         *const kWeight = name("weight"), *const kBias = name("bias"),
                         *const kStride = name("stride"), *const kPadding = name("padding"),
                         *const kDilation = name("dilation"), *const kGroups = name("groups");
  PyObject* const mode = item(attributes, kMode);
  PyObject* const parameters = item(attributes, kParameters);
  if (!mode || !PyUnicode_Check(mode) || PyUnicode_CompareWithASCIIString(mode, "zeros") != 0 ||
      !parameters || !PyDict_CheckExact(parameters)) {
    return false;
  }
  PyObject* const weight = item(parameters, kWeight);
  PyObject* const bias = item(parameters, kBias);
  g.groups = number(item(attributes, kGroups));
  return weight && bias && read(weight, g.weight) && read(bias, g.bias, true) && g.groups > 0 &&
         read(item(attributes, kStride), g.stride) && read(item(attributes, kPadding), g.padding) &&
         read(item(attributes, kDilation), g.dilation);
}

// `conv(input)`.
inline PyObject* run_convolution(PyObject* conv, PyObject* input) {
  THPObjectPtr attributes(PyObject_GenericGetDict(conv, nullptr));
  Geometry g;
  const bool plain = attributes && is_tensor(input) && is_torchs(conv, attributes.get()) &&
                     read(attributes.get(), g);
  PyErr_Clear();
  if (!plain) return PyObject_CallOneArg(conv, input);
  const Tensor x = THPVariable_Unpack(input), weight = *g.weight;
  const std::optional<Tensor> bias = g.bias ? std::optional<Tensor>(*g.bias) : std::nullopt;
  Tensor output;
  {
    const ReleaseGil released(true);
    output = at::conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups);
  }
  return THPVariable_Wrap(std::move(output));
}

// Its output, of which it keeps a reference.
inline PyObject* convolved(PyObject* c) {
  const auto& at = steps().of_convolution;
  if (slot(c, at.output) == Py_None) {
    THPObjectPtr conv(Py_NewRef(slot(c, at.conv))), input(Py_NewRef(slot(c, at.input)));
    THPObjectPtr output(run_convolution(conv.get(), input.get()));
    if (!output) return nullptr;
    set(c, at.output, output.get());
    set(c, at.input, Py_None);
  }
  return Py_NewRef(slot(c, at.output));
}

// ---- Layers

// Reads what `n` normalizes with.
inline bool read(PyObject* n, Layer& layer) {
  static PyObject *const kBuffers = name("_buffers"), *const kParameters = name("_parameters"),
                         *const kEps = name("eps");
  THPObjectPtr attributes(PyObject_GenericGetDict(slot(n, steps().of_normalized.bn), nullptr));
  if (!attributes) return false;
  PyObject* const buffers = item(attributes.get(), kBuffers);
  PyObject* const parameters = item(attributes.get(), kParameters);
  PyObject* const eps = item(attributes.get(), kEps);
  return buffers && parameters && eps && layer.read(buffers, parameters, eps);
}

inline bool may_overwrite(PyObject* n, const Tensor& input, const Tensor* weight, bool smooth) {
  const auto& at = steps().of_normalized;
  if (slot(n, at.conv) == Py_None || input.is_inference() != c10::InferenceMode::is_enabled()) {
    return false;
  }
  if (slot(n, at.grad) != Py_True) return !input.requires_grad();
  return !smooth && !(weight && weight->requires_grad());
}

// By one call of a kernel, or NotImplemented.
inline PyObject* by_the_kernel(PyObject* n, PyObject* activation, PyObject* slope) {
  const auto& at = steps().of_normalized;
  PyObject* const input = slot(n, at.input);
  PyObject* other = slot(n, at.other);
  PyObject* const code = item(python().codes, activation);
  Layer layer, branch;
  Arguments a;
  a.pair = is_normalized(other);
  const bool simple = code && is_tensor(input) && slot(n, at.folded) == Py_False &&
                      PyList_GET_SIZE(steps().recorders) == 0 && nobody_watches() &&
                      read(n, layer) && (!a.pair || read(other, branch));
  const bool trained = a.pair && simple && at::GradMode::is_enabled() &&
                       (layer.trains_affine() || branch.trains_affine());
  if (!simple || trained) Py_RETURN_NOTIMPLEMENTED;
  a.statistics = layer.statistics();
  if (a.pair) {
    a.residual_statistics = branch.statistics();
    other = slot(other, at.input);
  }
  const bool smooth = needs_input(static_cast<Activation>(PyLong_AsLong(code)));
  const bool over = may_overwrite(n, THPVariable_Unpack(input), a.statistics.weight, smooth);
  PyObject* const options[] = {
      activation, slope, other, over ? Py_True : Py_False, steps().no_ranks};
  return call(input, a, options);
}

// All that waits, and an activation of it.
inline PyObject* finish(PyObject* n, PyObject* activation, PyObject* slope) {
  const auto& at = steps().of_normalized;
  THPObjectPtr output(by_the_kernel(n, activation, slope));
  if (output.get() == Py_NotImplemented) {
    PyErr_Clear();
    return PyObject_CallFunctionObjArgs(steps().finish, n, activation, slope, nullptr);
  }
  if (!output) return nullptr;
  set(n, at.output, output.get());
  for (const Py_ssize_t offset : {at.input, at.other, at.bias, at.conv}) set(n, offset, Py_None);
  return output.release();
}

// `x`, computed if it is pending.
inline PyObject* value_of(PyObject* x) {
  if (is_convolution(x)) {
    THPObjectPtr output(convolved(x));
    if (output) set(x, steps().of_convolution.conv, Py_None);
    return output.release();
  }
  if (!is_normalized(x)) return Py_NewRef(x);
  PyObject* const output = slot(x, steps().of_normalized.output);
  if (output != Py_None) return Py_NewRef(output);
  if (in_its_modes(x)) return finish(x, Py_None, steps().slope);
  return PyObject_CallOneArg(steps().compute, x);
}

inline PyObject* to_convolve(PyObject* conv, PyObject* attributes, PyObject* x) {
  static PyObject* const kForward = name("_conv_forward");
  const Steps& s = steps();
  THPObjectPtr input(value_of(x));
  if (!input || !is_tensor(input.get()) || item(attributes, kForward)) return nullptr;
  PyObject* const c = s.convolution->tp_alloc(s.convolution, 0);
  if (!c) return nullptr;
  set(c, s.of_convolution.conv, conv);
  set(c, s.of_convolution.input, input.get());
  set(c, s.of_convolution.output, Py_None);
  return c;
}

// Whether there is nothing to complain about.
inline bool fits(PyObject* input, PyObject* bn, PyObject* attributes) {
  static PyObject *const kRanks = name("_ranks"), *const kChannels = name("num_features");
  if (!is_tensor(input) || item(attributes, kRanks)) return false;
  const Tensor& t = THPVariable_Unpack(input);
  PyObject* const ranks = looked_up(reinterpret_cast<PyObject*>(Py_TYPE(bn)), kRanks);
  return ranks && PyTuple_CheckExact(ranks) && has_rank(t, ranks) && t.dim() > 1 &&
         at::isFloatingType(t.scalar_type()) && t.size(1) == number(item(attributes, kChannels));
}

inline PyObject* to_normalize(PyObject* bn, PyObject* attributes, PyObject* x) {
  static PyObject *const kFold = name("fold_conv"), *const kInplace = name("inplace"),
                         *const kActivation = name("activation"),
                         *const kSlope = name("negative_slope");
  const Steps& s = steps();
  const auto& at = s.of_normalized;
  PyObject* const fold = item(attributes, kFold);
  if (fold && fold != Py_False) return nullptr;
  const bool fresh = is_convolution(x) && slot(x, s.of_convolution.conv) != Py_None;
  THPObjectPtr conv(Py_NewRef(fresh ? slot(x, s.of_convolution.conv) : Py_None));
  THPObjectPtr input(fresh ? convolved(x) : value_of(x));
  if (!input || !fits(input.get(), bn, attributes)) return nullptr;
  // Now, and held: while that ran, somebody may have set others.
  THPObjectPtr activation(Py_XNewRef(item(attributes, kActivation)));
  THPObjectPtr slope(Py_XNewRef(item(attributes, kSlope)));
  if (item(attributes, kInplace) != Py_False || !activation || !slope) return nullptr;
  THPObjectPtr n(s.normalized->tp_alloc(s.normalized, 0));
  if (!n) return nullptr;
  for (const Py_ssize_t offset : {at.branch, at.other, at.output, at.bias}) {
    set(n.get(), offset, Py_None);
  }
  set(n.get(), at.bn, bn);
  set(n.get(), at.conv, conv.get());
  set(n.get(), at.folded, Py_False);
  set(n.get(), at.grad, at::GradMode::is_enabled() ? Py_True : Py_False);
  set(n.get(), at.inference, c10::InferenceMode::is_enabled() ? Py_True : Py_False);
  set(n.get(), at.input, input.get());
  if (activation.get() != Py_None) {
    THPObjectPtr done(finish(n.get(), activation.get(), slope.get()));
    if (!done) return nullptr;
  }
  return n.release();
}

inline PyObject* activate(PyObject* f, PyObject* x) {
  if (!waits(x)) return nullptr;
  const Steps& s = steps();
  PyObject* const known = item(s.without_options, reinterpret_cast<PyObject*>(Py_TYPE(f)));
  THPObjectPtr found(known ? Py_NewRef(known) : PyObject_CallOneArg(s.of_module, f));
  if (!found || !PyTuple_Check(found.get())) return nullptr;
  PyObject* const which = PyTuple_GET_ITEM(found.get(), 0);
  return which == Py_None ? Py_NewRef(x) : finish(x, which, PyTuple_GET_ITEM(found.get(), 1));
}

// `f(x)`; null, with or without an error, for what Python's `call` has to see. What has been
// computed for it by then stands in `x`.
inline PyObject* called(PyObject* f, PyObject* x) {
  const Steps& s = steps();
  THPObjectPtr kind(Py_XNewRef(item(s.kinds, reinterpret_cast<PyObject*>(Py_TYPE(f)))));
  if (!kind) return nullptr;
  PyObject* const handler = PyTuple_GET_ITEM(kind.get(), 0);
  if (handler != s.convolve && handler != s.normalize && handler != s.activate) return nullptr;
  THPObjectPtr attributes(PyObject_GenericGetDict(f, nullptr));
  if (!attributes || !is_plain(attributes.get(), Py_TYPE(f), PyTuple_GET_ITEM(kind.get(), 1))) {
    return nullptr;
  }
  if (handler == s.activate) return activate(f, x);
  return (handler == s.convolve ? to_convolve : to_normalize)(f, attributes.get(), x);
}

// ---- Sums

enum class Taken { kNo, kYes, kUnknown };

// Whether `x` is a layer that waits and adds nothing yet.
inline bool waits_alone(PyObject* x) {
  return waits(x) && slot(x, steps().of_normalized.other) == Py_None;
}

// Whether kernels take the sum of both.
inline bool are_a_pair(PyObject* n, PyObject* other) {
  const auto& at = steps().of_normalized;
  if (slot(other, at.folded) != Py_False || !is_tensor(slot(other, at.input))) return false;
  Layer layers[2];
  const bool known = read(n, layers[0]) && read(other, layers[1]);
  PyErr_Clear();
  if (!known) return false;
  const bool trained = layers[0].trains_affine() || layers[1].trains_affine();
  return !(trained && at::GradMode::is_enabled());
}

// Whether `n` adds `other`, unless one of them is folded. `second`: `other` comes first, and the
// sum is in its memory order.
inline Taken takes(PyObject* n, PyObject* other, bool second) {
  const auto& at = steps().of_normalized;
  if (!waits_alone(n) || n == other) return Taken::kNo;
  const bool pair = waits_alone(other);
  if (slot(n, at.folded) != Py_False || (pair && !are_a_pair(n, other))) return Taken::kUnknown;
  THPObjectPtr addend(pair ? Py_NewRef(slot(other, at.input)) : value_of(other));
  if (!addend || !is_tensor(addend.get()) || !is_tensor(slot(n, at.input))) return Taken::kUnknown;
  const Tensor& a = THPVariable_Unpack(addend.get());
  const Tensor& x = THPVariable_Unpack(slot(n, at.input));
  if (!is_ordinary(a) || !is_ordinary(x)) return Taken::kUnknown;
  if (a.sizes() != x.sizes() || a.scalar_type() != x.scalar_type() || a.device() != x.device() ||
      (second && a.strides() != x.strides())) {
    return Taken::kNo;
  }
  set(n, at.other, pair ? other : addend.get());
  if (pair) set(n, at.branch, slot(other, at.bn));
  return Taken::kYes;
}

// Whether a layer that waits may go on to wait while others are called.
inline bool is_settled(PyObject* x) {
  const auto& at = steps().of_normalized;
  return is_normalized(x) && slot(x, at.output) == Py_None && slot(x, at.conv) != Py_None &&
         slot(x, at.folded) == Py_False && slot(x, at.other) == Py_None;
}

// Whether nobody sees each call, as far as that can be told without Python's `watched`.
inline bool surely_unseen() {
  static PyObject *const kCall = name("__call__"), *const kImpl = name("_call_impl");
  const Steps& s = steps();
  return nothing_is_hooked_to_all() && looked_up(s.module, kCall) == s.module_call &&
         looked_up(s.module, kImpl) == s.call_impl && nobody_watches() && !forward_mode() &&
         !at::impl::torch_function_mode_enabled();
}

}  // namespace frozen_bn
