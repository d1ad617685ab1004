// The element types that the kernels know. Torch-free.
#pragma once

namespace frozen_bn {

enum class Dtype { kFloat, kHalf, kBFloat16, kDouble };

}  // namespace frozen_bn
