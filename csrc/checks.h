// The input checks of both backends. frozen_bn/checks.py says the same, in the same words, for the
// paths that do not come here. A failed check throws before anything is written.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "affine.h"
#include "tensors.h"

namespace frozen_bn {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "frozen_bn::";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const int64_t* sizes, size_t dim) {
  std::ostringstream text;
  text << "[";
  for (size_t d = 0; d < dim; ++d) text << (d ? ", " : "") << sizes[d];
  text << "]";
  return text.str();
}

inline std::string shape_text(const Tensor& t) {
  return shape_text(t.sizes().data(), t.dim());
}

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: break;
  }
  std::string name = torch::headeronly::toString(dtype);
  std::transform(name.begin(), name.end(), name.begin(), ::tolower);
  return name;
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

inline std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  const std::string index = std::to_string(t.get_device_index());
  return (t.is_cuda() ? "cuda:" : "device:") + index;
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
  if (!is_supported(t.scalar_type())) {
    fail(
        op, ": expected ", name, " to be float16, bfloat16, float32 or float64, but got ",
        dtype_text(t.scalar_type()));
  }
}

inline int32_t device_type(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  if (device_type(t) != device_type(input) || t.get_device_index() != input.get_device_index()) {
    fail(op, ": expected ", name, " to be on ", device_text(input), ", but got ", device_text(t));
  }
}

inline void check_rank(const char* op, const char* name, const Tensor& t) {
  if (t.dim() < 2) {
    fail(op, ": expected ", name, " to have at least 2 dimensions, but got shape ", shape_text(t));
  }
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  const auto expected = like.sizes(), got = t.sizes();
  if (!(got.size() == expected.size() && std::equal(got.begin(), got.end(), expected.begin()))) {
    fail(op, ": expected ", name, " to have shape ", shape_text(like), ", but got ", shape_text(t));
  }
}

// A tensor that has to match `input` in everything but strides.
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  check_shape(op, name, t, input);
  if (t.scalar_type() != input.scalar_type()) {
    fail(
        op, ": expected ", name, " to be ", dtype_text(input.scalar_type()), ", but got ",
        dtype_text(t.scalar_type()));
  }
  check_device(op, name, t, input);
}

inline void check_not_given(const char* op, const char* name, const std::optional<Tensor>& t) {
  if (t) fail(op, ": expected no ", name, " of a pair, but got shape ", shape_text(*t));
}

inline void check_given(const char* op, const char* name, const std::optional<Tensor>& t) {
  if (!t) fail(op, ": expected ", name, ", but got None");
}

inline void check_channel_vector(
    const char* op, const char* name, const Tensor& t, const Tensor& input) {
  const int64_t channels = input.size(1);
  if (t.dim() != 1 || t.size(0) != channels) {
    fail(
        op, ": expected ", name, " to have shape ", shape_text(&channels, 1), ", but got ",
        shape_text(t));
  }
  check_dtype(op, name, t);
  check_device(op, name, t, input);
}

inline void check_channel_gradient(
    const char* op, const char* name, const Tensor& t, const Tensor& grad_output) {
  check_channel_vector(op, name, t, grad_output);
  if (!t.is_contiguous()) {
    fail(op, ": expected ", name, " to be contiguous, but got stride [", t.stride(0), "]");
  }
}

inline ScalarType arithmetic_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A gapless tensor of this dtype and shape: what only the package's own Python hands over.
inline void check_internal(
    const char* op, const char* name, const Tensor& t, ScalarType dtype,
    std::initializer_list<int64_t> shape, const Tensor& input) {
  if (t.scalar_type() != dtype || !t.is_contiguous() || !has_shape(t, shape)) {
    fail(
        op, ": expected ", name, " to be contiguous ", dtype_text(dtype), " of shape ",
        shape_text(shape.begin(), shape.size()), ", but got ", dtype_text(t.scalar_type()),
        " of shape ", shape_text(t));
  }
  check_device(op, name, t, input);
}

inline void check_coefficients(const char* op, const Tensor& t, const Tensor& input, bool pair) {
  const int64_t rows = pair ? int64_t{kPairRows} : int64_t{kRows};
  check_internal(op, "coefficients", t, arithmetic_dtype(input), {rows, input.size(1)}, input);
}

inline void check_mask(const char* op, const Tensor& t, const Tensor& input) {
  check_internal(op, "mask", t, ScalarType::Byte, {ceil_div(input.numel(), 8)}, input);
}

// Writing in place to an element that stands for several would write it several times.
inline void check_not_expanded(const char* op, const char* name, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1 && t.numel() > 0) {
      fail(
          op, ": expected ", name, " not to be expanded in memory, but got strides ",
          shape_text(t.strides().data(), t.dim()));
    }
  }
}

inline Activation check_activation(const char* op, int64_t activation) {
  if (activation < 0 || activation >= kActivations) {
    fail(
        op, ": expected activation to be a code from 0 to ", kActivations - 1, ", but got ",
        activation);
  }
  return static_cast<Activation>(activation);
}

inline void check_eps(const char* op, const char* name, double eps) {
  if (!(eps >= 0 && std::isfinite(eps))) {
    fail(op, ": expected ", name, " to be finite and >= 0, but got ", std::isnan(eps) ? NAN : eps);
  }
}

}  // namespace frozen_bn
