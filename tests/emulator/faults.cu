// Kernels with one fault each, which the emulator must find, and the same without it. All compute
// y from x, of n elements, in blocks of 64 threads; the line at fault ends in "// FAULT".

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(64) name(float* x, float* y, int n)
#define ELEMENT const int t = threadIdx.x, i = blockIdx.x * 64 + t

// Reads one element beyond the end.
KERNEL(end_faulty) {
  ELEMENT;
  if (i < n) y[i] = x[i + 1];  // FAULT
}
KERNEL(end_fixed) {
  ELEMENT;
  if (i < n) y[i] = x[i];
}

// Writes one element beyond the end.
KERNEL(write_end_faulty) {
  ELEMENT;
  if (i <= n) y[i] = 1;  // FAULT
}
KERNEL(write_end_fixed) {
  ELEMENT;
  if (i < n) y[i] = 1;
}

// Runs from one shared variable into the next.
KERNEL(neighbour_faulty) {
  ELEMENT;
  __shared__ float one[64], other[64];
  one[t] = x[i];
  other[t] = -x[i];
  __syncthreads();
  y[i] = one[t + 1] + other[63 - t];  // FAULT
}
KERNEL(neighbour_fixed) {
  ELEMENT;
  __shared__ float one[64], other[64];
  one[t] = x[i];
  other[t] = -x[i];
  __syncthreads();
  y[i] = one[63 - t] + 2 * -other[63 - t];
}

// 16 bytes at once from an address that is a multiple of 4.
KERNEL(misaligned_faulty) {
  ELEMENT;
  if (4 * i + 5 > n) return;
  reinterpret_cast<float4*>(y)[i] = *reinterpret_cast<float4*>(x + 4 * i + 1);  // FAULT
}
KERNEL(misaligned_fixed) {
  ELEMENT;
  if (4 * i >= n) return;
  reinterpret_cast<float4*>(y)[i] = *reinterpret_cast<float4*>(x + 4 * i);
}

// Reads an output before it is written.
KERNEL(uninitialised_faulty) {
  ELEMENT;
  y[i] += x[i];  // FAULT
}
KERNEL(uninitialised_fixed) {
  ELEMENT;
  y[i] = 0;
  y[i] += x[i];
}

// Fills half of a shared table, and reads all of it.
KERNEL(table_faulty) {
  ELEMENT;
  __shared__ float table[64];
  if (t < 32) table[t] = x[i];
  __syncthreads();
  y[i] = table[t];  // FAULT
}
KERNEL(table_fixed) {
  ELEMENT;
  __shared__ float table[64];
  table[t] = x[i];
  __syncthreads();
  y[i] = table[t];
}

// Reads what other threads put into shared memory without a barrier.
KERNEL(barrier_faulty) {
  ELEMENT;
  __shared__ float table[64];
  table[t] = x[i];
  y[i] = table[63 - t];  // FAULT
}
KERNEL(barrier_fixed) {
  ELEMENT;
  __shared__ float table[64];
  table[t] = x[i];
  __syncthreads();
  y[i] = table[63 - t];
}

// Fills a table for the second time while others still read the first.
KERNEL(refill_faulty) {
  ELEMENT;
  __shared__ float table[64];
  table[t] = x[i];
  __syncthreads();
  const float first = table[63 - t];
  table[t] = first + 1;  // FAULT
  __syncthreads();
  y[i] = table[63 - t];
}
KERNEL(refill_fixed) {
  ELEMENT;
  __shared__ float table[64];
  table[t] = x[i];
  __syncthreads();
  const float first = table[63 - t];
  __syncthreads();
  table[t] = first + 1;
  __syncthreads();
  y[i] = table[63 - t];
}

// A sum over the block in halves; the barrier between them is missing.
KERNEL(reduction_faulty) {
  ELEMENT;
  __shared__ float sums[64];
  sums[t] = x[i];
  __syncthreads();
#pragma unroll 1
  for (int half = 32; half > 0; half /= 2) {
    if (t < half) sums[t] += sums[t + half];  // FAULT
  }
  __syncthreads();
  y[i] = sums[0];
}
KERNEL(reduction_fixed) {
  ELEMENT;
  __shared__ float sums[64];
  sums[t] = x[i];
  __syncthreads();
#pragma unroll 1
  for (int half = 32; half > 0; half /= 2) {
    if (t < half) sums[t] += sums[t + half];
    __syncthreads();
  }
  y[i] = sums[0];
}

// All blocks write the same elements.
KERNEL(two_blocks_faulty) {
  ELEMENT;
  y[t] = x[i];  // FAULT
}
KERNEL(two_blocks_fixed) {
  ELEMENT;
  y[i] = x[i];
}

// Reads in place what the next block overwrites.
KERNEL(in_place_faulty) {
  ELEMENT;
  const float next = y[(i + 64) % n];
  y[i] = x[i] + next;  // FAULT
}
KERNEL(in_place_fixed) {
  ELEMENT;
  y[i] = x[i] + y[i];
}

// Half of the threads wait at a barrier, the others at another.
KERNEL(two_barriers_faulty) {
  ELEMENT;
  __shared__ float table[64];
  table[t] = x[i];
  if (t < 32) {
    __syncthreads();
    y[i] = table[63 - t];
  } else {
    table[t] += 1;
    __syncthreads();  // FAULT
    y[i] = table[t];
  }
}
KERNEL(two_barriers_fixed) {
  ELEMENT;
  __shared__ float table[64];
  table[t] = x[i];
  if (t >= 32) table[t] += 1;
  __syncthreads();
  y[i] = t < 32 ? table[63 - t] : table[t];
}

// The second half never reaches the barrier: it waits for a flag that is set behind it.
KERNEL(deadlock_faulty) {
  ELEMENT;
  __shared__ int flag;
  if (t == 0) flag = 0;
  __syncthreads();
  if (t >= 32) {
    while (atomicAdd(&flag, 0) == 0) continue;  // FAULT
  }
  __syncthreads();
  if (t == 0) atomicExch(&flag, 1);
  y[i] = x[i];
}
KERNEL(deadlock_fixed) {
  ELEMENT;
  __shared__ int flag;
  if (t == 0) flag = 0;
  __syncthreads();
  if (t == 0) atomicExch(&flag, 1);
  if (t >= 32) {
    while (atomicAdd(&flag, 0) == 0) continue;
  }
  __syncthreads();
  y[i] = x[i];
}

// A shuffle of half a warp that names all of it.
KERNEL(shuffle_faulty) {
  ELEMENT;
  float value = x[i];
  if (t % 32 < 16) value = __shfl_xor_sync(0xffffffff, value, 1);  // FAULT
  y[i] = value;
}
KERNEL(shuffle_fixed) {
  ELEMENT;
  float value = x[i];
  if (t % 32 < 16) value = __shfl_xor_sync(0x0000ffff, value, 1);
  y[i] = value;
}

// A shuffle that reads from lanes that have gone elsewhere.
KERNEL(shuffle_source_faulty) {
  ELEMENT;
  float value = x[i];
  if (t % 32 < 16) value = __shfl_xor_sync(0x0000ffff, value, 16);  // FAULT
  y[i] = value;
}
KERNEL(shuffle_source_fixed) {
  ELEMENT;
  y[i] = __shfl_xor_sync(0xffffffff, x[i], 16);
}

// Overwrites the input.
KERNEL(input_faulty) {
  ELEMENT;
  y[i] = x[i];
  x[i] = 0;  // FAULT
}
KERNEL(input_fixed) {
  ELEMENT;
  y[i] = x[i];
}
