// The kernels for AVX-512 with its bfloat16 conversions (Zen 4, Sapphire Rapids and later).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Library headers first: what they define must not be compiled for a machine that may not be there.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#pragma GCC target("avx512f,avx512bf16,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FROZEN_BN_CPU_LEVEL 3
#include "kernels_impl.h"

namespace frozen_bn::cpu {

extern const Kernels kAvx512Bf16Kernels{"avx512_bf16", coefficients, forward, backward};

}  // namespace frozen_bn::cpu
#endif
