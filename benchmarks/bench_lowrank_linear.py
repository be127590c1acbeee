"""``lowrank_linear`` against the dense layer and against two layers: ``python -m benchmarks.bench_lowrank_linear``.

All arms compute one function: the dense weight is the product of the factors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops as lro
from lowrank_ops.ops import linear as _op

from . import shapes
from .measure import Tensors, compile_every_shape
from .rows import Arm, Case, on_cuda
from .suite import main


def cases(
    dtype: str,
    layers: Iterable[shapes.Layer] = shapes.STORED_LAYERS,
    tokens: Iterable[int] = shapes.TOKENS,
) -> Iterator[Case]:
    """Every layer with every number of tokens."""
    for layer in layers:
        for rows in tokens:
            yield case(layer, rows, dtype)


def case(layer: shapes.Layer, tokens: int, dtype: str) -> Case:
    """One layer with a bias on ``tokens`` rows."""
    kind = shapes.DTYPES[dtype]
    in_features, out_features, rank = layer

    def make(device: torch.device, seed: int) -> Tensors:
        if device.type == "meta":
            sizes = ((tokens, in_features), (rank, in_features), (out_features, rank), (out_features,))
            x, down, up, bias = (torch.empty(size, dtype=kind, device=device) for size in sizes)
            return x, down, up, bias, torch.empty(out_features, in_features, dtype=kind, device=device)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.empty(size, dtype=kind, device=device)
            return values.normal_(0.0, scale, generator=generator)

        x = normal(tokens, in_features)
        down, up = normal(rank, in_features, scale=in_features**-0.5), normal(out_features, rank, scale=rank**-0.5)
        return x, down, up, normal(out_features), up @ down

    parameters = rank * (in_features + out_features)
    return Case(
        op="lowrank_linear",
        shape=shapes.linear(layer, tokens, dtype),
        flops=2.0 * tokens * parameters,
        bytes=(tokens * (in_features + out_features) + parameters + out_features) * kind.itemsize,
        dtype=kind,
        make=make,
        arms=(
            Arm("dense", dense),
            Arm("two_linears", two_linears),
            Arm("two_linears compiled", two_linears_compiled, on_cuda),
            *(
                Arm(f"lowrank_ops {backend.value}", ours(backend.value), backend=backend.value)
                for backend in lro.ops.Backend
            ),
        ),
        solve=lambda run, tensors: run(*tensors),
        exact=lambda tensors: two_linears(*(tensor.double() for tensor in tensors)),
        plain=two_linears,
        pose=lambda tensors: (_op.TABLE, _op.describe(*tensors[:4], "none")),
        read_by_all=4,
    )  # fmt: skip


def dense(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """The layer before it was factorised."""
    return F.linear(x, weight, bias)


def two_linears(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """The factorised layer as one would write it in torch."""
    return F.linear(F.linear(x, down), up, bias)


def two_linears_compiled(*tensors: Tensor) -> Tensor:
    """The same by ``torch.compile``."""
    result: Tensor = _compiled()(*tensors)
    return result


@functools.cache
def _compiled() -> Callable[..., Any]:
    compile_every_shape()
    return torch.compile(two_linears, dynamic=False)


@functools.cache
def ours(backend: str) -> Callable[..., Tensor]:
    """``lowrank_linear`` of a backend, without the dense weight."""

    def run(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return lro.ops.lowrank_linear(x, down, up, bias, backend=backend)

    return run


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main("lowrank_linear", cases, __doc__, "bf16"))
