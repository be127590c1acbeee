"""ThreadSanitizer on the CUDA kernels: accesses that no synchronization orders, whatever the order of the run was.

It holds every access to shared and global memory by threads, copy engine and tensor cores against the barriers that the
kernels asked for (``csrc/tests/simulator/order.h``). Lanes of a warp count as ordered where they execute an instruction
together.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from planting import plant, run_tests

# A case for each way in which a kernel synchronizes: one run of each, as fibers are dear under the sanitizer.
CASES = {
    "covariance_sm80": "test_covariance and random4 and (100-131 or 100-70 or 300-136 or 1-1-1)",
    "covariance_sm80 in TensorFloat-32": "test_covariance and TensorFloat and random4 and (200-131 or 300-200)",
    "covariance_sm90": "test_covariance and random4 and (150-136 or machine3 or 330-64)",
    "covariance_sm90_wide": "test_wide_covariance and random4 and (300-256 or 330-520-8 or float641 or 1-float64)",
    "convolution": "test_conv and random4 and sm_90 and (shape0 or shape1)",
    "decode_sm80": "test_lowrank and random4 and (shape0- or shape4- or shape5-)",
    "decode_sm90": "test_lowrank and random4 and (shape7- or shape9- or shape11-)",
    "prefill_sm90": "test_lowrank and random4 and (shape12- or shape13- or shape15- or shape16-)",
    "prefill_sm90 with a peer": "test_every_prefill_kernel and random4 and 1-256",
}
FAULTS = {
    "covariance_sm80": ("covariance/covariance_sm80", "__syncthreads();  // this step has been stored", "//"),
    "covariance_sm90": (
        "covariance/covariance_sm90",
        "__syncthreads();\n  const int64_t feature",
        "const int64_t feature",
    ),
    "covariance_sm90: no fence": ("covariance/covariance_sm90", "sm90::fence_before_copies();", ""),
    "covariance_sm90_wide": (
        "covariance/covariance_sm90_wide",
        "__syncthreads();\n  const int64_t feature",
        "const int64_t feature",
    ),
    "covariance_sm90_wide: no fence": ("covariance/covariance_sm90_wide", "sm90::fence_before_copies();", ""),
    "decode_sm80": ("lowrank_linear/decode_sm80", "wait_for_predecessor();", ""),
    "decode_sm90": ("lowrank_linear/decode_sm90", "__syncthreads();  // the sums have been read", "//"),
}


@pytest.fixture(scope="session")
def runtime() -> str:
    """ThreadSanitizer's, which has to be in the process first."""
    found = subprocess.run(["c++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).is_file() or shutil.which("setarch") is None:
        pytest.skip("no ThreadSanitizer, or no setarch to run it at fixed addresses")
    return str(Path(found.strip()).resolve())


def races(library: Path, runtime: str, which: str, log: Path) -> str:
    """What the sanitizer says."""
    options = f"log_path={log} history_size=2 exitcode=0"
    result = run_tests(library, which, "setarch", "--addr-no-randomize", LD_PRELOAD=runtime, TSAN_OPTIONS=options)
    assert " passed" in result.stdout or "100%" in result.stdout or "FAILED" in result.stdout, result.stdout
    return "".join(part.read_text() for part in log.parent.glob(f"{log.name}.*"))


@pytest.mark.parametrize("kernel", CASES)
def test_no_races(kernel: str, watched_library: Path, runtime: str, tmp_path: Path) -> None:
    assert not races(watched_library, runtime, CASES[kernel], tmp_path / "log")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_races_are_found(fault: str, watched_library: Path, runtime: str, tmp_path: Path) -> None:
    planted = plant(*FAULTS[fault], watched_library, tmp_path)
    assert "data race" in races(planted, runtime, CASES[fault.split(":")[0]], tmp_path / "log")
