"""``lowrank_linear`` against the dense layer and against two layers: ``python -m benchmarks.bench_lowrank_linear``.

All variants compute one function: the dense weight is the product of the factors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops as lro

from . import shapes
from .harness import Case, Tensors, Variant, compile_every_shape, on_cuda
from .suite import main


def cases(dtype: str, quick: bool = False) -> Iterator[Case]:
    """Every layer with every number of tokens."""
    for layer in shapes.QUICK_LAYERS if quick else shapes.LAYERS:
        for tokens in shapes.QUICK_TOKENS if quick else shapes.TOKENS:
            yield case(layer, tokens, dtype)


def case(layer: shapes.Layer, tokens: int, dtype: str) -> Case:
    """One layer with a bias on ``tokens`` rows."""
    kind = shapes.DTYPES[dtype]
    in_features, out_features, rank = layer
    parameters = rank * (in_features + out_features)

    def make(device: torch.device, seed: int) -> Tensors:
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.empty(size, dtype=kind, device=device)
            return values if generator is None else values.normal_(0.0, scale, generator=generator)

        x = normal(tokens, in_features)
        down, up = normal(rank, in_features, scale=in_features**-0.5), normal(out_features, rank, scale=rank**-0.5)
        return x, down, up, normal(out_features), up @ down

    names = [backend.value for backend in lro.ops.Backend if backend != "unverified"]
    return Case(
        op="lowrank_linear",
        shape={"tokens": tokens, "in_features": in_features, "rank": rank, "out_features": out_features}
        | {"dtype": dtype},
        flops=2.0 * tokens * parameters,
        bytes=(tokens * (in_features + out_features) + parameters + out_features) * kind.itemsize,
        dtype=kind,
        make=make,
        variants=(
            Variant("dense", dense),
            Variant("two_linears", two_linears),
            Variant("two_linears compiled", two_linears_compiled, on_cuda),
            *(Variant(f"lowrank_ops {name}", functools.partial(ours, name), backend=name) for name in names),
        ),
        solve=lambda run, tensors: run(*tensors),
        exact=lambda tensors: two_linears(*(tensor.double() for tensor in tensors)),
        plain=two_linears,
        explained=lambda tensors, backend: lro.ops.explain("lowrank_linear", *tensors[:4], backend=backend),
        rotated=4,
    )


def dense(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """The layer before it was factorized."""
    return F.linear(x, weight, bias)


def two_linears(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """The factorized layer as one would write it in torch."""
    return F.linear(F.linear(x, down), up, bias)


def two_linears_compiled(*tensors: Tensor) -> Tensor:
    """The same by ``torch.compile``."""
    result: Tensor = _compiled()(*tensors)
    return result


@functools.cache
def _compiled() -> Callable[..., Any]:
    compile_every_shape()
    return torch.compile(two_linears, dynamic=False)


def ours(backend: str, x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """``lowrank_linear``, without the dense weight."""
    return lro.ops.lowrank_linear(x, down, up, bias, backend=backend)


if __name__ == "__main__":
    sys.exit(main("lowrank_linear", __doc__, cases, "bf16"))
