// The launches: raw pointers and a stream. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

#include "../affine.h"
#include "params.h"

namespace frozen_bn::cuda {

// `vector_access`: every tensor is aligned to 16 bytes.
Index make_index(const Layout& layout, const LaunchPlan& plan, bool vector_access);

cudaError_t launch_forward(
    Dtype dtype, const LaunchPlan& plan, const ForwardParams& params, cudaStream_t stream);

cudaError_t launch_forward_pair(
    Dtype dtype, const LaunchPlan& plan, const ForwardPairParams& params, cudaStream_t stream);

cudaError_t launch_backward_pair(
    Dtype dtype, const LaunchPlan& plan, const BackwardPairParams& params, cudaStream_t stream);

cudaError_t launch_backward(
    Dtype dtype, const LaunchPlan& plan, const BackwardParams& params, cudaStream_t stream);

cudaError_t launch_reduce(const ReduceParams& params, cudaStream_t stream);

}  // namespace frozen_bn::cuda
