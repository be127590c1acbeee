"""Covariance updates against what other calibration code does: ``python -m benchmarks.bench_covariance``.

Every variant accumulates into a float32 state; baselines leave out the column sums that lowrank_ops computes as well.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops as lro
from lowrank_ops.ops._triton_device import lacks_proxy_fence

from . import shapes
from .harness import Case, Tensors, Variant, compile_every_shape, on_cuda
from .suite import main


def cases(dtype: str, quick: bool = False) -> Iterator[Case]:
    """Matrices, then convolutions."""
    features = shapes.QUICK_COVARIANCE_FEATURES if quick else shapes.COVARIANCE_FEATURES
    tokens = shapes.QUICK_COVARIANCE_TOKENS if quick else shapes.COVARIANCE_TOKENS
    yield from (case(rows, width, dtype) for width in features for rows in tokens)
    yield from (conv_case(conv, dtype) for conv in (shapes.CONVS[:1] if quick else shapes.CONVS))


def case(tokens: int, features: int, dtype: str) -> Case:
    """``tokens`` rows of ``features`` in ``dtype`` added to a float32 state."""
    kind = shapes.DTYPES[dtype]

    def make(device: torch.device, seed: int) -> Tensors:
        x = _random((tokens, features), kind, device, seed)
        return torch.zeros(features, features, device=device), torch.zeros(features, device=device), x

    atomics = functools.partial(lro.ops.covariance_update_, deterministic=False, backend="triton")
    half = kind != torch.float32
    triangle = features * (features + 1) // 2
    return Case(
        op="covariance_update_",
        shape={"tokens": tokens, "features": features, "dtype": dtype},
        flops=2.0 * tokens * triangle,
        bytes=tokens * features * kind.itemsize + 2 * 4 * triangle,
        dtype=kind,
        make=make,
        variants=(
            *([Variant("float32_product", float32_product)] if half else []),
            Variant("torch_mm", torch_mm, functools.partial(_no_mm, kind)),
            Variant("torch_mm compiled", torch_mm_compiled, on_cuda),
            *([Variant("torch_addmm", torch_addmm, on_cuda)] if half else []),
            Variant("symmetric_triton", symmetric_triton, _needs_fenced_triton),
            *([Variant("quack_gemm_symmetric", quack_symmetric, functools.partial(_needs, "quack"))] if half else []),
            *ours(lro.ops.covariance_update_),
            Variant("lowrank_ops triton, atomics", atomics, on_cuda, "triton"),
        ),
        solve=solve,
        exact=lambda tensors: (tensors[2].double().T @ tensors[2].double()).tril(),
        plain=plain,
        explained=lambda tensors, backend: lro.ops.explain("covariance_update_", *tensors, backend=backend),
    )


def ours(op: Callable[..., Any], **options: Any) -> list[Variant]:
    """One variant for each backend of an op."""
    names = [backend.value for backend in lro.ops.Backend if backend != "unverified"]
    return [
        Variant(f"lowrank_ops {name}", functools.partial(op, **options, backend=name), backend=name) for name in names
    ]


def solve(run: Callable[..., Any], tensors: Tensors) -> Tensor:
    """The lower triangle after a variant updates a zero state."""
    state, total = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[1])
    run(state, total, *tensors[2:])
    return state.tril()


def float32_product(state: Tensor, total: Tensor, x: Tensor) -> None:
    """What calibration code commonly does with 16-bit activations."""
    wide = x.float()
    state.addmm_(wide.T, wide)


def torch_mm(state: Tensor, total: Tensor, x: Tensor) -> None:
    """cuBLAS with inputs of their own dtype and a float32 output, then an addition."""
    if x.dtype == torch.float32:
        state.addmm_(x.T, x)
    else:
        state += torch.mm(x.T, x, out_dtype=torch.float32)


def torch_mm_compiled(*tensors: Tensor) -> None:
    """The same by Inductor."""
    _compiled()(*tensors)


@functools.cache
def _compiled() -> Callable[..., Any]:
    compile_every_shape()
    return torch.compile(torch_mm, dynamic=False)


def torch_addmm(state: Tensor, total: Tensor, x: Tensor) -> None:
    """cuBLAS accumulating in place, where torch takes a float32 state beside 16-bit inputs."""
    torch.addmm(state, x.T, x, out_dtype=torch.float32, out=state)


def symmetric_triton(state: Tensor, total: Tensor, x: Tensor) -> None:
    """The symmetric product as published for the Muon optimizer, half the tiles written twice, then an addition."""
    from .symmetric_kernel import symmetric_product

    state += symmetric_product(x)


def quack_symmetric(state: Tensor, total: Tensor, x: Tensor) -> None:
    """quack's symmetric product, accumulating in place."""
    from quack.gemm_interface import gemm_symmetric

    gemm_symmetric(x.T, x, C=state, out=state, out_dtype=torch.float32)


