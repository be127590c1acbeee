"""Bytes of memory: given as text, shown as text, and free on a device."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(given: int | str) -> int:
    """Bytes of ``max_memory``: a number, or a string such as ``"8GB"`` or ``"500 MiB"``."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?)B?\s*", given.upper()) if isinstance(given, str) else None
    with contextlib.suppress(ValueError, KeyError):
        if found is not None:
            given = int(float(found[1]) * _UNITS[found[2]])
    if isinstance(given, bool) or not isinstance(given, int) or given <= 0:
        raise ValueError(f"max_memory must be a positive number of bytes or a string such as '8GB'; got {given!r}.")
    return given


def size(count: int) -> str:
    """Bytes as text, such as ``"1.5 GiB"``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None if that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError, StopIteration):  # the limit of a container; its caches can be dropped
        group = Path("/sys/fs/cgroup")
        lines = (group / "memory.stat").read_text().splitlines()
        caches = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        used = int((group / "memory.current").read_text()) - caches
        found.append(int((group / "memory.max").read_text()) - used)
    return min(found, default=None)
