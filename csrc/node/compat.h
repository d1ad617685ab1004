// What differs between the torch versions that the autograd node is compiled against: the one place
// that knows. Told by the types and functions that are there, not by version numbers.
#pragma once

#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace frozen_bn {

using torch::autograd::Node;

// std::shared_ptr<Node> up to torch 2.13, c10::intrusive_ptr<Node> from 2.14 on.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class T, class Pointer = NodePtr>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    // The deleter keeps a long graph from recursing as deep as it is long.
    return std::shared_ptr<T>(new T, [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

// torch.autograd.graph.node_creation_hook, from 2.14 on.
template <class Pointer>
void announce(const Pointer& node) {
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
}

// `output` is fresh.
inline void attach(const at::Tensor& output, const NodePtr& node) {
  torch::autograd::set_history(output, node);
  announce(node);
}

// `input` was written over. What is announced is what was attached: for a view, a node around ours.
template <class Pointer>
void attach_to_overwritten(const at::Tensor& input, const Pointer& node) {
  const auto rebase = [&](const NodePtr& to) {
    return torch::autograd::impl::rebase_history(input, {to, 0});
  };
  node->add_input_metadata(input);
  if constexpr (std::is_void_v<decltype(rebase(node))>) {  // up to 2.13
    rebase(node);
  } else {
    announce(rebase(node));
  }
}

// Whether a level of forward-mode differentiation is open.
template <class Level = torch::autograd::ForwardADLevel>
bool forward_mode() {
  if constexpr (requires { Level::has_any_level(); }) {
    return Level::has_any_level();
  } else {
    return Level::try_get_by_idx(0) != nullptr;
  }
}

// Whether we have the only reference to a tensor. From 2.14 on a Python object that nobody has any
// more, but that lives as long as its tensor, counts as another one.
template <class T>
bool is_nobody_elses(const T& tensor) {
  if constexpr (requires { torch::autograd::impl::is_tensor_stealable(tensor); }) {
    return torch::autograd::impl::is_tensor_stealable(tensor);
  } else {
    return tensor.use_count() == 1;
  }
}

}  // namespace frozen_bn
