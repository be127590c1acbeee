"""Covariance updates against what calibration codes do: ``python -m benchmarks.bench_covariance``.

Arms other than ours leave out the column sums that ours takes along; every arm accumulates into a float32 state.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops as lro
from lowrank_ops.ops import covariance as _op

from . import shapes
from .measure import Tensors
from .rows import Arm, Case, on_cuda, told
from .suite import main


def cases(
    dtype: str,
    features: Iterable[int] = shapes.COVARIANCE_FEATURES,
    tokens: Iterable[int] = shapes.COVARIANCE_TOKENS,
) -> Iterator[Case]:
    """Every width with every number of tokens."""
    for width in features:
        for rows in tokens:
            yield case(rows, width, dtype)


def case(tokens: int, features: int, dtype: str) -> Case:
    """``tokens`` rows of ``features`` in ``dtype`` added to a float32 state."""
    kind = shapes.DTYPES[dtype]

    def make(device: torch.device, seed: int) -> Tensors:
        x = _random((tokens, features), kind, device, seed)
        state = torch.zeros(features, features, device=device)
        return state, torch.zeros(features, device=device), x

    triangle = features * (features + 1) // 2
    return Case(
        op="covariance_update_",
        shape=shapes.covariance(tokens, features, dtype),
        flops=2.0 * tokens * triangle,
        bytes=tokens * features * kind.itemsize + 2 * 4 * triangle,
        dtype=kind,
        make=make,
        arms=(
            *((Arm(float32_product.__name__, float32_product),) if kind != torch.float32 else ()),
            Arm("torch_mm", torch_mm, functools.partial(_has_mm, kind)),
            *((Arm("torch_addmm", torch_addmm, _has_addmm),) if kind != torch.float32 else ()),
            Arm("symmetric_triton", symmetric_triton, _has_triton),
            Arm("quack_gemm_symmetric", quack_gemm_symmetric, functools.partial(_has_quack, kind)),
            *ours(lro.ops.covariance_update_),
            Arm("lowrank_ops triton, atomics", functools.partial(
                lro.ops.covariance_update_, deterministic=False, backend="triton"
            ), on_cuda, "triton"),
        ),
        solve=solve,
        exact=lambda tensors: (tensors[2].double().T @ tensors[2].double()).tril(),
        plain=plain,
        pose=lambda tensors: (_op.TABLE, _op.describe(tensors[0], tensors[2])),
    )  # fmt: skip


def ours(op: Callable[..., Any], **options: Any) -> list[Arm]:
    """One arm for each backend of an op of ours."""
    return [
        Arm(
            f"lowrank_ops {backend.value}",
            functools.partial(op, **options, backend=backend.value),
            backend=backend.value,
        )
        for backend in lro.ops.Backend
    ]


def solve(run: Callable[..., Any], tensors: Tensors) -> Tensor:
    """The lower triangle that an arm makes of a state of zeros."""
    state, total = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[1])
    run(state, total, *tensors[2:])
    return state.tril()


def float32_product(state: Tensor, total: Tensor, x: Tensor) -> None:
    """What calibration codes commonly do with 16-bit activations."""
    wide = x.float()
    state.addmm_(wide.T, wide)


def torch_mm(state: Tensor, total: Tensor, x: Tensor) -> None:
    """The best that the library offers in all versions: products in the inputs' dtype, sums in float32."""
    if x.dtype == torch.float32:
        state.addmm_(x.T, x)
    else:
        state += torch.mm(x.T, x, out_dtype=torch.float32)


def torch_addmm(state: Tensor, total: Tensor, x: Tensor) -> None:
    """The same of 16-bit inputs without an addition of its own, where torch takes a float32 state beside them."""
    torch.addmm(state, x.T, x, out_dtype=torch.float32, out=state)


def symmetric_triton(state: Tensor, total: Tensor, x: Tensor) -> None:
    """The symmetric product as published for the Muon optimizer, half the tiles written twice, then an addition."""
    from .symmetric_kernel import symmetric_product

    state += symmetric_product(x)


def quack_gemm_symmetric(state: Tensor, total: Tensor, x: Tensor) -> None:
    """quack's symmetric product, then an addition."""
    from quack.gemm_interface import gemm_symmetric

    product = torch.empty_like(state)
    gemm_symmetric(x.T, x, out=product, out_dtype=torch.float32)
    state += product


