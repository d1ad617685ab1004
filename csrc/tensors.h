// Small helpers on stable-ABI tensors that the operators of both backends share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dtype.h"
#include "layout.h"

namespace frozen_bn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Double: return Dtype::kDouble;
    default: return Dtype::kFloat;
  }
}

inline void* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->data_ptr() : nullptr;
}

inline std::optional<Layout> dense_layout(const Tensor& t) {
  return dense_layout(t.dim(), t.sizes().data(), t.strides().data());
}

inline Tensor empty_strided_like(const Tensor& t, const int64_t* strides) {
  AtenTensorHandle handle;
  int32_t device_type, dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      t.dim(), t.sizes().data(), strides, dtype, device_type, t.get_device_index(), &handle));
  return Tensor(handle);
}

// `t` itself where it has the strides of `dense`, a tensor of its shape; else a copy that has.
inline Tensor with_strides_of(const Tensor& dense, const Tensor& t) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d) {
    same = same && (t.size(d) == 1 || t.stride(d) == dense.stride(d));
  }
  if (same) return t;
  Tensor copy = empty_strided_like(t, dense.strides().data());
  torch::stable::copy_(copy, t);
  return copy;
}

// A gapless copy, as far as can be with the same order of dimensions.
inline Tensor make_dense(const Tensor& t) {
  return with_strides_of(torch::stable::empty_like(t), t);
}

inline Tensor gapless(const Tensor& vector) {
  return vector.is_contiguous() ? vector : torch::stable::contiguous(vector);
}

}  // namespace frozen_bn
