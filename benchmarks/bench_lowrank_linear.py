"""``lowrank_linear`` against the dense layer and against two layers: ``python -m benchmarks.bench_lowrank_linear``.

All variants compute one function: the dense weight is the product of the factors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops as lro
from lowrank_ops.factors.eight_bit import quantized
from lowrank_ops.ops.linear.reference import dequantized

from . import shapes
from .harness import Case, Tensors, Variant, compile_every_shape, on_cuda
from .suite import main


def cases(dtype: str, quick: bool = False) -> Iterator[Case]:
    """Every layer with every number of tokens, then with int8 and with fp8 factors."""
    for make in (case, *(functools.partial(eight_bit_case, format) for format in ("int8", "fp8"))):
        for layer in shapes.QUICK_LAYERS if quick else shapes.LAYERS:
            for tokens in shapes.QUICK_TOKENS if quick else shapes.TOKENS:
                yield make(layer, tokens, dtype)


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


def eight_bit_case(format: str, layer: shapes.Layer, tokens: int, dtype: str) -> Case:
    """The same with 8-bit factors, against the dense layer and against dequantized factors."""
    plain = case(layer, tokens, dtype)
    in_features, out_features, rank = layer
    kind = shapes.DTYPES[dtype]

    def make(device: torch.device, seed: int) -> Tensors:
        x, down, up, bias, _ = plain.make(device, seed)
        (down, down_scale), (up, up_scale) = quantized(down, format), quantized(up, format)
        factors = dequantized(down, down_scale, kind), dequantized(up, up_scale, kind)
        return x, down, up, bias, down_scale, up_scale, *factors, factors[1] @ factors[0]

    return replace(
        plain,
        shape=plain.shape | {"factors": format},  # type: ignore[operator]
        bytes=(tokens * (in_features + out_features) + out_features) * kind.itemsize
        + rank * (in_features + out_features)
        + 4 * (rank + out_features),
        make=make,
        variants=(
            Variant("dense", lambda *tensors: dense(*tensors[:1], *tensors[6:8], tensors[3], tensors[8])),
            Variant("two_linears", two_linears_dequantized),
            *(
                Variant(f"lowrank_ops {name}", functools.partial(ours_eight_bit, name), backend=name)
                for name in ("auto", "reference", "triton")
            ),
        ),
        exact=lambda tensors: two_linears(
            tensors[0].double(),
            *(dequantized(*pair, torch.float64) for pair in zip(tensors[1:3], tensors[4:6], strict=True)),
            tensors[3].double(),
            tensors[8],
        ),
        plain=two_linears_dequantized,
        explained=lambda tensors, backend: lro.ops.explain(
            "lowrank_linear", *tensors[:4], backend=backend, down_scale=tensors[4], up_scale=tensors[5]
        ),
        rotated=8,
    )


def two_linears_dequantized(*tensors: Tensor) -> Tensor:
    """Two layers with factors that were dequantized before."""
    return two_linears(tensors[0], *tensors[6:8], tensors[3], tensors[8])


def ours_eight_bit(backend: str, *tensors: Tensor) -> Tensor:
    """``lowrank_linear`` with 8-bit factors."""
    return lro.ops.lowrank_linear(*tensors[:4], backend=backend, down_scale=tensors[4], up_scale=tensors[5])


def dense(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """The layer before it was factorized."""
    return F.linear(x, weight, bias)


def two_linears(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """The factorized layer in plain torch."""
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
