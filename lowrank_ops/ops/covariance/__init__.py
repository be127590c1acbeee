"""Defines ``lowrank_ops::covariance_update_`` and its convolution form, which stream second moments in place.

Schema, validation, fake kernels, autocast, and ``TABLE`` and ``CONV_TABLE``, the implementations in the order in which
``auto`` considers them. Only the lower triangle of the state is valid until :func:`covariance_finalize_` mirrors it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...arguments import checked
from .. import _verify
from .._backend import Backend, Device, Impl, choose, device_facts, row_stride
from .._backend import explain as _explain
from .._dispatcher import BoundedCache, register_autocast
from . import _cuda, _triton, _triton_conv, reference
from ._checks import check, check_conv, check_in_place, check_memory, check_pair
from ._trial import trial, trial_conv
from .reference import output_size as output_size


class Problem(NamedTuple):
    """Everything the choice of an implementation may depend on."""

    tokens: int
    features: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    row_stride: int  # of x, or of its contiguous copy if x is not a matrix with unit column stride
    aligned: bool  # that matrix and each of its rows start on 16 bytes
    state_stride: int
    deterministic: bool
    allow_tf32: bool
    device: Device


class ConvProblem(NamedTuple):
    """:class:`Problem` for the patches of a convolution's input."""

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


