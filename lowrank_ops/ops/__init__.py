"""The ops: ``covariance_update_``, its convolution form, and ``lowrank_linear``. They know nothing of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _native
from . import covariance as _covariance
from . import linear as _linear
from ._backend import Backend, BackendUnavailableError
from .covariance import conv_covariance_update_, covariance_finalize_, covariance_update_
from .linear import lowrank_linear

_EXPLAIN: dict[str, Callable[..., str]] = {
    "covariance_update_": _covariance.explain,
    "conv_covariance_update_": _covariance.explain_conv,
    "lowrank_linear": _linear.explain,
}


def explain(op: str, *args: Any, **options: Any) -> str:
    """Which implementation would run a call and why the others would not, one line each.

    A CUDA kernel that can run it is named with its tiles, as by :func:`plan` for the device of the call's tensors.

    Args:
        op: ``"covariance_update_"``, ``"conv_covariance_update_"`` or ``"lowrank_linear"``.
        args, options: those of the call.

    Raises:
        ValueError: an unknown op, or arguments that the op would refuse.
    """
    if op not in _EXPLAIN:
        raise ValueError(f"op must be one of {', '.join(map(repr, _EXPLAIN))}; got {op!r}.")
    return _EXPLAIN[op](*args, **options)


def plan(op: str, arch: str, dtype: torch.dtype, *, tokens: int, aligned: bool = True, **shape: Any) -> str:
    """Which CUDA kernel would run a problem on a typical device of an arch, and how; no device is needed.

    This is the planner's own choice; where a tuned table makes another one for a call, :func:`explain` tells.

    Args:
        op: ``"covariance_update_"``, ``"conv_covariance_update_"`` or ``"lowrank_linear"``.
        arch: ``"sm_80"``, ``"sm_86"``, ``"sm_89"``, ``"sm_90"``, ``"sm_100"`` or ``"sm_120"``.
        dtype: of the inputs.
        tokens: rows of ``x``, for convolutions patches.
        aligned: the matrices and their rows start on 16 bytes.
        shape: ``features``, ``allow_tf32`` and, for convolutions, ``groups``; or ``in_features``, ``rank`` and
            ``out_features``. Also ``kernel`` and ``splits``, to ask for such as ``"decode_sm80"`` instead of the first
            that can and for a number of blocks that share a tile's tokens or a row tile's features; and
            ``token_tile``, 128 or 192 tokens per block of prefill.

    Returns:
        One line: the kernel with its tiles, clusters, stages and memory, or ``"cannot run: "`` and the reason.

    Raises:
        ValueError: an unknown op or arch.
        RuntimeError: neither the native library nor its planner was built.
    """
    if arch not in _native.MACHINES:
        raise ValueError(f"arch must be one of {', '.join(map(repr, _native.MACHINES))}; got {arch!r}.")
    return _native.plan(op, dtype, _native.MACHINES[arch], tokens=tokens, aligned=aligned, **shape)


__all__ = [
    "Backend",
    "BackendUnavailableError",
    "conv_covariance_update_",
    "covariance_finalize_",
    "covariance_update_",
    "explain",
    "lowrank_linear",
    "plan",
]
