"""The machine code of every kernel for every arch: no spills, no stack, the required instructions."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native import machine_code

pytestmark = pytest.mark.skipif(
    machine_code.tool("cuobjdump") is None or machine_code.tool("nvdisasm") is None,
    reason="neither the CUDA toolkit nor Triton is here to disassemble",
)


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[machine_code.Kernel]:
    return machine_code.kernels(library)


def test_every_kernel_is_clean(kernels: list[machine_code.Kernel]) -> None:
    faults = {f"{kernel.arch} {kernel.symbol}": found for kernel in kernels if (found := machine_code.faults(kernel))}
    assert not faults


def test_the_kernels_are_there(kernels: list[machine_code.Kernel]) -> None:
    archs = {kernel.arch for kernel in kernels}
    for arch in archs:
        names = {kernel.name for kernel in kernels if kernel.arch == arch}
        expected = {name for name in machine_code.LAUNCH_BOUNDS if arch == "sm_90a" or "_sm90" not in name}
        assert names == expected, arch
        # bfloat16 and float16 x (two depths of cp.async, rows, patches), float32 x (rows, patches), TensorFloat-32 x
        # (cp.async, rows, patches)
        assert sum(kernel.name == "covariance_sm80" for kernel in kernels if kernel.arch == arch) == 13
        # two types; launched with 168 registers per thread, which setmaxnreg moves to the consumers
        wide = [kernel for kernel in kernels if kernel.arch == arch and kernel.name == "covariance_sm90_wide"]
        assert [kernel.registers for kernel in wide] == [168] * 2 * (arch == "sm_90a")
        # two types x four token tiles, and two for rows off 16 bytes
        assert sum(kernel.name == "decode_up_sm80" for kernel in kernels if kernel.arch == arch) == 12
        # two types x four token tiles, the two larger ones with 16, 32 or 64 rows of down
        assert sum(kernel.name == "decode_sm90" for kernel in kernels if kernel.arch == arch) == 14 * (arch == "sm_90a")
        # two types x 25 variants
        prefill = [kernel for kernel in kernels if kernel.arch == arch and kernel.name == "prefill_sm90"]
        assert len(prefill) == 50 * (arch == "sm_90a")
        three = [kernel for kernel in prefill if machine_code.three_warpgroups(kernel)]
        assert len(three) == 24 * (arch == "sm_90a")
        # Launched with 128 registers per thread, which setmaxnreg moves to the consumers.
        assert all(kernel.has("USETMAXREG") and kernel.registers == 128 for kernel in three)


BAD_KERNELS = """
namespace { __global__ void decode_up_sm80(float* y, int i) {  // a stack, no MMAs
  float local[64];
  for (int k = 0; k < 64; ++k) local[(k * i) & 63] = y[k];
  y[0] = local[i & 63];
} }
namespace { __global__ void __launch_bounds__(1024, 2) decode_down_sm80(float* y) {  // 64 values, 32 registers: spills
  float local[64];
#pragma unroll
  for (int k = 0; k < 64; ++k) local[k] = y[k * 1024 + threadIdx.x];
  for (int i = 0; i < 9; ++i)
#pragma unroll
    for (int k = 0; k < 64; ++k) local[k] = local[k] * local[(k + 1) % 64] + y[i];
#pragma unroll
  for (int k = 0; k < 64; ++k) y[k * 1024 + threadIdx.x] = local[k];
} }
namespace {
enum class Source { matrix, aligned_matrix };
template <Source kSource> __global__ void covariance_sm80(float* y) { y[threadIdx.x] += 1; }  // no cp.async, no MMAs
}
namespace { __global__ void covariance_sm90(float* y) { y[threadIdx.x] += 1; } }
namespace { __global__ void decode_sm90(float* y) { y[threadIdx.x] += 1; } }
void launch(float* y) {
  decode_sm90<<<1, 1>>>(y);
  decode_up_sm80<<<1, 1>>>(y, 3);
  decode_down_sm80<<<1, 1>>>(y);
  covariance_sm80<Source::aligned_matrix><<<1, 1>>>(y);
  covariance_sm90<<<1, 1>>>(y);
}
"""

# Accumulators that are touched between wgmmas: ptxas serializes them.
SERIALIZED = """
namespace { __global__ void covariance_sm90(float* y, unsigned long long a) {
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %4, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + k));
    d[0] += y[k];
  }
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; ++i) y[i * 128 + threadIdx.x] = d[i];
} }
void launch(float* y) { covariance_sm90<<<1, 128>>>(y, 0); }
"""


def faults_of(text: str, arch: str, folder: Path) -> dict[str, str]:
    source, binary = folder / "bad.cu", folder / "bad.o"
    source.write_text(text)
    nvcc = ["nvcc", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", source, "-o", binary]
    subprocess.run(nvcc, check=True, capture_output=True)
    return {kernel.name: " ".join(machine_code.faults(kernel)) for kernel in machine_code.kernels(binary)}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_gate_sees_bad_kernels(tmp_path: Path) -> None:
    expected = {
        "decode_up_sm80": ("a stack of", "LDL", "STL", "no HMMA.16816.F32"),
        "decode_down_sm80": ("a stack of", "LDL", "STL"),
        "covariance_sm80": ("no HMMA.16816.F32", "no LDGSTS"),
        "covariance_sm90": ("no HGMMA", "no UTMALDG"),
        "decode_sm90": ("no HMMA", "no UBLKCP", "no SYNCS", "no UCGABAR_ARV", "no ATOM"),
    }
    found = faults_of(BAD_KERNELS, "80", tmp_path)
    assert set(found) == set(expected)
    for kernel, faults in expected.items():
        for fault in faults:
            assert fault in found[kernel]


# An arrival with release at cluster scope: the thread first waits for its stores.
PUBLISHING = """
namespace { __global__ void prefill_sm90(float* y, unsigned barrier) {
  for (int i = 0; i < 9; ++i) {
    y[i] = 1;
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
} }
void launch(float* y) { prefill_sm90<<<1, 32>>>(y, 0); }
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_gate_sees_fences_for_the_device(tmp_path: Path) -> None:
    assert "fences for the device, 0 cluster barriers" in faults_of(PUBLISHING, "90a", tmp_path)["prefill_sm90"]
    relaxed = PUBLISHING.replace(".release.cluster", "")
    assert "fences for the device" not in faults_of(relaxed, "90a", tmp_path)["prefill_sm90"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_gate_sees_serialized_wgmma(tmp_path: Path) -> None:
    assert "HGMMA: serialized" in faults_of(SERIALIZED, "90a", tmp_path)["covariance_sm90"]


def test_the_gate_counts() -> None:
    good = machine_code.Kernel(
        "covariance_sm90", "", "sm_90a", 96, 0, 4096, {"HGMMA": 4, "UTMALDG": 4, "SYNCS": 9, "WARPGROUP": 3}, {}
    )
    assert not machine_code.faults(good)
    assert "too many" in machine_code.faults(good._replace(registers=128))[0]
    assert "serialized" in machine_code.faults(good._replace(opcodes={**good.opcodes, "WARPGROUP": 5}))[0]
    assert "2 writes to registers" in machine_code.faults(good._replace(overwritten=2))[0]
    assert "1 instructions with registers that were given back" in machine_code.faults(good._replace(returned=1))[0]
    assert not machine_code.faults(good._replace(shared=4096 + machine_code.RESERVED_SHARED))
    assert "4097 bytes of static shared" in machine_code.faults(good._replace(shared=5121))[0]
    assert "1 fences for the device" in machine_code.faults(good._replace(device_fences=1))[0]
    assert not machine_code.faults(good._replace(device_fences=1, opcodes={**good.opcodes, "UCGABAR_ARV": 1}))
    copies = machine_code.Kernel("covariance_sm80", "SourceE1E", "sm_80", 128, 0, 0, {}, {"HMMA.16816.F32.BF16": 1})
    assert "no LDGSTS" in machine_code.faults(copies)[0]
    tf32 = copies._replace(symbol="4Tf32ELNS_6SourceE0E")
    assert "no HMMA.1688.F32.TF32" in machine_code.faults(tf32)[0]
    assert not machine_code.faults(tf32._replace(mmas={"HMMA.1688.F32.TF32": 1}))
