"""The symmetric kernel of the benchmarks is a fair baseline: no spills, and tensor cores."""

import pytest

from benchmarks.symmetric_kernel import BLOCK_D, STAGES, WARPS, symmetric_kernel, tokens_per_step
from lowrank_ops.ops._triton_device import lacks_proxy_fence
from tests.compile_gate.gate import ARCHS, assert_clean, compile_kernel


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "itemsize"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_symmetric_kernel_is_clean(arch, dtype, itemsize):
    names = symmetric_kernel.arg_names
    report = compile_kernel(
        symmetric_kernel,
        {"x_ptr": f"*{dtype}", "out_ptr": "*fp32", **dict.fromkeys(names[2:6], "i32")},
        {"BLOCK_D": BLOCK_D, "BLOCK_T": tokens_per_step(itemsize), "UPCAST": False},
        arch,
        WARPS,
        STAGES,
        {(index,): [["tt.divisibility", 16]] for index in (0, 1, 3, 4, 5)},
    )
    if lacks_proxy_fence("cuda", (arch // 10, 0)):  # the benchmark leaves the kernel out
        assert report.unfenced
        report = report._replace(unfenced=0)
    assert_clean(report, arch)
