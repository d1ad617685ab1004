// The index model: a dense tensor is its flat storage, and element `i` has channel
// `(i / inner) % channels`. `inner` is H*W for a contiguous NCHW tensor and 1 for channels_last;
// any other dense order of the dimensions fits as well. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace frozen_bn {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t kMaxDimensions = 64;  // of more than one element each: more do not fit 64 bits

struct Layout {
  int64_t numel;
  int64_t channels;
  int64_t inner;
};

// The layout of a tensor whose dimension 1 is the channel, or nothing where its elements are not
// one gapless block (sliced, expanded): such a tensor has to be made dense first.
inline std::optional<Layout> dense_layout(
    int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t numel = 1;
  for (int64_t d = 0; d < dim; ++d) numel *= sizes[d];
  if (numel == 0) return Layout{0, sizes[1], 1};
  int64_t order[kMaxDimensions];
  int64_t used = 0;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != 1) order[used++] = d;
  }
  std::sort(order, order + used, [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t gapless_stride = 1;
  for (int64_t k = 0; k < used; ++k) {
    if (strides[order[k]] != gapless_stride) return std::nullopt;
    gapless_stride *= sizes[order[k]];
  }
  return Layout{numel, sizes[1], sizes[1] > 1 ? strides[1] : numel};
}

}  // namespace frozen_bn
