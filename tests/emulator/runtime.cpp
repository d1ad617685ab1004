// A CUDA runtime without a GPU: what a compiled launch calls, handing every launch to a callback.
// Linked into the test library with -Bsymbolic, so that it stands in for torch's device functions
// there as well.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** args);

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

Launcher launcher = nullptr;
Configuration pushed;
cudaError_t last_error = cudaSuccess;
int multiprocessors = 132;  // of an H100

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args) {
  const unsigned grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  const int failed = launcher(kernels().at(function).c_str(), grid_size, block_size, args);
  return last_error = failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_set_launcher(Launcher f) {
  launcher = f;
}

EXPORT void emulator_set_multiprocessors(int count) {
  multiprocessors = count;
}

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
  return launch(kernel, grid, block, args);
}
EXPORT cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
  return launch(function, grid, block, args);
}
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT const char* cudaGetErrorString(cudaError_t) {
  return "a fault in the emulator";
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = multiprocessors;
  return cudaSuccess;
}

// torch's: the current stream, and the guard of the current device.
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
EXPORT int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
EXPORT int32_t aoti_torch_delete_device_guard(void*) {
  return 0;
}
EXPORT int32_t aoti_torch_device_guard_set_index(void*, int32_t) {
  return 0;
}
