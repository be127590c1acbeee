"""ThreadSanitizer on the CUDA kernels: accesses that no synchronization orders, whatever the order of the run.

It checks accesses to shared and global memory by threads, TMA and tensor cores against the kernels' own barriers
(``csrc/tests/simulator/order.h``). Lanes of a warp count as ordered where they execute an instruction together.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from planting import Runner, plant

# A case for each way in which a kernel synchronizes, in one order: fibers are slow under the sanitizer.
CASES = {
    "covariance_sm80": "sm80-any or sm80-5 or sm80-one-element or (sm80-float32 and not any)",
    "covariance_sm80 tf32": "covariance_sm80-tf32-any or covariance_sm80-tf32-copies",
    "covariance_sm90": "test_covariance and (sm90-float16 or sm90-stages or sm90-splits)",
    "covariance_sm90_wide": "test_wide_covariance and (one-tile or whole-and or 1-float64)",
    "convolution": "test_conv_covariance and (same or groups and not tf32)",
    "decode_sm80": "decode_sm80-8-tokens or decode_sm80-any or decode_sm80-dependent or decode_sm80-splits "
    "or decode_sm80-group-splits",
    "decode_sm90": "decode_sm90-8-tokens or decode_sm90-clusters or decode_sm90-streamed or 140-decode_sm90-2 "
    "or decode_sm90-group-one-CTA",
    "prefill_sm90": "prefill_sm90-few or prefill_sm90-two-tiles or prefill_sm90-clusters",
    "prefill_sm90 peers": "test_every_prefill_variant and 64-1-256",
}
UNSYNCHRONIZED = "__syncthreads();\n  const int64_t feature", "const int64_t feature"
FAULTS = {
    "covariance_sm80": ("covariance/covariance_sm80", "__syncthreads();  // this step has been stored", "//"),
    "covariance_sm90": ("covariance/covariance_sm90", *UNSYNCHRONIZED),
    "covariance_sm90: no proxy fence": ("covariance/covariance_sm90", "arch::fence_proxy_async();", ""),
    "covariance_sm90_wide": ("covariance/covariance_sm90_wide", *UNSYNCHRONIZED),
    "covariance_sm90_wide: no proxy fence": ("covariance/covariance_sm90_wide", "arch::fence_proxy_async();", ""),
    "decode_sm80": ("lowrank_linear/decode_sm80", "arch::griddepcontrol_wait();", ""),
    "decode_sm80: counters order nothing": ("lowrank_linear/decode_sm80", "atom_add_acq_rel", "atom_add_relaxed"),
    "decode_sm80: a CTA arrives too early": (
        "lowrank_linear/decode_sm80",
        "__syncthreads();  // all of this CTA's sums",
        "//",
    ),
    "decode_sm90": ("lowrank_linear/decode_sm90", "__syncthreads();  // the sums have been read", "//"),
    "decode_sm90: two rounds in one buffer": ("lowrank_linear/decode_sm90", "i += clusters, ++round", "i += clusters"),
}


class Watched(NamedTuple):
    runner: Runner
    log: Path  # the sanitizer appends a process number

    def races(self, library: Path, which: str) -> str:
        """The sanitizer's reports on one run."""
        for report in self.log.parent.glob(f"{self.log.name}.*"):
            report.unlink()
        output = self.runner.run(library, which, "--one-order")[1]
        reports = "".join(report.read_text() for report in self.log.parent.glob(f"{self.log.name}.*"))
        assert reports or " passed" in output or "100%" in output or "FAILED" in output, output
        return reports


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Runs with ThreadSanitizer, whose runtime has to be loaded first."""
    found = subprocess.run(["c++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(found.strip()).is_file() or shutil.which("setarch") is None:
        pytest.skip("no ThreadSanitizer, or no setarch to run it at fixed addresses")
    log = tmp_path_factory.mktemp("races") / "log"
    options = f"log_path={log} history_size=2 halt_on_error=1 die_after_fork=0"
    runtime = str(Path(found.strip()).resolve())
    runner = Runner("setarch", "--addr-no-randomize", LD_PRELOAD=runtime, TSAN_OPTIONS=options)
    yield Watched(runner, log)
    runner.close()


@pytest.mark.parametrize("kernel", CASES)
def test_no_races(kernel: str, watched_library: Path, watched: Watched) -> None:
    assert not watched.races(watched_library, CASES[kernel])


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_races_are_found(fault: str, watched_library: Path, watched: Watched, tmp_path: Path) -> None:
    planted = plant(*FAULTS[fault], watched_library, tmp_path)
    assert "data race" in watched.races(planted, CASES[fault.split(":")[0]])
