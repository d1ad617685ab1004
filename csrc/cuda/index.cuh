// Where packs lie among the channels. Torch-free.
#pragma once

#include "packs.cuh"

namespace frozen_bn::cuda {
namespace {

__device__ inline uint32_t divide(uint32_t x, const FastDivisor& by) {
  return (__umulhi(x, by.multiplier) + x) >> by.shift;
}

// Planar: one block's tile of the storage. Its runs (one channel of one sample each) are numbered
// from 0; all arithmetic within the tile is 32-bit, whatever the size of the tensor.
struct Tile {
  int64_t start;      // element
  int64_t first_run;  // number in the tensor
  uint32_t size;      // elements
  uint32_t skipped;   // elements of the first run before the tile, as far as they matter within it
  uint32_t runs;
  bool starts_run;  // the first run begins with the tile

  __device__ Tile(const Index& index, uint32_t number) : start(int64_t{number} * kTileSize) {
    if (index.wide) {
      first_run = start / index.inner;
    } else {
      first_run = divide(static_cast<uint32_t>(start), index.by_inner);
    }
    starts_run = first_run * index.inner == start;
    const int64_t left = (first_run + 1) * index.inner - start;
    skipped = index.tile_inner -
              (left < index.tile_inner ? static_cast<uint32_t>(left) : index.tile_inner);
    const int64_t rest = index.numel - start;
    size = rest < kTileSize ? static_cast<uint32_t>(rest) : kTileSize;
    runs = run_of(index, size - 1) + 1;
  }

  // The run of the element at `offset` in the tile.
  __device__ uint32_t run_of(const Index& index, uint32_t offset) const {
    return divide(offset + skipped, index.by_tile_inner);
  }

  // How many elements of its run there are from `offset` on.
  __device__ uint32_t left_in_run(const Index& index, uint32_t offset, uint32_t run) const {
    return (run + 1) * index.tile_inner - skipped - offset;
  }

  // Of each thread's packs, neighbours in memory are neighbours in the warp.
  static __device__ uint32_t pack_offset(int k) {
    return (k * kThreads + threadIdx.x) * kPackSize;
  }

  __device__ int64_t sample_of(const Index& index, uint32_t run) const {
    const int64_t number = first_run + run;
    return index.wide ? number / index.channels
                      : divide(static_cast<uint32_t>(number), index.by_channels);
  }

  __device__ int64_t channel_of(const Index& index, uint32_t run) const {
    return first_run + run - sample_of(index, run) * index.channels;
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
