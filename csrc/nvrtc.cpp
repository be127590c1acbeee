// Looks up the kernels of a library that was built without nvcc. Launchers take the address of a symbol with the kernel's
// mangled name; a table maps it to that name and the image (fatbin) with the kernel. nvrtc.py writes images and table.

#include <map>
#include <mutex>

#include "launch.h"

namespace lowrank_ops {
namespace {

struct Compiled {
  const void* kernel;
  const char* name;
  const void* image;  // a fatbin
};

}  // namespace

// Start and end of the section with the table.
extern "C" __attribute__((visibility("hidden"))) const Compiled __start_lowrank_kernels[];
extern "C" __attribute__((visibility("hidden"))) const Compiled __stop_lowrank_kernels[];

namespace {

// Loaded once, for all devices.
cudaLibrary_t library_of(const void* image, const Launch& launch) {
  static std::mutex mutex;
  static std::map<const void*, cudaLibrary_t> libraries;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = libraries.find(image);
  if (found != libraries.end()) return found->second;
  // This thread may be capturing a stream: allow what could not be captured, as loading belongs to no stream.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), launch);
  cudaLibrary_t library = nullptr;
  const cudaError_t loaded = cudaLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  check(cudaThreadExchangeStreamCaptureMode(&mode), launch);
  check(loaded, launch);
  return libraries[image] = library;
}

}  // namespace

// A cudaKernel_t, which the runtime accepts as a function.
const void* function_of(const void* kernel, const Launch& launch) {
  return remember(kernel, [&]() -> const void* {
    const Compiled* compiled = __start_lowrank_kernels;
    while (compiled != __stop_lowrank_kernels && compiled->kernel != kernel) ++compiled;
    check(compiled == __stop_lowrank_kernels ? cudaErrorInvalidDeviceFunction : cudaSuccess, launch);
    cudaKernel_t function = nullptr;
    check(cudaLibraryGetKernel(&function, library_of(compiled->image, launch), compiled->name), launch);
    return function;
  });
}

}  // namespace lowrank_ops
