"""Ops under autocast: the kernel runs with autocast off, on tensors that are cast first or left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}
_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


def register_autocast(lib: torch.library.Library, name: str, *, cast: bool) -> None:
    """Register ``name`` for autocast.

    With ``cast`` the inputs take autocast's dtype, as for ``linear``; without, only the products inside are kept from
    being cast, as an accumulation in float32 or float64 must be.
    """
    for device, key in _DEVICES.items():
        lib.impl(name, _kernel(getattr(torch.ops.lowrank_ops, name), device, cast), key)


def _kernel(op: Callable[..., Any], device: str, cast: bool) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        if cast:
            dtype = torch.get_autocast_dtype(device)
            args = tuple(
                value.to(dtype) if isinstance(value, Tensor) and value.dtype in _CASTABLE else value for value in args
            )
        with torch.autocast(device, enabled=False):
            return op(*args, **options)

    return run
