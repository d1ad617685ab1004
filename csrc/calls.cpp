// Calls of the operators from Python. torch.ops looks up an overload, matches every argument to the
// schema, and has each tensor argument take the GIL back when the call ends: on a small tensor that
// is more than all else. These call the dispatcher themselves, and make the tensors for the results
// on the way. They take plain dense tensors; for all else they call `slow`, the same in Python
// (frozen_bn/ops.py). So they do before torch 2.14, whose stable ABI was the first to hand over
// Python's tensors.
#include "calls.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>
#include <torch/headeronly/version.h>

#include <cstring>
#include <memory>
#include <string>

#include "affine.h"
#include "layout.h"

extern "C" {
// Null before torch 2.14. (Its header hides them from what is built for 2.10 too.)
__attribute__((weak)) AOTITorchError torch_tensor_from_pyobject(void*, AtenTensorHandle*);
__attribute__((weak)) AOTITorchError torch_tensor_to_pyobject(AtenTensorHandle, void*, void**);
}

namespace frozen_bn {
namespace {

// From here on an operator may run for long enough to let other Python threads go on.
constexpr int64_t kReleaseElements = 32768;

PyObject* tensor_type = nullptr;
PyObject* count_modes = nullptr;

// Whether nobody watches: a TorchDispatchMode has to see the tensors being made, too.
bool is_plain(PyObject* tensor) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_type) return false;
  const auto modes =
      pybind11::reinterpret_steal<pybind11::object>(PyObject_CallNoArgs(count_modes));
  return modes && PyLong_AsLong(modes.ptr()) == 0;
}

bool ok(AOTITorchError error) {
  return error == TORCH_SUCCESS;
}

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const {
    aoti_torch_delete_tensor_object(tensor);
  }
};
using OwnTensor = std::unique_ptr<AtenTensorOpaque, DeleteTensor>;

OwnTensor from_python(PyObject* object) {
  AtenTensorHandle handle = nullptr;
  return OwnTensor(ok(torch_tensor_from_pyobject(object, &handle)) ? handle : nullptr);
}

template <class T>
StableIValue stable(T value) {
  StableIValue bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// What results are made like.
struct Like {
  int64_t dim = 0, numel = 1;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0, device_type = 0, device_index = 0;

  // False for a tensor that is no block of memory.
  bool read(AtenTensorHandle t) {
    const bool read = ok(aoti_torch_get_dim(t, &dim)) && ok(aoti_torch_get_sizes(t, &sizes)) &&
                      ok(aoti_torch_get_strides(t, &strides)) &&
                      ok(aoti_torch_get_dtype(t, &dtype)) &&
                      ok(aoti_torch_get_device_type(t, &device_type)) &&
                      ok(aoti_torch_get_device_index(t, &device_index));
    for (int64_t d = 0; read && d < dim; ++d) numel *= sizes[d];
    return read;
  }

  bool on_cpu() const {
    return device_type == aoti_torch_device_type_cpu();
  }

  OwnTensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) const {
    AtenTensorHandle made = nullptr;
    const AOTITorchError error =
        aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &made);
    return OwnTensor(ok(error) ? made : nullptr);
  }
};

