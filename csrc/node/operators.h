// Calls of the package's operators on torch's own tensors, through the dispatcher; and the tensors
// that they write to.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "../affine.h"

namespace frozen_bn {

using at::Tensor;

// Whether it is nothing but a block of memory on a device that there are kernels for: no wrapper,
// no batch of tensors, not sparse, no lazy zeros.
inline bool is_ordinary(const Tensor& t) {
  using c10::BackendComponent;
  static const uint64_t kOrdinary =
      (c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::DispatchKeySet(c10::DispatchKey::CUDA) |
       c10::getAutogradRelatedKeySetFromBackend(BackendComponent::CPUBit) |
       c10::getAutogradRelatedKeySetFromBackend(BackendComponent::CUDABit) |
       c10::getAutocastRelatedKeySetFromBackend(BackendComponent::CPUBit) |
       c10::getAutocastRelatedKeySetFromBackend(BackendComponent::CUDABit))
          .raw_repr();
  return (t.key_set().raw_repr() & ~kOrdinary) == 0;
}

// Whether no mode, tracer or transform of this thread has to see what is called.
inline bool nobody_watches() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_.raw_repr();
  return (included & ~c10::default_included_set.raw_repr()) == 0;
}

// What is made below is nobody's yet, and an operator's kernel has nothing to do with autograd.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// Not through the dispatcher where that is possible: it takes half the time.
inline bool makes_at_once(const Tensor& like) {
  return like.is_cpu() && nobody_watches();
}

inline Tensor make(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& like) {
  if (makes_at_once(like)) return Tensor(at::detail::empty_cpu(sizes, dtype));
  return at::empty(sizes, like.options().dtype(dtype));
}

inline Tensor make(
    at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype, const Tensor& like) {
  if (makes_at_once(like)) return Tensor(at::detail::empty_strided_cpu(sizes, strides, dtype));
  return at::empty_strided(sizes, strides, like.options().dtype(dtype));
}

inline Tensor make_like(const Tensor& t) {
  if (!t.is_non_overlapping_and_dense()) return at::empty_like(t);
  return make(t.sizes(), t.strides(), t.scalar_type(), t);
}

// From here on an operator may run for long enough to let other Python threads go on.
constexpr int64_t kLongElements = 32768;

inline bool takes_long(const Tensor& t) {
  return !t.is_cpu() || t.numel() >= kLongElements;
}

// A call of an operator: what is pushed are its arguments.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op) {
    stack_.reserve(kMostArguments);
  }
  Call& operator<<(double value) {
    stack_.emplace_back(value);
    return *this;
  }
  Call& operator<<(int64_t value) {
    stack_.emplace_back(value);
    return *this;
  }
  Call& operator<<(const Tensor* tensor) {
    if (tensor == nullptr) {
      stack_.emplace_back();
    } else {
      stack_.emplace_back(*tensor);
    }
    return *this;
  }
  // One that need not be there.
  Call& operator<<(const Tensor& tensor) {
    return *this << (tensor.defined() ? &tensor : nullptr);
  }
  void run() {
    op_.callBoxed(stack_);
  }

 private:
  static constexpr size_t kMostArguments = 17;
  const c10::OperatorHandle& op_;
  torch::jit::Stack stack_;
};

inline c10::OperatorHandle find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

inline const c10::OperatorHandle& forward_operator() {
  static const c10::OperatorHandle op = find_operator("frozen_bn::forward");
  return op;
}

inline const c10::OperatorHandle& forward_pair_operator() {
  static const c10::OperatorHandle op = find_operator("frozen_bn::forward_pair");
  return op;
}

inline const c10::OperatorHandle& backward_operator() {
  static const c10::OperatorHandle op = find_operator("frozen_bn::backward");
  return op;
}

}  // namespace frozen_bn
