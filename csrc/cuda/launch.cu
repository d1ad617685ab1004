// Picks the instantiation and launches it. Torch-free.
#include "launch.h"

#include "kernels.cuh"

namespace frozen_bn::cuda {
namespace {

template <class Kernel, class Params>
void launch(Kernel kernel, const LaunchPlan& plan, const Params& params, cudaStream_t stream) {
  const dim3 grid(plan.grid_x, plan.grid_y), block(plan.block_x, plan.block_y);
  kernel<<<grid, block, 0, stream>>>(params);
}

// Calls f with a null pointer of the storage type.
template <class F>
cudaError_t with_storage(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kHalf: f(static_cast<__half*>(nullptr)); break;
    case Dtype::kBFloat16: f(static_cast<__nv_bfloat16*>(nullptr)); break;
    default: f(static_cast<float*>(nullptr));
  }
  return cudaGetLastError();
}

}  // namespace

Index make_index(const Layout& layout, const LaunchPlan& plan, bool vector_access) {
  Index index{};
  index.numel = layout.numel;
  index.inner = layout.inner;
  index.channels = layout.channels;
  index.wide = plan.wide;
  if (!plan.wide || plan.variant == Variant::kPeriodic) {
    index.by_inner = FastDivisor(static_cast<uint32_t>(layout.inner));
    index.by_channels = FastDivisor(static_cast<uint32_t>(layout.channels));
  }
  index.tile_inner = static_cast<uint32_t>(std::min<int64_t>(layout.inner, kTileSize));
  index.beyond_tile = layout.inner - index.tile_inner;
  index.by_tile_inner = FastDivisor(index.tile_inner);
  index.whole_tiles = vector_access ? static_cast<uint32_t>(layout.numel / kTileSize) : 0;
  index.whole_packs = vector_access ? layout.numel / kPackSize : 0;
  index.columns = plan.columns;
  index.vector_access = vector_access;
  return index;
}

cudaError_t launch_forward(
    Dtype dtype, const LaunchPlan& plan, const ForwardParams& params, cudaStream_t stream) {
  return with_storage(dtype, [&]<class T>(T*) {
    const auto launch_with = [&](auto act, auto residual) {
      launch(
          plan.variant == Variant::kPlanar
              ? frozen_bn_forward_planar_kernel<T, act.value, residual.value>
              : frozen_bn_forward_periodic_kernel<T, act.value, residual.value>,
          plan, params, stream);
    };
    if (params.residual) {
      dispatch_common(params.activation, [&](auto act) { launch_with(act, std::true_type{}); });
    } else {
      dispatch_activation(
          params.activation, [&](auto act) { launch_with(act, std::false_type{}); });
    }
  });
}

cudaError_t launch_forward_pair(
    Dtype dtype, const LaunchPlan& plan, const ForwardPairParams& params, cudaStream_t stream) {
  return with_storage(dtype, [&]<class T>(T*) {
    dispatch_common(params.activation, [&](auto act) {
      launch(
          plan.variant == Variant::kPlanar ? frozen_bn_forward_pair_planar_kernel<T, act.value>
                                           : frozen_bn_forward_pair_periodic_kernel<T, act.value>,
          plan, params, stream);
    });
  });
}

cudaError_t launch_backward(
    Dtype dtype, const LaunchPlan& plan, const BackwardParams& params, cudaStream_t stream) {
  return with_storage(dtype, [&]<class T>(T*) {
    const auto launch_with = [&](auto act, auto sums) {
      launch(
          plan.variant == Variant::kPlanar
              ? frozen_bn_backward_planar_kernel<T, act.value, sums.value>
              : frozen_bn_backward_periodic_kernel<T, act.value, sums.value>,
          plan, params, stream);
    };
    const Activation kind = gradient_kind(params.activation);
    if (params.partial_sums) {
      dispatch_common(kind, [&](auto act) { launch_with(act, std::true_type{}); });
    } else {
      dispatch_gradient(kind, [&](auto act) { launch_with(act, std::false_type{}); });
    }
  });
}

cudaError_t launch_backward_pair(
    Dtype dtype, const LaunchPlan& plan, const BackwardPairParams& params, cudaStream_t stream) {
  return with_storage(dtype, [&]<class T>(T*) {
    dispatch_common(gradient_kind(params.activation), [&](auto act) {
      launch(
          plan.variant == Variant::kPlanar ? frozen_bn_backward_pair_planar_kernel<T, act.value>
                                           : frozen_bn_backward_pair_periodic_kernel<T, act.value>,
          plan, params, stream);
    });
  });
}

cudaError_t launch_reduce(const ReduceParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<uint32_t>(ceil_div(params.channels, kReduceChannels));
  uint32_t rows = kMostReduceRows;
  while (rows > 1 && rows / 2 >= params.rows) rows /= 2;
  frozen_bn_reduce_kernel<<<blocks, dim3(kReduceChannels, rows), 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace frozen_bn::cuda
