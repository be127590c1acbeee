"""transformers' own modules, dense and low-rank, on a CPU: ``python -m benchmarks.bench_transformers --out FILE``.

A T5 of the sizes of T5-small at 1 to 64 tokens, and layers of experts at 1 to 512. All variants of a case compute one
function: dense weights are the products of the factors. One thread on its own clock, calls in turn.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_ops as lro
from lowrank_ops.layers import to_dense_layers
from lowrank_ops.models.experts import ListedExperts

from .harness import Case, Tensors, Variant
from .shapes import DTYPES
from .suite import main as run

TOKENS = {"T5": (1, 4, 16, 64), "experts": (1, 16, 512)}
FRACTION = 0.5
T5_SMALL = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64, "vocab_size": 32128}
T5_TINY = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 64}


class Experts(NamedTuple):
    """The sizes of a layer of experts, and how many a token visits."""

    number: int
    features: int
    hidden: int
    visited: int

    def __str__(self) -> str:
        return f"{self.number} of {self.features} -> {self.hidden}, {self.visited} per token"


EXPERTS = (Experts(8, 512, 1024, 2), Experts(64, 512, 256, 6))


def cases(dtype: str = "fp32", quick: bool = False) -> Iterator[Case]:
    """The T5 and the layers of experts, at each number of tokens."""
    for tokens in TOKENS["T5"][: 1 if quick else None]:
        yield t5_case(T5_SMALL, tokens, dtype)
    for sizes in EXPERTS[: 1 if quick else None]:
        for tokens in TOKENS["experts"][: 1 if quick else None]:
            yield experts_case(sizes, tokens, dtype)


def t5_case(sizes: dict[str, int], tokens: int, dtype: str) -> Case:
    """Encoder and decoder on one text of ``tokens`` each."""

    def make(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(1, sizes["vocab_size"], (1, tokens), generator=generator) for _ in range(2))

    def forward(which: str) -> Callable[..., Tensor]:
        def call(source: Tensor, target: Tensor) -> Tensor:
            model = _t5(which, DTYPES[dtype], **sizes)
            result: Tensor = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
            return result

        return call

    return _case("T5", {"tokens": tokens, "dtype": dtype}, dtype, make, forward, {"dense": None, "lowrank_ops": "auto"})


def experts_case(sizes: Experts, tokens: int, dtype: str) -> Case:
    """One layer of experts, with random routes and ranks that differ by expert."""

    def make(device: torch.device, seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, sizes.features, generator=generator).to(DTYPES[dtype])
        weights, index = torch.rand(tokens, sizes.number, generator=generator).topk(sizes.visited)
        return hidden, index, (weights / weights.sum(1, keepdim=True)).to(DTYPES[dtype])

    def forward(which: str) -> Callable[..., Tensor]:
        return lambda *tensors: _experts(sizes, DTYPES[dtype])[which](*tensors)

    variants = dict.fromkeys(("dense eager", "dense grouped_mm", "one by one", "one op", "padded grouped_mm"))
    return _case("experts", {"experts": str(sizes), "tokens": tokens, "dtype": dtype}, dtype, make, forward, variants)


def _case(
    op: str,
    shape: dict[str, int | str],
    dtype: str,
    make: Callable[[torch.device, int], Tensors],
    forward: Callable[[str], Callable[..., Tensor]],
    variants: dict[str, str | None],
) -> Case:
    dense = next(iter(variants))
    return Case(
        op=op,
        shape=shape,
        flops=0.0,
        bytes=0.0,
        dtype=DTYPES[dtype],
        make=make,
        variants=tuple(Variant(name, forward(name), backend=backend) for name, backend in variants.items()),
        solve=lambda run, tensors: run(*tensors),
        exact=lambda tensors: forward("exact")(*(x.double() if x.is_floating_point() else x for x in tensors)),
        plain=forward(dense),
        cold=False,
        context=torch.no_grad,
    )


@functools.lru_cache(maxsize=8)
def _t5(which: str, dtype: torch.dtype, **sizes: int) -> Any:
    """The low-rank T5 for "lowrank_ops", a dense copy of it for other variants."""
    from transformers import T5Config, T5ForConditionalGeneration

    if which != "lowrank_ops":
        model = to_dense_layers(_t5("lowrank_ops", dtype, **sizes))
        return model.double() if which == "exact" else model
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval().requires_grad_(False)
    for parent in list(model.encoder.modules()) + list(model.decoder.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, _thin(layer.in_features, layer.out_features, FRACTION))
    return model.to(dtype)


def _thin(in_features: int, out_features: int, fraction: float) -> lro.LowRankLinear:
    rank = max(1, int(fraction * in_features * out_features / (in_features + out_features)))
    return lro.LowRankLinear(in_features, out_features, rank, bias=False).requires_grad_(False)


@functools.lru_cache(maxsize=1)
def _experts(sizes: Experts, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """The variants of one layer."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    dense = {}
    for implementation in ("eager", "grouped_mm"):
        config = MixtralConfig(
            hidden_size=sizes.features, intermediate_size=sizes.hidden, num_local_experts=sizes.number,
            experts_implementation=implementation,
        )  # fmt: skip
        dense[implementation] = MixtralExperts(config).eval().to(dtype).requires_grad_(False)
    eager = dense["eager"]
    for parameter in eager.parameters():
        nn.init.normal_(parameter)
    thin = ListedExperts(eager)
    for index, part in enumerate(torch.linspace(0.7 * FRACTION, 1.3 * FRACTION, sizes.number)):
        layers = thin.projections(index)
        for name, layer in layers.items():
            layers[name] = _thin(layer.in_features, layer.out_features, float(part)).to(dtype)  # type: ignore[arg-type]
            thin.get_submodule(str(index)).register_module(name, layers[name])
            for experts in dense.values():
                experts.get_parameter(name)[index] = layers[name].product()  # type: ignore[operator]
    return {
        "dense eager": eager,
        "dense grouped_mm": dense["grouped_mm"],
        "one by one": _one_by_one(thin.eval()),
        "one op": functools.partial(_one_op, thin),
        "padded grouped_mm": _padded(thin),
        "exact": copy.deepcopy(thin).double(),
    }


