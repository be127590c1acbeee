"""Checks of the arguments of ``lowrank_linear``: types, shapes, dtypes, devices and names."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)  # dtypes of factors that have a scale
SCALES = (torch.float32, torch.bfloat16)


def check_types(**tensors: Tensor | None) -> None:
    """Raise TypeError for the first argument that is not a tensor; all but x, down and up may be None."""
    for name, tensor in tensors.items():
        known = tensor is None and name not in ("x", "down", "up")
        if not known and not hasattr(type(tensor), "__torch_function__"):  # which proxies of torch.fx have as well
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}.")


def check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> None:
    """Raise ValueError for the first argument that does not fit the others."""
    if x.dim() == 0:
        raise ValueError("x must have shape (..., in_features); got a scalar.")
    if not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor; got {x.dtype}.")
    if down.dim() != 2 or down.shape[1] != x.shape[-1]:
        raise ValueError(
            f"down must have shape (rank, {x.shape[-1]}) to take x with {x.shape[-1]} features; "
            f"got {tuple(down.shape)}."
        )
    if up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"up must have shape (out_features, {down.shape[0]}), the rank of down; got {tuple(up.shape)}."
        )
    if bias is not None and bias.shape != up.shape[:1]:
        raise ValueError(f"bias must have shape ({up.shape[0]},), the rows of up; got {tuple(bias.shape)}.")
    check_activation(activation)
    _check_scale("down", down, down_scale, x)
    _check_scale("up", up, up_scale, x)
    for name, tensor, scale in (("down", down, down_scale), ("up", up, up_scale), ("bias", bias, None)):
        if tensor is not None and (tensor.device != x.device or (scale is None and tensor.dtype != x.dtype)):
            raise ValueError(
                f"{name} must have the dtype and device of x, {x.dtype} on {x.device}; "
                f"got {tensor.dtype} on {tensor.device}."
            )


def _check_scale(name: str, factor: Tensor, scale: Tensor | None, x: Tensor) -> None:
    if scale is None:
        if factor.dtype in EIGHT_BIT and factor.dtype != x.dtype:
            raise ValueError(f"{name} is {factor.dtype} and needs {name}_scale, float32 of shape ({len(factor)},).")
        return
    if factor.dtype not in EIGHT_BIT:
        raise ValueError(f"{name}_scale is for {name} in int8 or float8_e4m3fn; got {name} in {factor.dtype}.")
    if x.dtype in EIGHT_BIT:
        raise ValueError(f"x must be float64, float32, bfloat16 or float16; got {x.dtype}.")
    if scale.shape != factor.shape[:1] or scale.dtype not in SCALES or scale.device != x.device:
        raise ValueError(
            f"{name}_scale must be float32 or bfloat16 of shape ({len(factor)},) on {x.device}, one for each row of "
            f"{name}; got {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}."
        )


def check_activation(activation: str) -> None:
    """Raise ValueError, or TypeError for another type, unless ``activation`` is known."""
    named = isinstance(activation, str)
    if not named or activation not in reference.ACTIVATIONS:
        raise (ValueError if named else TypeError)(
            f"activation must be one of {', '.join(reference.ACTIVATIONS)}; got {activation!r}."
        )
