// What packs need of their channels, and where they get it. Torch-free.
#pragma once

#include "../affine.h"
#include "index.cuh"

namespace frozen_bn::cuda {
namespace {

// What the arithmetic needs of a channel.
struct Channel {
  float mean, scale, bias;
};

// 1 / sqrt(var + eps), and its product with the weight, each rounded about once, as the CPU has
// them from double: what sum, root, quotient and product lose is known exactly (Knuth's two-sum,
// fused multiply-add), and added to first order.
struct Scale {
  float inv_std, scale;

  __device__ Scale(float var, float eps, float weight) {
    const float sum = var + eps;
    const float back = sum - var;
    const float sum_lost = (var - (sum - back)) + (eps - back);
    const float inverse = inverse_std(var, eps);
    const float root = __fmul_rn(sum, inverse);
    const float root_lost = __fmaf_rn(sum, inverse, -root);
    const float rest = __fmaf_rn(-root, inverse, 1.0f) - (root_lost + sum_lost * inverse) * inverse;
    const float correction = 0.5f * inverse * rest;
    const float product = __fmul_rn(weight, inverse);
    const float product_lost = __fmaf_rn(weight, inverse, -product);
    const float scale_correction = product_lost + weight * correction;
    const bool finite = isfinite(scale_correction);  // or there is nothing to correct
    inv_std = inverse + (finite ? correction : 0.0f);
    scale = product + (finite ? scale_correction : 0.0f);
  }
};

// Read from the rows that the forward saved.
__device__ inline Channel find_channel(const BackwardParams& p, int64_t channel, bool) {
  const float* row = p.coefficients + channel;
  return {row[kMean], row[kScale * p.index.channels], row[kBias * p.index.channels]};
}

// One channel's values of the vectors.
struct Vectors {
  float mean = 0, var = 0, weight = 1, bias = 0;

  __device__ Vectors(const BranchVectors& v, int64_t channel) {
    if (v.all_float) {
      mean = load_float(v.mean, channel);
      var = load_float(v.var, channel);
      if (v.weight.data) weight = load_float(v.weight, channel);
      if (v.bias.data) bias = load_float(v.bias, channel);
      return;
    }
    // One after the other: unrolled, it is four times as much to compile.
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const ChannelVector& vector = i == 0 ? v.mean : i == 1 ? v.var : i == 2 ? v.weight : v.bias;
      if (!vector.data) continue;
      const float value = load_channel(vector, channel);
      if (i == 0) mean = value;
      if (i == 1) var = value;
      if (i == 2) weight = value;
      if (i == 3) bias = value;
    }
  }
};

struct BranchChannel {
  Channel channel;
  float inv_std;

  __device__ BranchChannel(const BranchVectors& vectors, int64_t number) {
    const Vectors v(vectors, number);
    const Scale scale(v.var, vectors.eps, v.weight);
    channel = {v.mean, scale.scale, v.bias};
    inv_std = scale.inv_std;
  }
};

// Computed; saved for the backward as well if `save`.
__device__ inline Channel find_channel(const ForwardParams& p, int64_t channel, bool save) {
  const BranchChannel branch(p.vectors, channel);
  const Channel& found = branch.channel;
  if (save && p.coefficients) {
    float* row = p.coefficients + channel;
    row[kMean] = found.mean;
    row[kScale * p.index.channels] = found.scale;
    row[kBias * p.index.channels] = found.bias;
    row[kInvStd * p.index.channels] = branch.inv_std;
  }
  return found;
}

// Of a pair; `bias` is the sum of both.
struct PairChannel : Channel {
  float residual_mean, residual_scale;
};

__device__ inline PairChannel find_channel(const BackwardPairParams& p, int64_t channel, bool) {
  const float* row = p.coefficients + channel;
  const Channel own = find_channel(static_cast<const BackwardParams&>(p), channel, false);
  return {own, row[kResidualMean * p.index.channels], row[kResidualScale * p.index.channels]};
}

__device__ inline PairChannel find_channel(const ForwardPairParams& p, int64_t channel, bool save) {
  Channel own = BranchChannel(p.vectors, channel).channel;
  const Channel residual = BranchChannel(p.residual_vectors, channel).channel;
  own.bias += residual.bias;
  if (save && p.coefficients) {
    float* row = p.coefficients + channel;
    row[kMean] = own.mean;
    row[kScale * p.index.channels] = own.scale;
    row[kBias * p.index.channels] = own.bias;
    row[kResidualMean * p.index.channels] = residual.mean;
    row[kResidualScale * p.index.channels] = residual.scale;
  }
  return {own, residual.mean, residual.scale};
}

// What a pack needs of its channels: with_channels(body) hands body what gives it each lane's.

// Where a pack lies in one channel, and where it spans two. is_first(lane) says which.
template <class C>
struct OneChannel {
  C channel;
  __device__ C operator()(int) const {
    return channel;
  }
  static __device__ bool is_first(int) {
    return true;
  }
};
template <class C>
struct TwoChannels {
  C first, second;
  uint32_t split;
  __device__ C operator()(int lane) const {
    return is_first(lane) ? first : second;
  }
  __device__ bool is_first(int lane) const {
    return lane == 0 || lane < split;
  }
};

// The channels of a tile's runs.
struct PlanarTable {
  float4 channels[kMaxTileRuns];  // what is read together lies together

