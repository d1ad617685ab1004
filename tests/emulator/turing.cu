// Those of the project's kernels that are written in another way for sm_75, which has neither
// max.NaN nor cvt.relu.
#include "../../csrc/cuda/kernels.cuh"

namespace frozen_bn::cuda {
namespace {

#define INSTANTIATE(T)                                                                     \
  template __global__ void frozen_bn_forward_planar_kernel<T, Activation::kRelu, false>(   \
      const __grid_constant__ ForwardParams);                                              \
  template __global__ void frozen_bn_forward_periodic_kernel<T, Activation::kRelu, false>( \
      const __grid_constant__ ForwardParams);

INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace
}  // namespace frozen_bn::cuda