// The arguments of an operator.
class Call {
 public:
  Call() = default;
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    for (int i = 0; i < size_; ++i) {
      if (kinds_[i] == 't') {
        DeleteTensor{}(to<AtenTensorHandle>(stack_[i]));
      } else if (kinds_[i] == 'o' && stack_[i]) {
        const std::unique_ptr<StableIValue> value(to<StableIValue*>(stack_[i]));
        DeleteTensor{}(to<AtenTensorHandle>(*value));
      }
    }
  }

  // One of each kind: t, a tensor; o, a tensor or None; d, a float; i, an int. False if that is
  // not what they are.
  bool push(const char* kinds, PyObject* const* arguments) {
    for (; *kinds; ++kinds, ++arguments) {
      if (*kinds == 'd') {
        put(*kinds, stable(PyFloat_AsDouble(*arguments)));
      } else if (*kinds == 'i') {
        put(*kinds, stable<int64_t>(PyLong_AsLongLong(*arguments)));
      } else if (*kinds == 'o' && *arguments == Py_None) {
        put(*kinds, 0);
      } else if (OwnTensor tensor = from_python(*arguments)) {
        push(*kinds, std::move(tensor));
      } else {
        return false;
      }
    }
    return !PyErr_Occurred();
  }

  void push(char kind, OwnTensor tensor) {
    const StableIValue value = tensor ? stable(tensor.release()) : 0;
    put(kind, kind == 'o' && value ? stable(new StableIValue(value)) : value);
  }

  // A result, which the operator will fill: for Python too. False if it could not be made.
  bool push(char kind, OwnTensor made, pybind11::object& python) {
    void* object = nullptr;
    if (!made || !ok(torch_tensor_to_pyobject(made.get(), nullptr, &object))) return false;
    python = pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object));
    push(kind, std::move(made));
    return true;
  }

  bool push_if(bool wanted, OwnTensor made, pybind11::object& python) {
    if (wanted) return push('o', std::move(made), python);
    push('o', nullptr);
    return true;
  }

  // False if the operator failed.
  bool run(const char* op, bool release_gil) {
    size_ = 0;  // the dispatcher takes what was pushed
    PyThreadState* const released = release_gil ? PyEval_SaveThread() : nullptr;
    const AOTITorchError error = torch_call_dispatcher(op, "", stack_, TORCH_ABI_VERSION);
    if (released) PyEval_RestoreThread(released);
    return ok(error);
  }

 private:
  template <class T>
  static T to(StableIValue bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  }

  void put(char kind, StableIValue value) {
    kinds_[size_] = kind;
    stack_[size_++] = value;
  }

  static constexpr int kMost = 20;
  StableIValue stack_[kMost];
  char kinds_[kMost];
  int size_ = 0;
};

PyObject* call_slow(PyObject* slow, PyObject* const* arguments, Py_ssize_t count) {
  PyErr_Clear();
  return PyObject_Vectorcall(slow, arguments, count, nullptr);
}

// An operator fails before it writes anything, and here its error comes as the Python exception
// that it is.
PyObject* fail_slow(PyObject* slow, PyObject* const* arguments, Py_ssize_t count) {
  return PyErr_Occurred() ? nullptr : call_slow(slow, arguments, count);
}

// What both forward operators have in common: their arguments are of `kinds`; after these Python
// gives inplace and save. (..., inplace, save) -> (output, coefficients or None, mask or None)
template <int64_t kCoefficientRows>
PyObject* call_forward(
    const char* op, const char* kinds, PyObject* slow, PyObject* const* arguments,
    Py_ssize_t count) {
  const Py_ssize_t inputs = static_cast<Py_ssize_t>(std::strlen(kinds));
  if (count != inputs + 2 || !is_plain(arguments[0])) return call_slow(slow, arguments, count);
  const bool inplace = PyObject_IsTrue(arguments[inputs]) == 1;
  const bool save = PyObject_IsTrue(arguments[inputs + 1]) == 1;
  const int64_t code = PyLong_AsLongLong(arguments[inputs - 2]);
  OwnTensor input = from_python(arguments[0]);
  Like like;
  Call call;
  if (!input || !like.read(input.get()) || like.dim < 2 || like.numel == 0 ||
      !dense_layout(like.dim, like.sizes, like.strides) || !call.push(kinds, arguments)) {
    return call_slow(slow, arguments, count);
  }
  const bool masked = save && needs_mask(static_cast<Activation>(code));
  OwnTensor made_coefficients, made_mask;
  // Before the output: behind it, they would keep malloc from giving its place to the next call.
  if (save) {
    const int32_t type = like.dtype == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64()
                                                                  : aoti_torch_dtype_float32();
    const int64_t shape[] = {kCoefficientRows, like.sizes[1]}, strides[] = {like.sizes[1], 1};
    made_coefficients = like.empty(2, shape, strides, type);
  }
  if (masked) {
    const int64_t bytes = ceil_div(like.numel, 8), stride = 1;
    made_mask = like.empty(1, &bytes, &stride, aoti_torch_dtype_uint8());
  }
  pybind11::object output = pybind11::none(), coefficients = output, mask = output;
  if (inplace) {
    output = pybind11::reinterpret_borrow<pybind11::object>(arguments[0]);
    call.push('t', std::move(input));
  } else if (!call.push('t', like.empty(like.dim, like.sizes, like.strides, like.dtype), output)) {
    return call_slow(slow, arguments, count);
  }
  if (!call.push_if(save, std::move(made_coefficients), coefficients) ||
      !call.push_if(masked, std::move(made_mask), mask)) {
    return call_slow(slow, arguments, count);
  }
  if (!call.run(op, !like.on_cpu() || like.numel >= kReleaseElements)) {
    return fail_slow(slow, arguments, count);
  }
  return PyTuple_Pack(3, output.ptr(), coefficients.ptr(), mask.ptr());
}