@checked()
def covariance_update_(
    second_moment: Tensor,  # (features, features)
    total: Tensor,  # (features,)
    x: Tensor,  # (..., features)
    *,
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> None:
    """Add ``x^T x`` to ``second_moment`` and the column sums of ``x`` to ``total``, in place.

    Only the lower triangle of ``second_moment`` is updated; call :func:`covariance_finalize_` once at the end.

    Products are not rounded to the dtype of ``x``. The reference multiplies and accumulates in the state's dtype. GPU
    kernels multiply bfloat16 and float16 exactly, and float32 as three bfloat16 MMAs to within 2^-15 of the sum of
    ``|x_i x_j|``; they accumulate in float32 over at most 2,048 rows (4,096 in one CUDA kernel), then in the state's
    dtype. A kernel gets a contiguous copy of ``x`` if its columns are not contiguous.

    Args:
        second_moment: (features, features), float32 or float64.
        total: (features,), the dtype of ``second_moment``.
        x: (..., features), float64, float32, bfloat16 or float16, at most as precise as the state.
        deterministic: False allows a kernel to accumulate with atomics, in an order that may change between runs.
        allow_tf32: True allows a GPU kernel to multiply float32 in TensorFloat-32 (relative error about 5e-4).
        backend: ``"auto"``, ``"unverified"``, which is ``"auto"`` without the check of a kernel's first calls, or by
            name ``"reference"``, ``"triton"`` or ``"cuda"``.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, dtype or device does not fit, or arguments share memory; the message names the argument.
        BackendUnavailableError: the requested backend cannot run this call.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> second_moment, total = torch.zeros(3, 3), torch.zeros(3)
        >>> for batch in torch.arange(12.0).reshape(2, 2, 3):
        ...     lro.ops.covariance_update_(second_moment, total, batch)
        >>> lro.ops.covariance_finalize_(second_moment)
        tensor([[126., 144., 162.],
                [144., 166., 188.],
                [162., 188., 214.]])
        >>> total
        tensor([18., 22., 26.])
    """
    check_in_place(second_moment, total)
    torch.ops.lowrank_ops.covariance_update_(
        second_moment, total, x, deterministic=deterministic, allow_tf32=allow_tf32, backend=backend
    )


@checked()
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
    """Apply :func:`covariance_update_` to the patches of a Conv2d's input, per group, with an implicit im2col.

    Patch features are ordered as in a flattened ``Conv2d.weight``: channel, kernel row, kernel column. Numerics are
    those of :func:`covariance_update_`.

    Args:
        second_moment: (groups, d, d) with d = channels / groups * kernel height * kernel width, float32 or float64.
        total: (groups, d), the dtype of ``second_moment``.
        x: (batch, channels, height, width), float64, float32, bfloat16 or float16, at most as precise as the state; any
            strides, NCHW and channels-last among them.
        kernel_size, stride, padding, dilation: of the convolution, two integers (height, width) each.
        deterministic, allow_tf32, backend: as for :func:`covariance_update_`.

    Raises:
        TypeError: an argument of another type.
        ValueError: a shape, dtype or device does not fit, or arguments share memory; the message names the argument.
        BackendUnavailableError: the requested backend cannot run this call.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> x = torch.ones(2, 4, 8, 8)
        >>> second_moment, total = torch.zeros(1, 36, 36), torch.zeros(1, 36)
        >>> lro.ops.conv_covariance_update_(second_moment, total, x, kernel_size=(3, 3))
        >>> int(total[0, 0])  # 2 images x 6 x 6 patches
        72
    """
    check_in_place(second_moment, total)
    torch.ops.lowrank_ops.conv_covariance_update_(
        second_moment,
        total,
        x,
        check_pair("kernel_size", kernel_size),
        check_pair("stride", stride),
        check_pair("padding", padding),
        check_pair("dilation", dilation),
        deterministic=deterministic,
        allow_tf32=allow_tf32,
        backend=backend,
    )


@checked()
def covariance_finalize_(second_moment: Tensor) -> Tensor:
    """Mirror the lower triangle of ``second_moment`` to the upper one, in place.

    Args:
        second_moment: (..., features, features), any dtype.

    Returns:
        ``second_moment``.

    Raises:
        TypeError: no tensor.
        ValueError: it is not square, or its elements share memory.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> lro.ops.covariance_finalize_(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    if second_moment.dim() < 2 or second_moment.shape[-1] != second_moment.shape[-2]:
        raise ValueError(f"second_moment must be (..., features, features); got {tuple(second_moment.shape)}.")
    if any(stride == 0 for stride, size in zip(second_moment.stride(), second_moment.shape, strict=True) if size > 1):
        raise ValueError("second_moment is expanded, so its elements share memory; pass a clone.")
    rows = 512  # bounds the temporary memory
    features = second_moment.shape[-1]
    for start in range(0, features, rows):
        stop = min(start + rows, features)
        corner = second_moment[..., start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        second_moment[..., start:stop, stop:].copy_(second_moment[..., stop:, start:stop].mT)
    return second_moment


@checked()
def explain(
    second_moment: Tensor,
    total: Tensor,
    x: Tensor,
    *,
    deterministic: bool = True,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> str:
    """Which implementation runs this ``covariance_update_`` call, and why each other one does not."""
    check(second_moment, total, x)
    return _explain(TABLE, describe(second_moment, x, deterministic, allow_tf32), backend)


@checked()
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
    """Which implementation runs this ``conv_covariance_update_`` call, and why each other one does not."""
    check_conv(second_moment, total, x, kernel_size, {"stride": stride, "padding": padding, "dilation": dilation})
    problem = describe_conv(second_moment, total, x, kernel_size, stride, padding, dilation, deterministic, allow_tf32)
    return _explain(CONV_TABLE, problem, backend)


def describe(second_moment: Tensor, x: Tensor, deterministic: bool = True, allow_tf32: bool = False) -> Problem:
    """The problem of a call."""
    features = x.shape[-1]
    stride = row_stride(x)
    start = x.data_ptr() if stride else 0  # of the copy, which the allocator aligns
    aligned = (start | (stride or features) * x.element_size()) % 16 == 0
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
    """The problem of a convolution's call."""
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
    check(second_moment, total, x)
    check_memory(second_moment, total, x)
    problem = describe(second_moment, x, deterministic, allow_tf32)
    decided = _decisions.get((problem, backend))
    impl = decided or choose(TABLE, problem, backend)
    if not x.numel():
        return
    if impl.backend is not Backend.REFERENCE and not row_stride(x):
        x = x.contiguous()  # one load and store of x: far less than running the reference instead
    if decided is None:
        impl = _checked(impl, problem, backend, x)
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
    check_conv(second_moment, total, x, kernel_size, {"stride": stride, "padding": padding, "dilation": dilation})
    check_memory(second_moment, total, x)
    problem = describe_conv(second_moment, total, x, kernel_size, stride, padding, dilation, deterministic, allow_tf32)
    decided = _decisions.get((problem, backend))
    impl = decided or choose(CONV_TABLE, problem, backend)
    if not x.numel():
        return
    geometry = kernel_size, stride, padding, dilation
    if decided is None:
        impl = _checked(impl, problem, backend, x)
    impl.run(problem, second_moment, total, x, *geometry)


_decisions = BoundedCache(8192)  # problems whose implementation needs no check


def _checked(impl: Impl, problem: Problem | ConvProblem, backend: str, x: Tensor) -> Impl:
    """``impl``, or the reference if a first call, on a separate state, is wrong or cannot be checked now."""
    op, table, run_trial = "covariance_update_", TABLE, trial
    if isinstance(problem, ConvProblem):
        op, table, run_trial = "conv_covariance_update_", CONV_TABLE, trial_conv
    first = _verify.first_call(op, impl, problem, backend, _decisions.clear)
    if first is None:
        _decisions[problem, backend] = impl
    elif not first.check(x, lambda: run_trial(impl, problem, x)):
        return choose(table, problem, "reference")
    return impl


def _fake(second_moment: Tensor, total: Tensor, x: Tensor, **options: object) -> None:
    check(second_moment, total, x)


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
    check_conv(second_moment, total, x, kernel_size, {"stride": stride, "padding": padding, "dilation": dilation})


for _name, _kernel, _fake_kernel in (
    ("covariance_update_", _run, _fake),
    ("conv_covariance_update_", _run_conv, _fake_conv),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowrank_ops::{_name}", _fake_kernel, lib=_lib)
    register_autocast(_lib, _name, cast=False)
