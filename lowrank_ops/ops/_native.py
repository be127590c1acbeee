"""The library of CUDA kernels: loaded when first asked for, and why not where it cannot be."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ._backend import Device

LIBRARY = Path(__file__).parents[1] / "liblowrank_ops.so"


@functools.lru_cache(maxsize=None)
def unavailable() -> str | None:
    """Load the library, which defines ``torch.ops.lowrank_ops._cuda_*`` and ``_plan_*``; None, or what is in the way."""
    if not LIBRARY.is_file():
        return "the native library was not built: install lowrank_ops where nvcc is, LOWRANK_OPS_CUDA=ON says what lacks"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


def machine(device: Device) -> tuple[int, int, int]:
    """``device`` as the planner takes it: compute capability times ten, multiprocessors, bytes per block."""
    major, minor = device.capability
    return 10 * major + minor, device.multiprocessors, device.shared_memory


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
