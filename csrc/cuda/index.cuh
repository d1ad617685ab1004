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
  int64_t start;        // element
  int64_t first_run;    // number in the tensor
  uint32_t first_left;  // elements of the tile before the second run, kTileSize if there is none
  uint32_t runs;

  __device__ Tile(const Index& index, uint32_t number) : start(int64_t{number} * kTileSize) {
    if (index.wide) {
      first_run = start / index.inner;
    } else {
      first_run = divide(static_cast<uint32_t>(start), index.by_inner);
    }
    const int64_t left = (first_run + 1) * index.inner - start;
    first_left = left < kTileSize ? static_cast<uint32_t>(left) : kTileSize;
    const int64_t rest = index.numel - start;
    const uint32_t size = rest < kTileSize ? static_cast<uint32_t>(rest) : kTileSize;
    runs = run_of(index, size - 1) + 1;
  }

  // The run of the element at `offset` in the tile.
  __device__ uint32_t run_of(const Index& index, uint32_t offset) const {
    return offset < first_left ? 0 : 1 + divide(offset - first_left, index.by_tile_inner);
  }

  // How many elements of its run there are from `offset` on.
  __device__ uint32_t left_in_run(const Index& index, uint32_t offset, uint32_t run) const {
    return first_left + run * index.tile_inner - offset;
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

// Periodic: one thread's column of packs, `columns` packs apart.
struct Column {
  uint32_t number;
  int64_t row;
  int64_t row_step;

  __device__ Column()
      : number(blockIdx.y * blockDim.x + threadIdx.x),
        row(int64_t{blockIdx.x} * blockDim.y + threadIdx.y),
        row_step(int64_t{gridDim.x} * blockDim.y) {}

  // The k-th pack from the current row on; none in a column that is only there to fill the block.
  __device__ Position position(const Index& index, int k) const {
    if (number >= index.columns) return {0, 0};
    return position_at(((row + k * row_step) * index.columns + number) * kPackSize, index.numel);
  }

  __device__ uint32_t channel_of(const Index& index, int lane) const {
    const uint32_t inner = static_cast<uint32_t>(index.inner);
    return (number * kPackSize + lane) / inner % static_cast<uint32_t>(index.channels);
  }
};

}  // namespace
}  // namespace frozen_bn::cuda
