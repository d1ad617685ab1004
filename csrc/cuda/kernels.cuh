// The __global__ functions. Torch-free.
#pragma once

#include "pair.cuh"
