// The kernels for AVX2.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Library headers first: what they define must not be compiled for a machine that may not be there.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#pragma GCC target("avx2,fma,f16c")
#define FROZEN_BN_CPU_LEVEL 1
#include "kernels_impl.h"

namespace frozen_bn::cpu {

extern const Kernels kAvx2Kernels{"avx2", coefficients, forward, backward};

}  // namespace frozen_bn::cpu
#endif