  __device__ Channel operator[](uint32_t run) const {
    const float4 found = channels[run];
    return {found.x, found.y, found.z};
  }
  __device__ void put(uint32_t run, const Channel& found) {
    channels[run] = {found.mean, found.scale, found.bias, found.bias};  // four for one access
  }
};

// Each channel is saved where its run of the first sample begins.
template <class Params, class Table>
__device__ void fill(const Params& p, const Tile& tile, Table& table) {
  for (uint32_t run = threadIdx.x; tile.has(p.index, run); run += kThreads) {
    const RunPlace place = tile.place_of(p.index, run);
    const bool begins = run > 0 || tile.starts_run;
    table.put(run, find_channel(p, place.channel, place.sample == 0 && begins));
  }
  __syncthreads();
}

// The channels of one pack of a tile, which starts behind the first `passed` elements of a run.
template <class Table, class At>
struct PlanarChannels {
  const Table& table;
  At at;
  uint32_t run, passed, inner;

  template <bool kTogether = false, class Body>
  __device__ void with_channels(Body body) const {
    const bool crosses = passed > inner - at.count;
    const auto first = table[run];
    if (!anywhere<kTogether>(crosses)) [[likely]] {
      body(OneChannel{first});
    } else {
      body(TwoChannels{first, table[run + crosses], inner - passed});
    }
  }

  // In the warp, kTogether: where some packs have to go the longer way, and the two differ in
  // little else, all had better go it, since a warp that parts goes both. Those of the last tile
  // always do: they are few, and it is the half to compile.
  template <bool kTogether>
  static __device__ bool anywhere(bool crosses) {
    if constexpr (kTogether && std::is_same_v<At, WholePack>) {
      return __any_sync(~0u, crosses);
    } else {
      return kTogether || crosses;
    }
  }
};

// The channels of a block's columns. By lane, then column: that neighbours in a warp read
// neighbours. A column more than there can be, that those who fill one write to different banks.
struct PeriodicTable {
  using Row = float[kPackSize][kMaxBlockColumns + 1];
  Row mean, scale, bias;

  __device__ void put(uint32_t i, const Channel& found) {
    put(mean, i, found.mean);
    put(scale, i, found.scale);
    put(bias, i, found.bias);
  }
  static __device__ void put(Row& row, uint32_t i, float value) {
    row[i % kPackSize][i / kPackSize] = value;
  }

  // Of the thread's own column.
  __device__ Channel channel(int lane) const {
    return {read(mean, lane), read(scale, lane), read(bias, lane)};
  }
  // Whenever it is needed: volatile, or the compiler would keep it in a register.
  static __device__ float read(const volatile Row& row, int lane) {
    return row[lane][threadIdx.x];
  }
};

// Each channel is saved by the first blocks, where it first occurs.
template <class Params, class Table>
__device__ void fill(const Params& p, Table& table) {
  const uint32_t lanes = blockDim.x * kPackSize, first = blockIdx.x * lanes;
  const uint32_t period = static_cast<uint32_t>(p.index.columns) * kPackSize;
  for (uint32_t i = thread_in_block(); i < lanes && first + i < period;
       i += blockDim.x * blockDim.y) {
    const uint32_t run = divide(first + i, p.index.by_inner);
    const uint32_t sample = divide(run, p.index.by_channels);
    const uint32_t channel = run - sample * p.index.by_channels.divisor;
    const bool occurs = channel * p.index.by_inner.divisor == first + i;
    table.put(i, find_channel(p, channel, blockIdx.y == 0 && occurs));
  }
  __syncthreads();
}

// The channels of a thread's 8 lanes, in registers...
struct EightChannels {
  Channel own[kPackSize];

  __device__ explicit EightChannels(const PeriodicTable& table) {
#pragma unroll
    for (int k = 0; k < kPackSize; ++k) own[k] = table.channel(k);
  }
  __device__ Channel operator()(int lane) const {
    return own[lane];
  }
  template <bool kTogether = false, class Body>
  __device__ void with_channels(Body body) const {
    body(*this);
  }
};

// ... or in shared memory, where registers are scarce.
struct SharedChannels {
  const PeriodicTable& table;

  __device__ explicit SharedChannels(const PeriodicTable& table) : table(table) {}
  __device__ Channel operator()(int lane) const {
    return table.channel(lane);
  }
  template <bool kTogether = false, class Body>
  __device__ void with_channels(Body body) const {
    body(*this);
  }
};

template <bool kInShared>
using LaneChannels = std::conditional_t<kInShared, SharedChannels, EightChannels>;

// (x - mean) * scale + bias + residual; in a pair, the residual is normalized as well.
template <bool kPair, class C>
__device__ float preactivation(float x, float residual, const C& c) {
  const float z = normalize(x, c.mean, c.scale, c.bias);
  if constexpr (kPair) {
    return normalize(residual, c.residual_mean, c.residual_scale, z);
  } else {
    return z + residual;
  }
}

}  // namespace
}  // namespace frozen_bn::cuda
