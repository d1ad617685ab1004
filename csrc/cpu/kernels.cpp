// Which of the compiled kernel sets runs.
#include "kernels.h"

#include <atomic>
#include <cstring>

namespace frozen_bn::cpu {

extern const Kernels kPortableKernels;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FROZEN_BN_X86_KERNELS
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

namespace {

const Kernels* find_kernels(const char* name) {
  const auto matches = [&](const Kernels& k) { return !name || !std::strcmp(name, k.name); };
#ifdef FROZEN_BN_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && matches(kAvx512Bf16Kernels)) return &kAvx512Bf16Kernels;
  if (avx512 && matches(kAvx512Kernels)) return &kAvx512Kernels;
  if (avx2 && matches(kAvx2Kernels)) return &kAvx2Kernels;
#endif
  return matches(kPortableKernels) ? &kPortableKernels : nullptr;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{find_kernels(nullptr)};
  return kernels;
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  if (dtype == Dtype::kDouble) return kPortableKernels;
  const Kernels& found = *selected().load(std::memory_order_relaxed);
#ifdef FROZEN_BN_X86_KERNELS
  if (&found == &kAvx512Bf16Kernels && dtype != Dtype::kBFloat16) return kAvx512Kernels;
#endif
  return found;
}

const char* level() {
  return selected().load(std::memory_order_relaxed)->name;
}

bool select_kernels(const char* name) {
  const Kernels* found = find_kernels(name);
  if (found) selected() = found;
  return found;
}

}  // namespace frozen_bn::cpu
