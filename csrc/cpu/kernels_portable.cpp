// The kernels for any machine: SSE2 on x86, NEON on ARM.
#define FROZEN_BN_CPU_LEVEL 0
#include "kernels_impl.h"

namespace frozen_bn::cpu {

extern const Kernels kPortableKernels{"portable", coefficients, forward, backward};

}  // namespace frozen_bn::cpu
