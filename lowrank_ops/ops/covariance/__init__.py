"""``lowrank_ops::covariance_update_``: stream second moments and sums of activations, in place.

Schema, validation, fake and the table of implementations. Only the lower triangle of the state is
meaningful until :func:`covariance_finalize_` mirrors it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._autocast import register_autocast
from .._backend import Backend, Device, Impl, choose, device_facts
from .._backend import explain as _explain
from .._layout import row_stride, starts_on_16_bytes
from . import _cuda, _triton, _triton_conv, reference
from .reference import output_size as output_size

_STATE_DTYPES = (torch.float32, torch.float64)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """All that a choice of implementation may depend on."""

    tokens: int
    features: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    row_stride: int  # elements between rows of x, or of its copy where x is no matrix with unit column stride
    aligned: bool  # that matrix starts on 16 bytes and so does each of its rows
    state_stride: int
    deterministic: bool
    allow_tf32: bool
    device: Device


class ConvProblem(NamedTuple):
    """The same for the patches of a convolution's input."""

    shape: tuple[int, int, int, int]  # batch, channels, height, width
    strides: tuple[int, int, int, int]
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    state_dtype: torch.dtype
    deterministic: bool
    allow_tf32: bool
    device: Device


TABLE: tuple[Impl, ...] = (
    Impl("cuda", Backend.CUDA, _cuda.supports, _cuda.run, _cuda.prefers, _cuda.plan),
    Impl("triton", Backend.TRITON, _triton.supports, _triton.run, _triton.prefers),
    Impl("reference", Backend.REFERENCE, lambda problem: None, lambda problem, *tensors: reference.update(*tensors)),
)

CONV_TABLE: tuple[Impl, ...] = (
    Impl("cuda", Backend.CUDA, _cuda.supports_conv, _cuda.run_conv, _cuda.prefers_conv, _cuda.plan_conv),
    Impl("triton", Backend.TRITON, _triton_conv.supports, _triton_conv.run, _triton.prefers),
    Impl("reference", Backend.REFERENCE, lambda problem: None, lambda problem, *args: reference.update_conv(*args)),
)


