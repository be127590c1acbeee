"""Factors of 8 bits: int8 or fp8 (e4m3) values, with one float32 scale per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import EIGHT_BIT

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantized(factor: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """``factor`` (rows, columns) as 8-bit values and their scales: values times scale is nearest to each element.

    The largest magnitude of a row becomes the largest of the format: 127 of int8, 448 of fp8. Scales that clip the
    largest elements were not better: docs/results.md.

    Raises:
        ValueError: an element is not finite.
    """
    if factor.is_meta:
        return torch.empty_like(factor, dtype=DTYPES[form]), torch.empty(len(factor), device=factor.device)
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    largest = wide.abs().amax(1) if factor.shape[1] else wide.new_zeros(len(wide))
    if not bool(largest.isfinite().all()):
        raise ValueError("a factor holds NaN or inf and cannot be rounded to 8 bits.")
    scale = torch.where(largest > 0, largest / EIGHT_BIT[form], 1.0).float().clamp_min(torch.finfo(torch.float32).tiny)
    values = (wide / scale.unsqueeze(1)).clamp(-EIGHT_BIT[form], EIGHT_BIT[form])
    return (values.round() if form == "int8" else values).to(DTYPES[form]), scale


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of ``up`` of equal size, so that the scale of a row suits all of its elements.

    The rows of ``down`` take the difference, where each has a scale of its own. The factors are powers of two, so that
    the product is exactly the same.
    """
    wide = torch.promote_types(up.dtype, torch.float32)
    size = up.to(wide).square().mean(0).sqrt() if len(up) else up.new_ones(up.shape[1], dtype=wide)
    factor = torch.where(size > 0, size, 1.0).log2().round().exp2()
    return down.to(wide) * factor.unsqueeze(1), up.to(wide) / factor
