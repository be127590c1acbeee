"""Says whether Triton kernels can run on a device and which arch's configurations they use. Imports Triton lazily."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def unavailable(device_type: str, capability: tuple[int, int]) -> str | None:
    """Why no Triton kernel can run on such a device, or None. On a CPU they run in Triton's interpreter only."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    interpret = device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "0"
    if device_type == "cuda" and torch.version.hip is None and capability < (8, 0):
        major, minor = capability
        return f"needs a CUDA device of compute capability 8.0 or newer; this one has {major}.{minor}"
    if device_type == "cuda" or interpret:
        try:
            import triton
        except ImportError as error:
            return f"triton cannot be imported: {error}"
        if device_type == "cuda" or triton.knobs.runtime.interpret:
            return None
    return f"needs a CUDA device of compute capability 8.0 or newer; this tensor is on {device_type}"


@functools.cache
def lacks_proxy_fence(device_type: str, capability: tuple[int, int]) -> str | None:
    """Why Triton must not load tiles by cp.async for wgmma or tcgen05.mma on such a device, or None.

    Triton 3.6 has no fence.proxy.async between the two (triton-lang/triton issue 9610, fixed in 3.7): MMAs may read
    what was in shared memory before.
    """
    if device_type != "cuda" or torch.version.hip is not None or arch_of(capability) < 90:
        return None
    import triton

    major, minor = triton.__version__.split(".")[:2]
    if (int(major), int(minor)) >= (3, 7):
        return None
    return f"needs Triton 3.7 or newer on this device, for a missing memory fence; this is {triton.__version__}"


def arch_of(capability: tuple[int, int]) -> int:
    """The arch of a device's newest tensor-core instruction that Triton uses: 80, 90 or 100.

    Consumer GPUs of compute capability 12.0 have neither wgmma nor tcgen05 and use the configurations of sm_80.
    """
    if torch.version.hip is None and capability[0] in (9, 10):
        return 10 * capability[0]
    return 80