def plain(state: Tensor, total: Tensor, x: Tensor) -> None:
    """torch's own in the dtype of ``x``.

    float32 on a GPU has precision "high", which is TensorFloat-32: the three bfloat16 products of our kernel are well
    within its error, but not within that of "highest", which the variant ``torch_mm`` uses.
    """
    with _precision("high" if x.is_cuda else "highest"):
        (torch_mm if x.is_cuda else float32_product)(state, total, x)


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


def _no_mm(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cpu" and dtype != torch.float32:
        return "torch.mm(..., out_dtype=torch.float32) has no CPU implementation"
    return None


def _needs(package: str, device: torch.device) -> str | None:
    return on_cuda(device) or (None if importlib.util.find_spec(package) else f"{package} is not installed")


def _needs_fenced_triton(device: torch.device) -> str | None:
    missing = _needs("triton", device)
    if missing or not torch.cuda.is_available():  # a dry run
        return missing
    return lacks_proxy_fence("cuda", torch.cuda.get_device_capability(device))


def conv_case(conv: shapes.Conv, dtype: str) -> Case:
    """The patches of one convolution's channels-last input added to a float32 state."""
    kind = shapes.DTYPES[dtype]
    features = conv.channels * conv.kernel**2
    positions = ((conv.size + 2 * conv.padding - conv.kernel) // conv.stride + 1) ** 2
    square = {"kernel_size": conv.kernel, "stride": conv.stride, "padding": conv.padding}
    geometry: dict[str, Any] = {key: (value, value) for key, value in square.items()}

    def make(device: torch.device, seed: int) -> Tensors:
        x = _random((conv.batch, conv.channels, conv.size, conv.size), kind, device, seed)
        state = torch.zeros(1, features, features, device=device)
        return state, torch.zeros(1, features, device=device), x.contiguous(memory_format=torch.channels_last)

    def patches(x: Tensor) -> Tensor:
        return F.unfold(x, **geometry).transpose(1, 2).reshape(-1, features)

    def unfolded(state: Tensor, total: Tensor, x: Tensor) -> None:
        """What calibration code commonly does."""
        float32_product(state[0], total, patches(x))

    def plain(state: Tensor, total: Tensor, x: Tensor) -> None:
        with _precision("high" if x.is_cuda else "highest"):
            unfolded(state, total, x)

    def exact(tensors: Tensors) -> Tensor:
        rows = patches(tensors[2].double())
        return (rows.T @ rows)[None].tril()

    def explained(tensors: Tensors, backend: str) -> str:
        return lro.ops.explain("conv_covariance_update_", *tensors, **geometry, backend=backend)

    triangle = features * (features + 1) // 2
    return Case(
        op="conv_covariance_update_",
        shape={**conv._asdict(), "dtype": dtype},
        flops=2.0 * conv.batch * positions * triangle,
        bytes=conv.batch * conv.channels * conv.size**2 * kind.itemsize + 2 * 4 * triangle,
        dtype=kind,
        make=make,
        variants=(Variant("unfold_and_product", unfolded), *ours(lro.ops.conv_covariance_update_, **geometry)),
        solve=solve,
        exact=exact,
        plain=plain,
        explained=explained,
    )


if __name__ == "__main__":
    sys.exit(main("covariance", __doc__, cases, "bf16,fp16,fp32"))