PyObject* forward(PyObject* slow, PyObject* const* arguments, Py_ssize_t count) {
  return call_forward<kRows>("frozen_bn::forward", "tttooodid", slow, arguments, count);
}

PyObject* forward_pair(PyObject* slow, PyObject* const* arguments, Py_ssize_t count) {
  return call_forward<kPairRows>(
      "frozen_bn::forward_pair", "tttoodtttoodid", slow, arguments, count);
}

// (grad_output, coefficients, mask, input, residual, activation, negative_slope, grad_weight,
// grad_bias, strides, with_grad_input, with_grad_residual) -> (grad_input or None, grad_residual or
// None), of those strides.
PyObject* backward(PyObject* slow, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 12;
  int64_t strides[kMaxDimensions];
  Like like;
  Call call;
  if (count != kArguments || !is_plain(arguments[0])) return call_slow(slow, arguments, count);
  const OwnTensor grad_output = from_python(arguments[0]);
  PyObject* const given = arguments[9];
  if (!grad_output || !like.read(grad_output.get()) || like.dim > kMaxDimensions ||
      !PyTuple_Check(given) || PyTuple_GET_SIZE(given) != like.dim ||
      !call.push("ttoooid", arguments)) {
    return call_slow(slow, arguments, count);
  }
  for (int64_t d = 0; d < like.dim; ++d) {
    strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(given, d));
  }
  const auto empty_if = [&](bool wanted) {
    return wanted ? like.empty(like.dim, like.sizes, strides, like.dtype) : nullptr;
  };
  const bool with_input = PyObject_IsTrue(arguments[10]) == 1;
  const bool with_residual = PyObject_IsTrue(arguments[11]) == 1;
  pybind11::object grad_input = pybind11::none(), grad_residual = grad_input;
  if (!call.push_if(with_input, empty_if(with_input), grad_input) ||
      !call.push("oo", arguments + 7) ||
      !call.push_if(with_residual, empty_if(with_residual), grad_residual)) {
    return call_slow(slow, arguments, count);
  }
  if (!call.run("frozen_bn::backward", !like.on_cpu() || like.numel >= kReleaseElements)) {
    return fail_slow(slow, arguments, count);
  }
  return PyTuple_Pack(2, grad_input.ptr(), grad_residual.ptr());
}

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, FastFunction function) {
  return {
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
      nullptr};
}

pybind11::object calling(const std::string& name, pybind11::object slow) {
  static PyMethodDef methods[] = {
      method("forward", &forward), method("forward_pair", &forward_pair),
      method("backward", &backward)};
  if (!torch_tensor_from_pyobject || !torch_tensor_to_pyobject) return slow;
  for (PyMethodDef& definition : methods) {
    if (name == definition.ml_name) {
      return pybind11::reinterpret_steal<pybind11::object>(
          PyCFunction_New(&definition, slow.ptr()));
    }
  }
  throw pybind11::key_error("frozen_bn: no operator is called " + name);
}

}  // namespace

void define_calls(pybind11::module_& module) {
  const pybind11::module_ torch = pybind11::module_::import("torch");
  tensor_type = pybind11::object(torch.attr("Tensor")).release().ptr();
  count_modes =
      pybind11::object(torch.attr("_C").attr("_len_torch_dispatch_stack")).release().ptr();
  module.def("calling", &calling, pybind11::arg("name"), pybind11::arg("slow"));
}

}  // namespace frozen_bn
