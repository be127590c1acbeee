"""What the kernels became for every arch: no spills, no stack, the instructions that they are written for."""

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
        expected = {name for name in machine_code.LAUNCH_BOUNDS if arch == "sm_90a" or not name.endswith("_sm90")}
        assert names == expected, arch
        # bfloat16 and float16 x (two depths of copies, rows, patches), float32 x (rows, patches), the same as
        # TensorFloat-32 x (copies, rows, patches)
        assert sum(kernel.name == "covariance_sm80" for kernel in kernels if kernel.arch == arch) == 13
        # two types x four token tiles x aligned or not
        assert sum(kernel.name == "decode_up_sm80" for kernel in kernels if kernel.arch == arch) == 16
        # two types x four token tiles
        assert sum(kernel.name == "decode_sm90" for kernel in kernels if kernel.arch == arch) == 8 * (arch == "sm_90a")
        # two types x nine pairs of ranks and cluster
        assert sum(kernel.name == "prefill_sm90" for kernel in kernels if kernel.arch == arch) == 18 * (
            arch == "sm_90a"
        )


BAD_KERNELS = """
namespace { __global__ void decode_up_sm80(float* y, int i) {  // a stack, and no tensor cores
  float local[64];
  for (int k = 0; k < 64; ++k) local[(k * i) & 63] = y[k];
  y[0] = local[i & 63];
} }
namespace { __global__ void covariance_sm90(float* y) { y[threadIdx.x] += 1; } }
namespace { __global__ void decode_sm90(float* y) { y[threadIdx.x] += 1; } }
void launch(float* y) { decode_sm90<<<1, 1>>>(y); decode_up_sm80<<<1, 1>>>(y, 3); covariance_sm90<<<1, 1>>>(y); }
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_gate_sees_bad_kernels(tmp_path: Path) -> None:
    source, binary = tmp_path / "bad.cu", tmp_path / "bad.o"
    source.write_text(BAD_KERNELS)
    subprocess.run(["nvcc", "-gencode=arch=compute_80,code=sm_80", "-c", source, "-o", binary], check=True)
    found = {kernel.name: " ".join(machine_code.faults(kernel)) for kernel in machine_code.kernels(binary)}
    assert set(found) == {"decode_up_sm80", "covariance_sm90", "decode_sm90"}
    for fault in ("a stack of", "LDL", "STL", "no HMMA.16816.F32"):
        assert fault in found["decode_up_sm80"]
    for fault in ("no HGMMA", "no UTMALDG"):
        assert fault in found["covariance_sm90"]
    for fault in ("no HMMA", "no UBLKCP", "no SYNCS", "no UCGABAR_ARV", "no ATOM"):
        assert fault in found["decode_sm90"]


def test_the_gate_counts() -> None:
    good = machine_code.Kernel(
        "covariance_sm90", "", "sm_90a", 96, 0, 4096, {"HGMMA": 4, "UTMALDG": 4, "SYNCS": 9, "WARPGROUP": 3}, {}
    )
    assert not machine_code.faults(good)
    assert "too many" in machine_code.faults(good._replace(registers=128))[0]
    assert "serialised" in machine_code.faults(good._replace(opcodes={**good.opcodes, "WARPGROUP": 5}))[0]
    assert "static shared" in machine_code.faults(good._replace(shared=50000))[0]
    copies = machine_code.Kernel("covariance_sm80", "SourceE1E", "sm_80", 128, 0, 0, {}, {"HMMA.16816.F32.BF16": 1})
    assert "no LDGSTS" in machine_code.faults(copies)[0]
    tf32 = copies._replace(symbol="4Tf32ELNS_6SourceE0E")
    assert "no HMMA.1688.F32.TF32" in machine_code.faults(tf32)[0]
    assert not machine_code.faults(tf32._replace(products={"HMMA.1688.F32.TF32": 1}))
