"""The library of CUDA kernels: loaded when first asked for, and why not where it cannot be."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "liblowrank_ops.so"


@functools.cache
def unavailable() -> str | None:
    """Load the library of ``torch.ops.lowrank_ops._cuda_*`` and ``_plan_*``; None, or what is in the way."""
    if not LIBRARY.is_file():
        return "the native library was not built: LOWRANK_OPS_CUDA=ON at install tells what it needs"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


def machine(device: tuple[str, int, tuple[int, int], int, int]) -> tuple[int, int, int]:
    """A ``Device`` as the planner takes it: compute capability times ten, multiprocessors, bytes per block."""
    _, _, (major, minor), multiprocessors, shared_memory = device
    return 10 * major + minor, multiprocessors, shared_memory


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
