// Small helpers on stable-ABI tensors that the operators of both backends share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

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

inline Tensor empty_strided(
    const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype, const Tensor& like) {
  AtenTensorHandle handle;
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, code, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// `t` must be dense.
inline Tensor empty_dense(const Tensor& t) {
  return empty_strided(
      t.sizes().data(), t.strides().data(), t.dim(), t.scalar_type(), t);
}

inline Tensor empty_contiguous(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return empty_strided(sizes.data(), strides.data(), sizes.size(), dtype, like);
}

// `t` itself where its strides are those given, else a copy that has them.
inline Tensor with_strides(const Tensor& t, const std::vector<int64_t>& strides) {
  bool same = true;
  for (int64_t d = 0; d < t.dim(); ++d) {
    same = same && (t.size(d) == 1 || t.stride(d) == strides[d]);
  }
  if (same) return t;
  Tensor copy = empty_strided(t.sizes().data(), strides.data(), t.dim(), t.scalar_type(), t);
  torch::stable::copy_(copy, t);
  return copy;
}

inline std::vector<int64_t> strides_of(const Tensor& t) {
  return {t.strides().begin(), t.strides().end()};
}

// A dense tensor with the elements, and as far as can be the order of dimensions, of `t`.
inline Tensor make_dense(const Tensor& t) {
  return with_strides(t, strides_of(torch::stable::empty_like(t)));
}

inline Tensor gapless(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> gapless(const std::optional<Tensor>& t) {
  return t ? std::optional(gapless(*t)) : t;
}

}  // namespace frozen_bn
