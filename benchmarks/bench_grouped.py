"""``lowrank_linear_grouped`` against its members one after another: ``python -m benchmarks.bench_grouped``.

All variants compute one function: the dense weights are the products of the factors.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import lowrank_ops as lro

from . import shapes
from .harness import Case, Tensors, Variant
from .suite import main

Members = Sequence[tuple[Tensor, ...]]  # down, up, bias and dense weight of each


def cases(dtype: str, quick: bool = False) -> Iterator[Case]:
    """Every group with every number of tokens."""
    for group in shapes.GROUPS[1:3] if quick else shapes.GROUPS:
        for tokens in shapes.QUICK_TOKENS if quick else shapes.TOKENS:
            yield case(group, tokens, dtype)


def case(group: shapes.Group, tokens: int, dtype: str) -> Case:
    """One group, each member with a bias, on ``tokens`` rows."""
    kind = shapes.DTYPES[dtype]
    name, in_features, outputs, ranks = group
    parameters = sum(rank * (in_features + out) for rank, out in zip(ranks, outputs, strict=True))

    def make(device: torch.device, seed: int) -> Tensors:
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.empty(size, dtype=kind, device=device)
            return values if generator is None else values.normal_(0.0, scale, generator=generator)

        tensors = [normal(tokens, in_features)]
        for rank, out in zip(ranks, outputs, strict=True):
            down, up = normal(rank, in_features, scale=in_features**-0.5), normal(out, rank, scale=rank**-0.5)
            tensors += [down, up, normal(out), up @ down]
        return tuple(tensors)

    def variant(name: str, run: Callable[[Tensor, Members], list[Tensor]], backend: str | None = None) -> Variant:
        return Variant(name, lambda *tensors: run(tensors[0], members_of(tensors)), backend=backend)

    names = [backend.value for backend in lro.ops.Backend if backend != "unverified"]
    plain = variant("two_linears", two_linears)
    return Case(
        op="lowrank_linear_grouped",
        shape={"group": name, "tokens": tokens, "dtype": dtype},
        flops=2.0 * tokens * parameters,
        bytes=(tokens * (in_features + sum(outputs)) + parameters + sum(outputs)) * kind.itemsize,
        dtype=kind,
        make=make,
        variants=(
            variant("dense", dense),
            plain,
            variant("lowrank_linear", one_by_one),
            *(variant(f"lowrank_ops {name}", functools.partial(ours, name), name) for name in names),
        ),
        solve=lambda run, tensors: torch.cat(run(*tensors), -1),
        exact=lambda tensors: torch.cat(plain.run(*(tensor.double() for tensor in tensors)), -1),
        plain=plain.run,
        explained=lambda tensors, backend: lro.ops.explain(
            "lowrank_linear_grouped", *arguments(tensors), backend=backend
        ),
    )


def members_of(tensors: Sequence[Tensor]) -> Members:
    """The members among a case's tensors, which begin with x."""
    return [tuple(tensors[first : first + 4]) for first in range(1, len(tensors), 4)]


def arguments(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The op's x, downs, ups and biases from a case's tensors."""
    return tensors[0], *_lists(members_of(tensors))  # type: ignore[return-value]


def _lists(members: Members) -> list[list[Tensor]]:
    return [[member[place] for member in members] for place in range(3)]


def dense(x: Tensor, members: Members) -> list[Tensor]:
    """The layers before they were factorized."""
    return [F.linear(x, weight, bias) for _, _, bias, weight in members]


def two_linears(x: Tensor, members: Members) -> list[Tensor]:
    """The factorized layers in plain torch."""
    return [F.linear(F.linear(x, down), up, bias) for down, up, bias, _ in members]


def one_by_one(x: Tensor, members: Members) -> list[Tensor]:
    """``lowrank_linear`` of each member."""
    return [lro.ops.lowrank_linear(x, down, up, bias) for down, up, bias, _ in members]


def ours(backend: str, x: Tensor, members: Members) -> list[Tensor]:
    """``lowrank_linear_grouped``."""
    return lro.ops.lowrank_linear_grouped(x, *_lists(members), backend=backend)


if __name__ == "__main__":
    sys.exit(main("grouped", __doc__, cases, "bf16"))
