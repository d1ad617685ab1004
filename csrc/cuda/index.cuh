// Where packs lie among the channels. Torch-free.
#pragma once

#include "packs.cuh"

namespace frozen_bn::cuda {
namespace {

__device__ inline uint32_t divide(uint32_t x, const FastDivisor& by) {
  return (__umulhi(x, by.multiplier) + x) >> by.shift;
}

struct RunPlace {
  int64_t sample, channel;
};

// Planar: one block's tile of the storage. Its runs (one channel of one sample each) are numbered
// from 0; all arithmetic within the tile is 32-bit, whatever the size of the tensor.
struct Tile {
  int64_t first_run;  // number in the tensor
  uint32_t size;      // elements
  uint32_t skipped;   // elements of the first run before the tile, as far as they matter in it
  bool starts_run;    // the first run begins with the tile

  __device__ Tile(const Index& index, uint32_t number, uint32_t size) : size(size) {
    if (index.wide) [[unlikely]] {
      const int64_t start = int64_t{number} * kTileSize;  // element
      first_run = start / index.inner;
      skip(start - first_run * index.inner, index.beyond_tile);
    } else {
      const uint32_t start = number * kTileSize, run = divide(start, index.by_inner);
      first_run = run;
      skip<int32_t>(start - run * index.by_inner.divisor, index.beyond_tile);
    }
  }

  // `before`: elements of the first run before the tile.
  template <class Int>
  __device__ void skip(Int before, Int beyond_tile) {
    starts_run = before == 0;
    skipped = static_cast<uint32_t>(max(before - beyond_tile, Int{0}));
  }

  __device__ bool has(const Index& index, uint32_t run) const {
    return run * index.tile_inner < size + skipped;
  }

  // The thread's k-th pack: neighbours in memory are neighbours in the warp.
  static __device__ uint32_t pack(int k) {
    return threadIdx.x + k * kThreads;
  }

  __device__ RunPlace place_of(const Index& index, uint32_t run) const {
    if (index.wide) [[unlikely]] {
      const int64_t number = first_run + run, sample = number / index.channels;
      return {sample, number - sample * index.channels};
    }
    const uint32_t number = static_cast<uint32_t>(first_run) + run;
    const uint32_t sample = divide(number, index.by_channels);
    return {sample, number - sample * index.by_channels.divisor};
  }
};

// Periodic: one thread's column of packs.
struct Column {
  uint32_t number;
  bool exists;    // else it is only there to fill the block
  int64_t first;  // pack
  int64_t step;   // to the next pack

  __device__ explicit Column(const Index& index)
      : number(blockIdx.x * blockDim.x + threadIdx.x), exists(number < index.columns) {
    const uint32_t row = blockIdx.y * blockDim.y + threadIdx.y, rows = gridDim.y * blockDim.y;
    first = row * index.columns + number;
    step = rows * index.columns;
  }
};

__device__ inline uint32_t thread_in_block() {
  return threadIdx.y * blockDim.x + threadIdx.x;
}

}  // namespace
}  // namespace frozen_bn::cuda
