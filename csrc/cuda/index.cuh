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
  int64_t start;      // element
  int64_t first_run;  // number in the tensor
  uint32_t size;      // elements
  uint32_t skipped;   // elements of the first run before the tile, as far as they matter in it
  uint32_t runs;
  bool starts_run;  // the first run begins with the tile

  __device__ Tile(const Index& index, uint32_t number) : start(int64_t{number} * kTileSize) {
    if (index.wide) {
      first_run = start / index.inner;
    } else {
      first_run = divide(static_cast<uint32_t>(start), index.by_inner);
    }
    const int64_t before = start - first_run * index.inner;  // elements of the first run
    starts_run = before == 0;
    // As if the run were no longer than a tile: before - (inner - tile_inner), or 0.
    const int64_t relevant = before - index.inner + index.tile_inner;
    skipped = relevant > 0 ? static_cast<uint32_t>(relevant) : 0;
    const int64_t rest = index.numel - start;
    size = rest < kTileSize ? static_cast<uint32_t>(rest) : kTileSize;
    runs = divide(size - 1 + skipped, index.by_tile_inner) + 1;
  }

  // Of each thread's packs, neighbours in memory are neighbours in the warp.
  static __device__ uint32_t pack_offset(int k) {
    return (k * kThreads + threadIdx.x) * kPackSize;
  }

  __device__ RunPlace place_of(const Index& index, uint32_t run) const {
    if (index.wide) {
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
  int64_t first;  // element
  int64_t step;   // elements from pack to pack

  __device__ explicit Column(const Index& index)
      : number(blockIdx.x * blockDim.x + threadIdx.x), exists(number < index.columns) {
    const int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y;
    first = (row * index.columns + number) * kPackSize;
    step = int64_t{gridDim.y} * blockDim.y * index.columns * kPackSize;
  }
};

__device__ inline uint32_t thread_in_block() {
  return threadIdx.y * blockDim.x + threadIdx.x;
}

}  // namespace
}  // namespace frozen_bn::cuda