def _one_by_one(experts: ListedExperts) -> ListedExperts:
    """As for fewer rows than experts: one expert after another."""
    experts = copy.deepcopy(experts)
    experts.factors = lambda: None  # type: ignore[method-assign]
    return experts


def _one_op(experts: ListedExperts, *tensors: Tensor) -> Tensor:
    """As for more rows: one op per projection."""
    factors = experts.factors()
    assert factors is not None
    return experts.run_together(experts.sorted_rows(*tensors), factors)


def _padded(experts: ListedExperts) -> Callable[..., Tensor]:
    """The same with stacks of factors, padded to the largest rank: four products of groups of rows."""
    stacks = []
    for name in ("gate_up_proj", "down_proj"):
        layers = [experts.projections(index)[name] for index in range(experts.num_experts)]
        rank = max(len(layer.down) for layer in layers)  # type: ignore[arg-type]
        padding = [rank - len(layer.down) for layer in layers]  # type: ignore[arg-type]
        stacks.append(torch.stack([F.pad(one.down, (0, 0, 0, n)) for one, n in zip(layers, padding, strict=True)]).mT)  # type: ignore[arg-type]
        stacks.append(torch.stack([F.pad(one.up, (0, n)) for one, n in zip(layers, padding, strict=True)]).mT)  # type: ignore[arg-type]
    gate: Any = experts._shell

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        flat = top_k_index.T.flatten()
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=experts.num_experts).cumsum(0).int()
        tokens = order % len(hidden_states)
        y = hidden_states[tokens]
        for number, stack in enumerate(stacks):
            y = F.grouped_mm(y, stack, offs=ends)
            y = gate._apply_gate(y) if number == 1 else y
        y = y * top_k_weights.T.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, tokens, y)

    return forward


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, on one thread: a thread's clock does not see the work of others."""
    torch.set_num_threads(1)
    return run("transformers", __doc__, cases, "fp32", argv, seconds=4.0, device="cpu", clock=time.thread_time)


if __name__ == "__main__":
    sys.exit(main())
