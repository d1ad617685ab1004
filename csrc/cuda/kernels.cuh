// The __global__ functions. Torch-free.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
