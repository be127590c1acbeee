"""csrc/nvrtc.cpp finds kernels in the table that csrc/nvrtc.py writes; without NVRTC and without a device."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

LAUNCHERS = """
#include <cstdio>
#include "launch.h"
namespace lowrank_ops {
template <int kTile> __global__ void first(const __grid_constant__ int x);
template <class Element> __global__ void second(const __grid_constant__ float x);
}
int main() {
  using namespace lowrank_ops;
  const Launch launch{nullptr, 0, 0, [] { return std::string("it"); }};
  for (int i = 0; i < 2; ++i) launch_kernel(first<64>, {dim3(1), 32, 0}, launch, i);
  launch_kernel(second<__half>, {dim3(1), 32, 0}, launch, 0.5f);
  opt_in_shared_memory(first<128>, 50000, launch);
  void (*unknown)(int) = [](int) {};
  try {
    launch_kernel(unknown, {dim3(1), 32, 0}, launch, 0);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
"""

RUNTIME = """
#include <cstdio>
#include <cuda_runtime_api.h>
#include <utility>
extern "C" {
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(now, *mode);
  return std::puts(now == cudaStreamCaptureModeGlobal ? "captures strictly" : "captures freely"), cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  std::printf("load %s\\n", static_cast<const char*>(code));
  return *library = reinterpret_cast<cudaLibrary_t>(const_cast<void*>(code)), cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  std::printf("find %s in %s\\n", name, reinterpret_cast<const char*>(library));
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<char*>(name)), cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  return std::printf("allow %s %d\\n", static_cast<const char*>(kernel), value), cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
  return std::printf("launch %s\\n", static_cast<const char*>(kernel)), cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidDeviceFunction ? "no such" : "?"; }
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc, whose headers are those of the runtime")
def test_launchers_reach_the_kernels_by_name(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("nvrtc", CSRC / "nvrtc.py")
    nvrtc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nvrtc)

    (tmp_path / "launchers.cpp").write_text(LAUNCHERS)
    (tmp_path / "runtime.cpp").write_text(RUNTIME)
    compiler = ["nvcc", "-std=c++17", "-cudart=none", "-DLOWRANK_OPS_NVRTC", "-I", CSRC]  # it calls the host's
    subprocess.run([*compiler, "-c", "launchers.cpp", "-o", "launchers.o"], cwd=tmp_path, check=True)
    kernels = nvrtc.missing_kernels(str(tmp_path / "launchers.o"))
    assert set(kernels) == {f"lowrank_ops::{name}" for name in ("first<64>", "first<128>", "second<__half>")}
    image = tmp_path / "image"
    image.write_bytes(b"IMAGE\0")
    (tmp_path / "kernels.s").write_text(nvrtc.assembly(image, list(kernels.values())))
    sources = ["launchers.o", "runtime.cpp", CSRC / "nvrtc.cpp", "kernels.s"]
    subprocess.run([*compiler, *sources, "-o", "run"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "run"], check=True, capture_output=True, text=True).stdout.splitlines()

    first, other, second = (kernels[f"lowrank_ops::{name}"] for name in ("first<64>", "first<128>", "second<__half>"))
    assert printed == [
        "captures freely",
        "load IMAGE",
        "captures strictly",
        f"find {first} in IMAGE",
        f"launch {first}",
        f"launch {first}",
        f"find {second} in IMAGE",
        f"launch {second}",
        f"find {other} in IMAGE",
        f"allow {other} 50000",
        "lowrank_ops: launching it failed: no such",
    ]
