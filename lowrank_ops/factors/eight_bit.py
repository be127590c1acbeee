"""Factors of 8 bits: int8 or fp8 (e4m3) values, with one float32 scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..policies import EIGHT_BIT

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantized(factor: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """``factor`` (rows, columns) as 8-bit values and their scales: values times scale is nearest to each element.

    The largest magnitude of a row becomes the largest of the format: 127 of int8, 448 of fp8.

    Raises:
        ValueError: an element is not finite in float32, the dtype of scales.
    """
    if factor.is_meta:
        return empty_quantized(factor, form)
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    largest = wide.abs().amax(1) if factor.shape[1] else wide.new_zeros(len(wide))
    if not bool(largest.float().isfinite().all()):
        raise ValueError("a factor holds NaN or inf, or exceeds float32, and cannot be rounded to 8 bits.")
    scale = torch.where(largest > 0, largest / EIGHT_BIT[form], 1.0).float().clamp_min(torch.finfo(torch.float32).tiny)
    values = (wide / scale.unsqueeze(1)).clamp(-EIGHT_BIT[form], EIGHT_BIT[form])
    return (values.round() if form == "int8" else values).to(DTYPES[form]), scale


def empty_quantized(factor: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Values and scales without content, for a factor (rows, columns)."""
    scale = torch.empty(len(factor), dtype=torch.float32, device=factor.device)
    return torch.empty_like(factor, dtype=DTYPES[form]), scale