def plain(state: Tensor, total: Tensor, x: Tensor) -> None:
    """torch's own in the dtype of ``x``, whose error is the measure.

    For float32 on a GPU that is a product in torch's precision "high", there TensorFloat-32: what our kernel makes of
    three bfloat16 products is far within it, and must not be held to the error of "highest", in which the arm
    ``torch_mm`` computes.
    """
    if not x.is_cuda:
        float32_product(state, total, x)
        return
    with _precision("high"):
        torch_mm(state, total, x)


@contextmanager
def _precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Normal with a mean, as activations have one."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.5, 1.0, generator=generator)


def _has_mm(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cpu" and dtype != torch.float32:
        return "torch.mm(..., out_dtype=torch.float32) has no CPU implementation"
    return None


@functools.cache
def _has_addmm(device: torch.device) -> str | None:
    """By a try: older versions refuse a state of another dtype than the inputs'."""
    if (reason := on_cuda(device)) is not None:
        return reason
    try:
        x, state = (torch.ones(16, 16, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32))
        torch_addmm(state, state[0], x)
    except Exception as failure:
        return f"torch.addmm(..., out_dtype=torch.float32) was refused: {told(failure).splitlines()[0]}"
    return None


def _has_triton(device: torch.device) -> str | None:
    return on_cuda(device) or (None if importlib.util.find_spec("triton") else "triton is not installed")


def _has_quack(dtype: torch.dtype, device: torch.device) -> str | None:
    if importlib.util.find_spec("quack") is None:
        return "quack is not installed"
    return "takes 16-bit inputs" if dtype == torch.float32 else on_cuda(device)


def conv_cases(dtype: str, convs: Iterable[shapes.Conv] = shapes.CONVS) -> Iterator[Case]:
    """The convolutions, in the channels-last format in which they run fastest."""
    return (conv_case(conv, dtype) for conv in convs)


def conv_case(conv: shapes.Conv, dtype: str) -> Case:
    """The patches of one convolution's input added to a float32 state."""
    kind = shapes.DTYPES[dtype]
    features = conv.channels * conv.kernel**2
    positions = ((conv.size + 2 * conv.padding - conv.kernel) // conv.stride + 1) ** 2
    geometry = {
        "kernel_size": (conv.kernel, conv.kernel),
        "stride": (conv.stride, conv.stride),
        "padding": (conv.padding, conv.padding),
    }

    def make(device: torch.device, seed: int) -> Tensors:
        x = _random((conv.batch, conv.channels, conv.size, conv.size), kind, device, seed)
        state = torch.zeros(1, features, features, device=device)
        return state, torch.zeros(1, features, device=device), x.contiguous(memory_format=torch.channels_last)

    def unfolded(state: Tensor, total: Tensor, x: Tensor) -> None:
        """What calibration codes commonly do."""
        rows = F.unfold(x, **geometry).transpose(1, 2).reshape(-1, features)  # type: ignore[arg-type]
        float32_product(state[0], total, rows)

    def exact(tensors: Tensors) -> Tensor:
        rows = F.unfold(tensors[2].double(), **geometry).transpose(1, 2).reshape(-1, features)  # type: ignore[arg-type]
        return (rows.T @ rows)[None].tril()

    def plain(state: Tensor, total: Tensor, x: Tensor) -> None:
        with _precision("high" if x.is_cuda else "highest"):
            unfolded(state, total, x)

    triangle = features * (features + 1) // 2
    return Case(
        op="conv_covariance_update_",
        shape={**conv._asdict(), "dtype": dtype},
        flops=2.0 * conv.batch * positions * triangle,
        bytes=conv.batch * conv.channels * conv.size**2 * kind.itemsize + 2 * 4 * triangle,
        dtype=kind,
        make=make,
        arms=(Arm("unfold_and_product", unfolded), *ours(lro.ops.conv_covariance_update_, **geometry)),
        solve=solve,
        exact=exact,
        plain=plain,
        pose=lambda tensors: (
            _op.CONV_TABLE, _op.describe_conv(*tensors, **geometry, dilation=(1, 1))
        ),
    )  # fmt: skip


def all_cases(dtype: str) -> Iterator[Case]:
    """Matrices, then convolutions."""
    yield from cases(dtype)
    yield from conv_cases(dtype)


if __name__ == "__main__":
    sys.exit(main("covariance", all_cases, __doc__, "bf16,fp16,fp32"))