def covariance_update_(
    second_moment: Tensor,  # (features, features)
    total: Tensor,  # (features,)
    x: Tensor,  # (..., features)
    *,
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> None:
    """Add ``x^T x`` to ``second_moment`` and the sum of the rows of ``x`` to ``total``, in place.

    Only the lower triangle of ``second_moment`` is updated; call :func:`covariance_finalize_` once at the end.

    Args:
        second_moment: (features, features), float32 or float64.
        total: (features,), the dtype of ``second_moment``.
        x: (..., features), float64, float32, bfloat16 or float16, at most as precise as the state. Kernels are given
            a contiguous copy where the features are not next to one another in memory. Nothing is rounded to the dtype
            of ``x`` before it is summed: the reference multiplies and adds in the state's dtype; GPU kernels take exact
            products of bfloat16 and float16, and of float32 to 2^-15 of the sum of ``|x_i x_j|`` (three bfloat16
            products), summed in float32 over at most 2,048 rows at a time.
        deterministic: False allows a kernel to add with atomics, in an order that may change between runs.
        allow_tf32: lets a GPU kernel take float32 products in TensorFloat-32 (relative error about 5e-4).
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        BackendUnavailableError: the requested backend cannot run this call.
    """
    torch.ops.lowrank_ops.covariance_update_(
        second_moment, total, x, deterministic=deterministic, allow_tf32=allow_tf32, backend=backend
    )


def conv_covariance_update_(
    second_moment: Tensor,  # (groups, d, d), d = channels / groups * kernel height * kernel width
    total: Tensor,  # (groups, d)
    x: Tensor,  # (batch, channels, height, width)
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> None:
    """:func:`covariance_update_` over the patches that a Conv2d sees, without unfolding them in memory.

    Patch features are ordered like a flattened ``Conv2d.weight``: channel, kernel row, kernel column. The
    number of groups is taken from the state. Accepts NCHW and channels-last memory formats.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        BackendUnavailableError: the requested backend cannot run this call.
    """
    torch.ops.lowrank_ops.conv_covariance_update_(
        second_moment,
        total,
        x,
        list(kernel_size),
        list(stride),
        list(padding),
        list(dilation),
        deterministic=deterministic,
        allow_tf32=allow_tf32,
        backend=backend,
    )


def covariance_finalize_(second_moment: Tensor) -> Tensor:
    """Mirror the lower triangle of ``second_moment`` (..., features, features) to the upper one, in place."""
    rows = 4096  # bounds the scratch memory at large widths
    features = second_moment.shape[-1]
    for start in range(0, features, rows):
        stop = min(start + rows, features)
        corner = second_moment[..., start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        second_moment[..., start:stop, stop:].copy_(second_moment[..., stop:, start:stop].mT)
    return second_moment


def explain(
    second_moment: Tensor,
    total: Tensor,
    x: Tensor,
    *,
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> str:
    """Which implementation would run this ``covariance_update_`` and why the others would not."""
    _check(second_moment, total, x)
    return _explain(TABLE, describe(second_moment, x, deterministic, allow_tf32), backend)


def explain_conv(
    second_moment: Tensor,
    total: Tensor,
    x: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> str:
    """Which implementation would run this ``conv_covariance_update_`` and why the others would not."""
    _check_conv(second_moment, total, x, kernel_size, {"stride": stride, "padding": padding, "dilation": dilation})
    problem = describe_conv(second_moment, total, x, kernel_size, stride, padding, dilation, deterministic, allow_tf32)
    return _explain(CONV_TABLE, problem, backend)


def describe(second_moment: Tensor, x: Tensor, deterministic: bool = True, allow_tf32: bool = False) -> Problem:
    """The problem that a call poses."""
    features = x.shape[-1]
    stride = row_stride(x)
    aligned = starts_on_16_bytes(x, stride) if stride else features * x.element_size() % 16 == 0
    return Problem(
        tokens=x.numel() // features if features else 0,
        features=features,
        dtype=x.dtype,
        state_dtype=second_moment.dtype,
        row_stride=stride or features,
        aligned=aligned,
        state_stride=second_moment.stride(0),
        deterministic=deterministic,
        allow_tf32=allow_tf32,
        device=device_facts(x.device),
    )


def describe_conv(
    second_moment: Tensor,
    total: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    deterministic: bool = True,
    allow_tf32: bool = False,
) -> ConvProblem:
    """The problem that a call over patches poses."""
    return ConvProblem(
        tuple(x.shape),  # type: ignore[arg-type]
        x.stride(),  # type: ignore[arg-type]
        total.shape[0],
        tuple(kernel_size),  # type: ignore[arg-type]
        tuple(stride),  # type: ignore[arg-type]
        tuple(padding),  # type: ignore[arg-type]
        tuple(dilation),  # type: ignore[arg-type]
        x.dtype,
        second_moment.dtype,
        deterministic,
        allow_tf32,
        device_facts(x.device),
    )


def _check(second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("x must have shape (..., features); got a scalar.")
    features = x.shape[-1]
    if second_moment.shape != (features, features):
        raise ValueError(
            f"second_moment must have shape ({features}, {features}) to take x with {features} features; "
            f"got {tuple(second_moment.shape)}."
        )
    if total.shape != (features,):
        raise ValueError(f"total must have shape ({features},); got {tuple(total.shape)}.")
    _check_dtypes(second_moment, total, x)


def _check_dtypes(second_moment: Tensor, total: Tensor, x: Tensor) -> None:
    if second_moment.dtype not in _STATE_DTYPES or total.dtype != second_moment.dtype:
        raise ValueError(
            "second_moment and total must share one dtype, float32 or float64; "
            f"got {second_moment.dtype} and {total.dtype}."
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float64, float32, bfloat16 or float16; got {x.dtype}.")
    if x.dtype == torch.float64 and second_moment.dtype == torch.float32:
        raise ValueError("x is float64 but the state is float32, which would round it; use a float64 state.")
    if not (second_moment.device == total.device == x.device):
        raise ValueError(
            "second_moment, total and x must be on one device; "
            f"got {second_moment.device}, {total.device} and {x.device}."
        )


def _check_conv(
    second_moment: Tensor, total: Tensor, x: Tensor, kernel_size: Sequence[int], geometry: dict[str, Sequence[int]]
) -> None:
    for name, value in {"kernel_size": kernel_size, **geometry}.items():
        least = 0 if name == "padding" else 1
        if len(value) != 2 or min(value) < least:
            raise ValueError(f"{name} must be two integers (height, width) of at least {least}; got {list(value)}.")
    if x.dim() != 4:
        raise ValueError(f"x must have shape (batch, channels, height, width); got {tuple(x.shape)}.")
    if total.dim() != 2 or second_moment.shape != (*total.shape, total.shape[-1]):
        raise ValueError(
            "second_moment must be (groups, d, d) and total (groups, d); "
            f"got {tuple(second_moment.shape)} and {tuple(total.shape)}."
        )
    groups, features = total.shape
    if groups * features != x.shape[1] * kernel_size[0] * kernel_size[1] or x.shape[1] % groups:
        raise ValueError(
            f"total with {groups} groups of {features} features does not fit x with {x.shape[1]} channels and a "
            f"kernel of {kernel_size[0]} x {kernel_size[1]}: d must be channels / groups * height * width."
        )
    if min(reference.output_size(x.shape[2:], kernel_size, **geometry)) < 1:
        raise ValueError(
            f"kernel_size {list(kernel_size)} with dilation {list(geometry['dilation'])} is larger than the padded "
            f"input {tuple(x.shape[2:])} + 2 * {list(geometry['padding'])}."
        )
    _check_dtypes(second_moment, total, x)


_lib = torch.library.Library("lowrank_ops", "FRAGMENT")
_lib.define(
    "covariance_update_(Tensor(a!) second_moment, Tensor(b!) total, Tensor x, *, "
    'bool deterministic=True, bool allow_tf32=False, str backend="auto") -> ()'
)
_lib.define(
    "conv_covariance_update_(Tensor(a!) second_moment, Tensor(b!) total, Tensor x, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, *, "
    'bool deterministic=True, bool allow_tf32=False, str backend="auto") -> ()'
)


def _run(
    second_moment: Tensor,
    total: Tensor,
    x: Tensor,
    *,
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> None:
    _check(second_moment, total, x)
    problem = describe(second_moment, x, deterministic, allow_tf32)
    impl = choose(TABLE, problem, backend)
    if not x.numel():
        return
    if impl.backend is not Backend.REFERENCE and not row_stride(x):
        x = x.contiguous()  # costs one reading and writing; the reference would cost several times the kernel
    impl.run(problem, second_moment, total, x)


def _run_conv(
    second_moment: Tensor,
    total: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *,
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> None:
    _check_conv(second_moment, total, x, kernel_size, {"stride": stride, "padding": padding, "dilation": dilation})
    problem = describe_conv(second_moment, total, x, kernel_size, stride, padding, dilation, deterministic, allow_tf32)
    impl = choose(CONV_TABLE, problem, backend)
    if x.numel():
        impl.run(problem, second_moment, total, x, kernel_size, stride, padding, dilation)


def _fake(second_moment: Tensor, total: Tensor, x: Tensor, **options: object) -> None:
    _check(second_moment, total, x)


def _fake_conv(
    second_moment: Tensor,
    total: Tensor,
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    **options: object,
) -> None:
    _check_conv(second_moment, total, x, kernel_size, {"stride": stride, "padding": padding, "dilation": dilation})


for _name, _kernel, _fake_kernel in (
    ("covariance_update_", _run, _fake),
    ("conv_covariance_update_", _run_conv, _fake_conv),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowrank_ops::{_name}", _fake_kernel, lib=_lib)
    register_autocast(_lib, _name, cast=False)
